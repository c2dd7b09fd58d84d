# SPDX-License-Identifier: Apache-2.0
# Lets a build on a recent distribution run on glibc 2.28 (manylinux_2_28) and later.
#
# glibc 2.34 moved libpthread, libdl and librt into libc and gave their symbols new versions. Linking
# against three stub libraries that carry the old versions keeps the old ones in our libraries; every
# later glibc still serves those. FastkernCompat.cpp defines the few newer libstdc++ and libc symbols.

set(_compat_default OFF)
if(CMAKE_SYSTEM_NAME STREQUAL "Linux" AND CMAKE_SYSTEM_PROCESSOR STREQUAL "x86_64")
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND NOT "${CMAKE_CXX_FLAGS}" MATCHES "-fsanitize")
    set(_compat_default ON)
  endif()
endif()
option(FASTKERN_OLD_GLIBC "Keep the libraries loadable on glibc 2.28" ${_compat_default})

set(_compat_libs "")
if(FASTKERN_OLD_GLIBC)
  set(_compat_dir "${CMAKE_CURRENT_BINARY_DIR}/compat")
  set(_symbols "${CMAKE_CURRENT_SOURCE_DIR}/cmake/glibc_2_17_symbols.txt")
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${_symbols}")
  file(STRINGS "${_symbols}" _lines REGEX "^[a-z]")
  set(_dl_so "libdl.so.2")
  set(_rt_so "librt.so.1")
  set(_pthread_so "libpthread.so.0")
  foreach(_lib IN ITEMS dl pthread rt)
    set(_c "")
    set(_versions "")
    foreach(_line IN LISTS _lines)
      if(_line MATCHES "^${_lib} (GLIBC_[0-9.]+) ([a-z_0-9]+)$")
        set(_version "${CMAKE_MATCH_1}")
        set(_name "${CMAKE_MATCH_2}")
        string(APPEND _c "void stub_${_name}(void) {}\n")
        string(APPEND _c "__asm__(\".symver stub_${_name}, ${_name}@@@${_version}\");\n")
        list(APPEND _versions "${_version}")
      endif()
    endforeach()
    list(REMOVE_DUPLICATES _versions)
    set(_map "")
    foreach(_version IN LISTS _versions)
      string(APPEND _map "${_version} {};\n")
    endforeach()
    file(CONFIGURE OUTPUT "${_compat_dir}/${_lib}.c" CONTENT "${_c}" @ONLY)
    file(CONFIGURE OUTPUT "${_compat_dir}/${_lib}.map" CONTENT "${_map}" @ONLY)
    add_library(compat_${_lib} SHARED "${_compat_dir}/${_lib}.c")
    set_target_properties(
      compat_${_lib}
      PROPERTIES
        C_VISIBILITY_PRESET default
        LIBRARY_OUTPUT_DIRECTORY "${_compat_dir}"
        NO_SONAME ON
        LINK_DEPENDS "${_compat_dir}/${_lib}.map"
    )
    target_link_options(
      compat_${_lib}
      PRIVATE
        -nostdlib
        "LINKER:-soname,${_${_lib}_so}"
        "LINKER:--version-script=${_compat_dir}/${_lib}.map"
    )
    list(APPEND _compat_libs compat_${_lib})
  endforeach()
  add_library(fastkern_compat OBJECT "${CMAKE_CURRENT_SOURCE_DIR}/cmake/FastkernCompat.cpp")
endif()

# Makes `target` ask for the old symbol versions only.
function(fastkern_compat target)
  if(NOT FASTKERN_OLD_GLIBC)
    return()
  endif()
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:fastkern_compat>)
  # By path: a target link would end up in the exported targets. Not --as-needed: the static CUDA
  # runtime, which needs most of these symbols, comes after them on the command line.
  set(files "")
  foreach(lib IN LISTS _compat_libs)
    list(APPEND files "$<TARGET_FILE:${lib}>")
    add_dependencies(${target} ${lib})
  endforeach()
  target_link_libraries(
    ${target}
    PRIVATE "-Wl,--push-state,--no-as-needed" ${files} "-Wl,--pop-state"
  )
endfunction()
