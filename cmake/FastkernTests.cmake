# SPDX-License-Identifier: Apache-2.0
# ctest: one executable a file of tests/cpp, and every public header compiled alone.
# The executables find the libraries relative to themselves: fastkern/ and tests/ of the build tree, copied
# together, run on another machine.

include(GoogleTest)
include(FastkernGoogleTest)

file(GLOB _tests CONFIGURE_DEPENDS tests/cpp/test_*.cpp)
if(FASTKERN_HAS_CUDA)
  file(GLOB _cuda_tests CONFIGURE_DEPENDS tests/cpp/test_*.cu)
  list(APPEND _tests ${_cuda_tests})
endif()
foreach(_source IN LISTS _tests)
  get_filename_component(_name "${_source}" NAME_WE)
  get_filename_component(_extension "${_source}" LAST_EXT)
  add_executable(${_name} "${_source}")
  target_link_libraries(${_name} PRIVATE fastkern fastkern_flags GTest::gtest GTest::gtest_main)
  target_compile_definitions(${_name} PRIVATE FASTKERN_HAS_CUDA=${FASTKERN_HAS_CUDA})
  set_target_properties(
    ${_name}
    PROPERTIES
      RUNTIME_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/tests"
      BUILD_WITH_INSTALL_RPATH ON
      INSTALL_RPATH "$ORIGIN/../fastkern/lib"
  )
  set(_labels cpu)
  if(_extension STREQUAL ".cu")
    set(_labels cuda)
    target_include_directories(${_name} PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/cuda")
    target_compile_definitions(${_name} PRIVATE FASTKERN_HAS_SM90=${FASTKERN_HAS_SM90})
    target_compile_options(${_name} PRIVATE --extended-lambda --expt-relaxed-constexpr)
    set_target_properties(${_name} PROPERTIES CUDA_ARCHITECTURES "${FASTKERN_ARCHS_GENERAL}")
  endif()
  gtest_discover_tests(${_name} DISCOVERY_MODE PRE_TEST PROPERTIES LABELS "${_labels}" TIMEOUT 300)
endforeach()

# The example of a pointwise function of one's own, as a user compiles it but for where headers lie.
add_executable(example_pointwise examples/pointwise/main.cpp)
set(_examples example_pointwise)
if(FASTKERN_HAS_CUDA)
  file(MAKE_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/example_include/fastkern")
  file(
    CREATE_LINK
      "${CMAKE_CURRENT_SOURCE_DIR}/cuda"
      "${CMAKE_CURRENT_BINARY_DIR}/example_include/fastkern/cuda"
    SYMBOLIC
  )
  add_executable(example_pointwise_cuda examples/pointwise/main.cu)
  target_include_directories(
    example_pointwise_cuda
    PRIVATE "${CMAKE_CURRENT_BINARY_DIR}/example_include"
  )
  target_compile_options(example_pointwise_cuda PRIVATE --extended-lambda --expt-relaxed-constexpr)
  set_target_properties(
    example_pointwise_cuda
    PROPERTIES CUDA_ARCHITECTURES "${FASTKERN_ARCHS_GENERAL}"
  )
  list(APPEND _examples example_pointwise_cuda)
endif()
foreach(_name IN LISTS _examples)
  target_link_libraries(${_name} PRIVATE fastkern fastkern_flags)
  set_target_properties(
    ${_name}
    PROPERTIES
      RUNTIME_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/tests"
      BUILD_WITH_INSTALL_RPATH ON
      INSTALL_RPATH "$ORIGIN/../fastkern/lib"
  )
  set(_labels cpu)
  if(_name MATCHES "_cuda$")
    set(_labels cuda)
  endif()
  add_test(NAME ${_name} COMMAND ${_name})
  set_tests_properties(
    ${_name}
    PROPERTIES LABELS "${_labels}" TIMEOUT 300 SKIP_RETURN_CODE 77
  )
endforeach()

# torch.h is for LibTorch users and needs the whole of torch's C++ API.
file(
  GLOB _headers
  CONFIGURE_DEPENDS
  RELATIVE "${CMAKE_CURRENT_SOURCE_DIR}/cpp/include"
  cpp/include/fastkern/*.h
)
set(_plain "")
set(_with_torch "")
foreach(_header IN LISTS _headers)
  get_filename_component(_name "${_header}" NAME_WE)
  set(_check "${CMAKE_CURRENT_BINARY_DIR}/headers/${_name}.cpp")
  file(CONFIGURE OUTPUT "${_check}" CONTENT "#include <${_header}>\n#include <${_header}>\n")
  if(_name STREQUAL "torch")
    list(APPEND _with_torch "${_check}")
  else()
    list(APPEND _plain "${_check}")
  endif()
endforeach()
if(_plain)
  add_library(fastkern_header_check OBJECT ${_plain})
  target_link_libraries(fastkern_header_check PRIVATE fastkern_headers)
  target_compile_options(fastkern_header_check PRIVATE -Wall -Wextra -Werror)
endif()
if(_with_torch AND FASTKERN_TORCH_INCLUDE_FOUND)
  add_library(fastkern_torch_header_check OBJECT ${_with_torch})
  target_link_libraries(fastkern_torch_header_check PRIVATE fastkern_headers)
  target_include_directories(
    fastkern_torch_header_check
    SYSTEM
    PRIVATE
      "${FASTKERN_TORCH_INCLUDE_FOUND}"
      "${FASTKERN_TORCH_INCLUDE_FOUND}/torch/csrc/api/include"
  )
  # -w: torch's own headers warn inside templates that ours instantiate.
  target_compile_options(fastkern_torch_header_check PRIVATE -O0 -w)
endif()
