# SPDX-License-Identifier: Apache-2.0
# What the library says about itself. The definitions sit on one source, so a commit rebuilds one file.

find_package(Git QUIET)
set(FASTKERN_COMMIT "unknown")
if(DEFINED ENV{FASTKERN_COMMIT})
  set(FASTKERN_COMMIT "$ENV{FASTKERN_COMMIT}")
elseif(Git_FOUND AND EXISTS "${CMAKE_CURRENT_SOURCE_DIR}/.git")
  execute_process(
    COMMAND "${GIT_EXECUTABLE}" describe --always --dirty --abbrev=12
    WORKING_DIRECTORY "${CMAKE_CURRENT_SOURCE_DIR}"
    OUTPUT_VARIABLE _describe
    OUTPUT_STRIP_TRAILING_WHITESPACE
    ERROR_QUIET
  )
  # Every commit writes here; asking again then takes a fraction of a second.
  if(EXISTS "${CMAKE_CURRENT_SOURCE_DIR}/.git/logs/HEAD")
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS .git/logs/HEAD)
  endif()
  if(_describe)
    set(FASTKERN_COMMIT "${_describe}")
  endif()
endif()

function(fastkern_build_info source)
  set(compiler "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
  set_property(
    SOURCE "${source}"
    APPEND
    PROPERTY
      COMPILE_DEFINITIONS
        "FASTKERN_VERSION=\"${PROJECT_VERSION}\""
        "FASTKERN_COMMIT=\"${FASTKERN_COMMIT}\""
        "FASTKERN_COMPILER=\"${compiler}\""
        "FASTKERN_CUDA_ARCHS=\"${FASTKERN_CUDA_ARCHS}\""
        "FASTKERN_CUDA_VERSION=\"${FASTKERN_CUDA_VERSION}\""
  )
endfunction()
