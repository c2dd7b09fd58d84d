# SPDX-License-Identifier: Apache-2.0
# The Python interpreter (also asked where torch and nvcc lie) and the Cython module `_core`.

if(NOT Python_EXECUTABLE AND NOT DEFINED ENV{VIRTUAL_ENV} AND NOT SKBUILD)
  if(EXISTS "${CMAKE_CURRENT_SOURCE_DIR}/.venv/bin/python")
    set(Python_EXECUTABLE "${CMAKE_CURRENT_SOURCE_DIR}/.venv/bin/python")
  endif()
endif()
find_package(Python 3.10 COMPONENTS Interpreter OPTIONAL_COMPONENTS Development.Module)

set(FASTKERN_BUILD_PYTHON OFF)
set(_core_pyx "${CMAKE_CURRENT_SOURCE_DIR}/python/fastkern/_core.pyx")
if(Python_Interpreter_FOUND AND EXISTS "${_core_pyx}")
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c "import Cython; print(Cython.__version__)"
    OUTPUT_VARIABLE _cython_version
    OUTPUT_STRIP_TRAILING_WHITESPACE
    ERROR_QUIET
  )
  if(Python_Development.Module_FOUND AND _cython_version VERSION_GREATER_EQUAL 3.1)
    set(FASTKERN_BUILD_PYTHON ON)
  elseif(SKBUILD)
    message(
      FATAL_ERROR
      "fastkern: building the Python package needs the Python headers (Debian: python3-dev) "
      "and Cython >= 3.1 for ${Python_EXECUTABLE}"
    )
  else()
    message(STATUS "fastkern: no Python headers or no Cython >= 3.1, the module _core is left out")
  endif()
endif()

function(fastkern_add_core_module)
  set(source "${CMAKE_CURRENT_SOURCE_DIR}/python/fastkern/_core.pyx")
  set(generated "${CMAKE_CURRENT_BINARY_DIR}/cython/_core.cpp")
  file(MAKE_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/cython")
  file(GLOB declarations CONFIGURE_DEPENDS python/fastkern/*.pxd)
  add_custom_command(
    OUTPUT "${generated}"
    COMMAND
      "${Python_EXECUTABLE}" -m cython -3 --cplus --module-name fastkern._core "${source}" -o
      "${generated}"
    DEPENDS "${source}" ${declarations}
    COMMENT "Cython python/fastkern/_core.pyx"
    VERBATIM
  )
  python_add_library(fastkern_core MODULE "${generated}")
  # The limited API of 3.10: one file serves every later Python.
  target_compile_definitions(fastkern_core PRIVATE Py_LIMITED_API=0x030A0000)
  target_link_libraries(fastkern_core PRIVATE fastkern)
  fastkern_shared_library(fastkern_core "${CMAKE_CURRENT_SOURCE_DIR}/cmake/fastkern_core.map")
  fastkern_compat(fastkern_core)
  set_target_properties(
    fastkern_core
    PROPERTIES
      OUTPUT_NAME _core
      PREFIX ""
      SUFFIX ".abi3.so"
      INSTALL_RPATH "$ORIGIN/lib"
      LIBRARY_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/fastkern"
  )
endfunction()
