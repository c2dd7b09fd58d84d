# SPDX-License-Identifier: Apache-2.0
# Libraries, public headers and the CMake package, relocatable as one tree.

include(CMakePackageConfigHelpers)

set(_libraries fastkern)
set_target_properties(fastkern PROPERTIES EXPORT_NAME fastkern)
if(TARGET fastkern_torch)
  list(APPEND _libraries fastkern_torch)
  set_target_properties(fastkern_torch PROPERTIES EXPORT_NAME torch)
endif()
install(
  TARGETS ${_libraries} fastkern_headers
  EXPORT fastkernTargets
  LIBRARY DESTINATION "${FASTKERN_INSTALL_LIBDIR}"
)
set_target_properties(fastkern_headers PROPERTIES EXPORT_NAME headers)
install(
  DIRECTORY cpp/include/fastkern
  DESTINATION "${FASTKERN_INSTALL_INCLUDEDIR}"
  FILES_MATCHING
  PATTERN "*.h"
)

# What fastkern/cuda/elementwise/pointwise.cuh is made of, for kernels that users compile.
install(FILES cuda/launch.cuh DESTINATION "${FASTKERN_INSTALL_INCLUDEDIR}/fastkern/cuda")
install(
  FILES cuda/ptx/cluster.cuh cuda/ptx/math.cuh cuda/ptx/memory.cuh
  DESTINATION "${FASTKERN_INSTALL_INCLUDEDIR}/fastkern/cuda/ptx"
)
install(
  FILES cuda/tile/formula_math.cuh
  DESTINATION "${FASTKERN_INSTALL_INCLUDEDIR}/fastkern/cuda/tile"
)
install(
  FILES
    cuda/elementwise/pointwise.cuh
    cuda/elementwise/pointwise_brief.cuh
    cuda/elementwise/pointwise_groups.cuh
    cuda/elementwise/pointwise_kernel.cuh
    cuda/elementwise/pointwise_packs.cuh
    cuda/elementwise/pointwise_words.cuh
  DESTINATION "${FASTKERN_INSTALL_INCLUDEDIR}/fastkern/cuda/elementwise"
)

set(_cmake_dir "${FASTKERN_INSTALL_LIBDIR}/cmake/fastkern")
install(EXPORT fastkernTargets NAMESPACE fastkern:: DESTINATION "${_cmake_dir}")
configure_package_config_file(
  cmake/fastkernConfig.cmake.in
  "${CMAKE_CURRENT_BINARY_DIR}/fastkernConfig.cmake"
  INSTALL_DESTINATION "${_cmake_dir}"
  NO_SET_AND_CHECK_MACRO
)
write_basic_package_version_file(
  "${CMAKE_CURRENT_BINARY_DIR}/fastkernConfigVersion.cmake"
  COMPATIBILITY SameMinorVersion
)
install(
  FILES
    "${CMAKE_CURRENT_BINARY_DIR}/fastkernConfig.cmake"
    "${CMAKE_CURRENT_BINARY_DIR}/fastkernConfigVersion.cmake"
  DESTINATION "${_cmake_dir}"
)

if(TARGET fastkern_core AND SKBUILD)
  install(TARGETS fastkern_core LIBRARY DESTINATION "${FASTKERN_INSTALL_PACKAGEDIR}")
endif()
