# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport int64_t
from libcpp cimport bool as cbool
from libcpp.string cimport string


cdef extern from "fastkern/core.h" namespace "fastkern" nogil:
    cpdef enum class DType(unsigned char):
        f32
        f16
        bf16

    cdef struct BuildInfo:
        const char* version
        const char* commit
        const char* compiler
        cbool cuda
        const char* cuda_version
        const char* cuda_archs

    cdef struct Plan:
        const char* kernel
        int threads_per_block
        int rows_per_block
        int threads_per_row
        int elements_per_thread
        cbool resident
        int64_t shared_bytes
        int stages
        int blocks_per_sm
        int blocks_per_row

    const BuildInfo& _build_info "fastkern::build_info"()


cdef extern from "fastkern/core.h" namespace "fastkern::cuda" nogil:
    cdef cppclass DeviceInfo:
        string name
        int capability_major
        int capability_minor
        int multiprocessors
        int64_t shared_memory_per_block
        int64_t l2_bytes
        int64_t memory_bytes

    int _device_count "fastkern::cuda::device_count"() except +
    DeviceInfo _device_info "fastkern::cuda::device_info"(int device) except +
    int _driver_version "fastkern::cuda::driver_version"() except +


cdef extern from "fastkern/norm.h" namespace "fastkern":
    cpdef enum class NormKind(unsigned char):
        rms
        layer


cdef extern from "fastkern/norm.h" namespace "fastkern::cuda" nogil:
    Plan norm_plan(NormKind kind, int64_t n, DType dtype) except +
    Plan norm_bwd_plan(NormKind kind, int64_t n, DType dtype) except +
