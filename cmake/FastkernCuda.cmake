# SPDX-License-Identifier: Apache-2.0
# Finds nvcc, settles the architectures, and adds the CUDA kernels to a library.

# The oldest compiler that knows sm_100 and sm_120.
set(_nvcc_minimum 12.8)

# Candidates in order: what the user names, the system's, a wheel in the running interpreter's path.
function(_fastkern_find_nvcc result)
  set(candidates "${CMAKE_CUDA_COMPILER}" "$ENV{CUDACXX}")
  find_program(
    _nvcc_system
    nvcc
    HINTS "$ENV{CUDA_HOME}/bin" "$ENV{CUDA_PATH}/bin"
    PATHS /usr/local/cuda/bin NO_CACHE
  )
  list(APPEND candidates "${_nvcc_system}")
  if(Python_Interpreter_FOUND)
    execute_process(
      COMMAND
        "${Python_EXECUTABLE}" -c
        "import glob, sys; print(*sorted((f for p in sys.path for f in glob.glob(p + '/nvidia/cu*/bin/nvcc')), reverse=True), sep=';')"
      OUTPUT_VARIABLE wheels
      OUTPUT_STRIP_TRAILING_WHITESPACE
      ERROR_QUIET
    )
    list(APPEND candidates ${wheels})
  endif()
  foreach(nvcc IN LISTS candidates)
    if(NOT nvcc OR NOT EXISTS "${nvcc}")
      continue()
    endif()
    execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE text ERROR_QUIET)
    if(
      text MATCHES "release ([0-9]+\\.[0-9]+)"
      AND CMAKE_MATCH_1 VERSION_GREATER_EQUAL _nvcc_minimum
    )
      set(${result} "${nvcc}" PARENT_SCOPE)
      return()
    endif()
    message(STATUS "fastkern: ${nvcc} is older than ${_nvcc_minimum}, skipped")
  endforeach()
  set(${result} "" PARENT_SCOPE)
endfunction()

set(FASTKERN_HAS_CUDA 0)
set(FASTKERN_CUDA_ARCHS "")
set(FASTKERN_CUDA_VERSION "")
string(TOLOWER "${FASTKERN_CUDA}" _cuda_wish)
if(_cuda_wish STREQUAL "auto" OR _cuda_wish)
  _fastkern_find_nvcc(_nvcc)
  if(_nvcc)
    set(FASTKERN_HAS_CUDA 1)
  elseif(NOT _cuda_wish STREQUAL "auto")
    message(
      FATAL_ERROR
      "fastkern: FASTKERN_CUDA=${FASTKERN_CUDA}, but no nvcc >= ${_nvcc_minimum} was found. "
      "Install one (python -m pip install \"cuda-toolkit[nvcc,cudart,cccl]==13.0.*\" is enough), "
      "name it with CUDACXX=/path/to/nvcc, or set FASTKERN_CUDA=off."
    )
  else()
    message(STATUS "fastkern: no nvcc >= ${_nvcc_minimum} found, building for the CPU only")
  endif()
endif()

if(FASTKERN_HAS_CUDA)
  set(CMAKE_CUDA_COMPILER "${_nvcc}")
  get_filename_component(_cuda_root "${_nvcc}" DIRECTORY)
  get_filename_component(_cuda_root "${_cuda_root}" DIRECTORY)
  if(EXISTS "${_cuda_root}/lib/libcudart_static.a" AND NOT "${CMAKE_CUDA_FLAGS}" MATCHES "-L")
    # A toolkit from wheels keeps its libraries in lib, nvcc.profile looks in lib64.
    string(APPEND CMAKE_CUDA_FLAGS " -L${_cuda_root}/lib")
  endif()
  if(NOT CMAKE_CUDA_ARCHITECTURES)
    set(_archs "80;90a;100;120")
    if(NOT "$ENV{CUDAARCHS}" STREQUAL "")
      set(_archs "$ENV{CUDAARCHS}")
    endif()
    set(CMAKE_CUDA_ARCHITECTURES "${_archs}" CACHE STRING "GPU architectures" FORCE)
  endif()
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  enable_language(CUDA)
  if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
    # CMake 3.25 does not know that nvcc takes C++20.
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
  endif()
  set(CMAKE_CUDA_STANDARD 20)
  set(FASTKERN_CUDA_VERSION "${CMAKE_CUDA_COMPILER_VERSION}")

  # 9.0 is always compiled as 90a. The newest plain architecture also gets PTX, for GPUs to come.
  set(_wanted "${CMAKE_CUDA_ARCHITECTURES}")
  if(_wanted STREQUAL "native")
    set(_wanted "${CMAKE_CUDA_ARCHITECTURES_NATIVE}")
  endif()
  list(TRANSFORM _wanted REPLACE "-(real|virtual)$" "")
  list(TRANSFORM _wanted REPLACE "^90$" "90a")
  list(REMOVE_DUPLICATES _wanted)
  list(SORT _wanted COMPARE NATURAL)
  set(_real "${_wanted}")
  list(TRANSFORM _real APPEND "-real")
  set(_plain "${_wanted}")
  list(FILTER _plain EXCLUDE REGEX "[af]$")
  set(FASTKERN_ARCHS_GENERAL "${_real}")
  if(_plain)
    list(GET _plain -1 _newest)
    list(APPEND FASTKERN_ARCHS_GENERAL "${_newest}-virtual")
  endif()
  set(FASTKERN_CUDA_ARCHS "${_wanted}")
  list(JOIN FASTKERN_CUDA_ARCHS " " FASTKERN_CUDA_ARCHS)
  set(FASTKERN_HAS_SM90 0)
  if("90a" IN_LIST _wanted)
    set(FASTKERN_HAS_SM90 1)
  endif()
  list(LENGTH _wanted _arch_count)
  set(FASTKERN_NVCC_THREADS 1)
  if(_arch_count GREATER 1)
    set(FASTKERN_NVCC_THREADS 2)
  endif()
  message(STATUS "fastkern: CUDA ${FASTKERN_CUDA_VERSION} for ${FASTKERN_CUDA_ARCHS} (${_nvcc})")
endif()

# One object library of .cu files. Its ptxas report goes next to each object (ptxas_log.sh).
function(fastkern_cuda_object_library name architectures)
  add_library(${name} OBJECT ${ARGN})
  target_include_directories(${name} PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/cuda")
  target_link_libraries(${name} PRIVATE fastkern_headers fastkern_flags)
  target_compile_definitions(
    ${name}
    PRIVATE FASTKERN_HAS_CUDA=1 FASTKERN_HAS_SM90=${FASTKERN_HAS_SM90}
  )
  target_compile_options(
    ${name}
    PRIVATE
      "$<$<COMPILE_LANGUAGE:CUDA>:-Xfatbin=-compress-all;--extended-lambda;--expt-relaxed-constexpr;-Werror=cross-execution-space-call;-Xptxas=-v;--threads=${FASTKERN_NVCC_THREADS}>"
  )
  set(launcher sh "${CMAKE_CURRENT_SOURCE_DIR}/cmake/ptxas_log.sh" ${CMAKE_CUDA_COMPILER_LAUNCHER})
  set_target_properties(
    ${name}
    PROPERTIES CUDA_ARCHITECTURES "${architectures}" CUDA_COMPILER_LAUNCHER "${launcher}"
  )
endfunction()

function(fastkern_add_cuda_objects target)
  file(GLOB sources CONFIGURE_DEPENDS cuda/*/*.cu)
  set(sm90 "${sources}")
  list(FILTER sm90 INCLUDE REGEX "_sm90\\.cu$")
  list(FILTER sources EXCLUDE REGEX "_sm90\\.cu$")
  # Every kernel and nothing else, for the compile gate.
  add_custom_target(fastkern_kernels)
  if(sources)
    fastkern_cuda_object_library(fastkern_cuda "${FASTKERN_ARCHS_GENERAL}" ${sources})
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:fastkern_cuda>)
    add_dependencies(fastkern_kernels fastkern_cuda)
  endif()
  if(sm90 AND FASTKERN_HAS_SM90)
    fastkern_cuda_object_library(fastkern_cuda_sm90 "90a-real" ${sm90})
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:fastkern_cuda_sm90>)
    add_dependencies(fastkern_kernels fastkern_cuda_sm90)
  endif()
endfunction()
