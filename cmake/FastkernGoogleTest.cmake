# SPDX-License-Identifier: Apache-2.0
# GoogleTest: the system's if there is one, else downloaded, else a message that says what to do.

find_package(GTest QUIET)
if(NOT TARGET GTest::gtest_main)
  set(
    _url
    "https://github.com/google/googletest/releases/download/v1.15.2/googletest-1.15.2.tar.gz"
  )
  set(_hash "7b42b4d6ed48810c5362c265a17faebe90dc2373c885e5216439d37927f02926")
  set(_archive "${CMAKE_CURRENT_BINARY_DIR}/googletest.tar.gz")
  set(_found "")
  if(EXISTS "${_archive}")
    file(SHA256 "${_archive}" _found)
  endif()
  if(NOT _found STREQUAL _hash)
    message(STATUS "fastkern: downloading GoogleTest")
    file(DOWNLOAD "${_url}" "${_archive}" STATUS _status INACTIVITY_TIMEOUT 20)
    file(SHA256 "${_archive}" _found)
    if(NOT _found STREQUAL _hash)
      file(REMOVE "${_archive}")
      list(GET _status 1 _reason)
      message(
        FATAL_ERROR
        "fastkern: the C++ tests need GoogleTest, and downloading it failed (${_reason}). "
        "Install it (Debian, Ubuntu: apt install libgtest-dev) or set FASTKERN_TESTS=OFF."
      )
    endif()
  endif()
  include(FetchContent)
  set(INSTALL_GTEST OFF)
  set(BUILD_GMOCK OFF)
  FetchContent_Declare(googletest URL "${_archive}" URL_HASH "SHA256=${_hash}")
  FetchContent_MakeAvailable(googletest)
endif()
