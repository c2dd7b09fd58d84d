# SPDX-License-Identifier: Apache-2.0
# Compile and link flags that every library of the project shares, and where things are installed.

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Build type" FORCE)
endif()

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_C_VISIBILITY_PRESET hidden)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
# The build tree has the layout of the package, so libraries find each other there as when installed
# (and never find the link-time stubs, which a generated run path would name).
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/fastkern/lib")

set(_prefix_map "-fmacro-prefix-map=${CMAKE_CURRENT_SOURCE_DIR}/=")
add_library(fastkern_flags INTERFACE)
target_compile_options(
  fastkern_flags
  INTERFACE
    "$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;${_prefix_map}>"
    "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra,-Wno-unused-parameter,${_prefix_map}>"
)
target_link_options(fastkern_flags INTERFACE "LINKER:--no-undefined" "LINKER:--gc-sections")

# The version script decides what a library exports; hidden visibility alone leaks weak and unique symbols.
function(fastkern_shared_library target script)
  target_link_options(${target} PRIVATE "LINKER:--version-script=${script}")
  set_target_properties(${target} PROPERTIES BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ORIGIN")
  set_property(TARGET ${target} APPEND PROPERTY LINK_DEPENDS "${script}")
endfunction()

# A wheel holds everything inside the package directory, a plain install uses the usual prefix.
include(GNUInstallDirs)
if(SKBUILD)
  set(FASTKERN_INSTALL_PACKAGEDIR "fastkern")
  set(FASTKERN_INSTALL_LIBDIR "fastkern/lib")
  set(FASTKERN_INSTALL_INCLUDEDIR "fastkern/include")
else()
  set(FASTKERN_INSTALL_PACKAGEDIR "${CMAKE_INSTALL_LIBDIR}/fastkern")
  set(FASTKERN_INSTALL_LIBDIR "${CMAKE_INSTALL_LIBDIR}")
  set(FASTKERN_INSTALL_INCLUDEDIR "${CMAKE_INSTALL_INCLUDEDIR}")
endif()
