# SPDX-License-Identifier: Apache-2.0
# The operator library. It is written against torch's stable ABI as of 2.10 and linked against a
# generated stub of libtorch_cpu, so that a symbol newer than 2.10 is a link error here.

set(FASTKERN_TORCH_TARGET "0x020a000000000000")
set(
  FASTKERN_TORCH_INCLUDE
  ""
  CACHE PATH
  "Directory that holds torch/csrc/stable (default: the interpreter's torch)"
)

# Under build isolation torch cannot be imported but still lies in the interpreter's site-packages.
set(_torch_include "${FASTKERN_TORCH_INCLUDE}")
if(NOT _torch_include)
  set(_torch_include "$ENV{FASTKERN_TORCH_INCLUDE}")
endif()
if(NOT _torch_include AND Python_Interpreter_FOUND)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_SOURCE_DIR}/cmake/find_torch_include.py"
    OUTPUT_VARIABLE _torch_include
    OUTPUT_STRIP_TRAILING_WHITESPACE
  )
endif()
set(_torch_version "0")
if(EXISTS "${_torch_include}/torch/headeronly/version.h")
  file(
    STRINGS "${_torch_include}/torch/headeronly/version.h"
    _lines
    REGEX "define TORCH_VERSION_M(AJOR|INOR) "
  )
  string(REGEX REPLACE ".*MAJOR ([0-9]+).*MINOR ([0-9]+).*" "\\1.\\2" _torch_version "${_lines}")
endif()
if(_torch_version VERSION_LESS 2.10)
  message(
    FATAL_ERROR
    "fastkern: the headers of torch >= 2.10 were not found (looked in: ${_torch_include}). "
    "Install torch for ${Python_EXECUTABLE} first (python -m pip install \"torch>=2.10\"), "
    "or name a directory with FASTKERN_TORCH_INCLUDE=/path/to/torch/include, "
    "or build the kernels alone with FASTKERN_TORCH=OFF."
  )
endif()
message(STATUS "fastkern: torch ${_torch_version} headers in ${_torch_include}")
set(FASTKERN_TORCH_INCLUDE_FOUND "${_torch_include}")

set(_shim_list "${CMAKE_CURRENT_SOURCE_DIR}/cmake/torch_shim_symbols.txt")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${_shim_list}")
file(STRINGS "${_shim_list}" _shims REGEX "^[a-z]")
list(TRANSFORM _shims REPLACE "(.+)" "void \\1(void) {}\n")
list(JOIN _shims "" _shims)
file(CONFIGURE OUTPUT "${CMAKE_CURRENT_BINARY_DIR}/stub/torch_cpu_stub.c" CONTENT "${_shims}" @ONLY)
add_library(torch_cpu_stub SHARED "${CMAKE_CURRENT_BINARY_DIR}/stub/torch_cpu_stub.c")
set_target_properties(
  torch_cpu_stub
  PROPERTIES
    OUTPUT_NAME torch_cpu
    C_VISIBILITY_PRESET default
    LIBRARY_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/stub"
)
target_compile_options(torch_cpu_stub PRIVATE -w)
target_link_options(torch_cpu_stub PRIVATE -nostdlib)

add_library(fastkern_torch_headers INTERFACE)
target_include_directories(fastkern_torch_headers SYSTEM INTERFACE "${_torch_include}")
target_compile_definitions(
  fastkern_torch_headers
  INTERFACE TORCH_TARGET_VERSION=${FASTKERN_TORCH_TARGET}
)

file(GLOB _torch_sources CONFIGURE_DEPENDS cpp/torch/*.cpp)
if(_torch_sources)
  add_library(fastkern_torch SHARED ${_torch_sources})
  add_library(fastkern::torch ALIAS fastkern_torch)
  target_link_libraries(
    fastkern_torch
    PUBLIC fastkern
    PRIVATE fastkern_flags $<BUILD_INTERFACE:fastkern_torch_headers>
  )
  target_compile_definitions(fastkern_torch PRIVATE FASTKERN_HAS_CUDA=${FASTKERN_HAS_CUDA})
  fastkern_shared_library(fastkern_torch "${CMAKE_CURRENT_SOURCE_DIR}/cmake/fastkern_torch.map")
  fastkern_compat(fastkern_torch)
  # By path: torch's library is found by name at load time and is no part of the exported targets.
  add_dependencies(fastkern_torch torch_cpu_stub)
  target_link_libraries(fastkern_torch PRIVATE "$<TARGET_FILE:torch_cpu_stub>" ${CMAKE_DL_LIBS})
endif()
