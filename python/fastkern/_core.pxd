# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.string cimport string


cdef extern from "fastkern/core.h" namespace "fastkern" nogil:
    cpdef enum class DType(unsigned char):
        f32
        f16
        bf16
        u8

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


cdef extern from "fastkern/core.h" namespace "fastkern" nogil:
    cdef struct Stream:
        void* handle
        int device


cdef extern from "fastkern/optim.h" namespace "fastkern" nogil:
    cpdef enum class OptimKind(unsigned char):
        adam
        amsgrad
        sgd
        lion
        adagrad
        rmsprop
        nadam
        radam
        lamb
        muon

    cpdef enum class OptimRounding(unsigned char):
        nearest
        stochastic
        kahan
        master
        remainder

    const int kOptimStates
    const int kOptimGroups
    const int64_t kOptimInlineGrads

    cdef struct OptimTensor:
        void* param
        void* state[3]
        void* extra
        float* scale[2]
        float* step
        float* product
        int64_t numel
        int32_t group
        uint32_t index

    cdef struct OptimGroup:
        double lr
        const float* lr_tensor
        double beta1
        double beta2
        double eps
        double weight_decay
        double decay_base
        cbool decoupled
        cbool nesterov
        cbool maximize

    cdef cppclass OptimTable:
        OptimTable()
        OptimTable(void* memory, int64_t tensors)

        @staticmethod
        int64_t bytes(int64_t tensors)

        @staticmethod
        int64_t grad_offset(int64_t tensors)

        OptimTensor* tensor()
        const void** grad()
        int64_t chunks()
        void number_chunks(const char* op) except +

    cdef struct OptimStep:
        const char* op
        OptimKind kind
        OptimRounding rounding
        DType param
        DType grad
        DType state
        int64_t tensors
        const void* host
        void* table
        int groups
        OptimGroup group[32]
        const float* grad_scale
        const float* grad_factor
        const float* found_inf
        uint64_t seed
        float* workspace

    cdef struct OptimNorm:
        const char* op
        DType grad
        int64_t tensors
        const void* host
        void* table
        cbool largest
        cbool first
        cbool last
        double max_norm
        const float* grad_scale
        float* partials
        double* sum
        float* norm
        float* factor

    cdef struct OptimScale:
        const char* op
        DType grad
        int64_t tensors
        const void* host
        void* table
        const float* factor

    int64_t optim_workspace(OptimKind kind, int64_t tensors, int64_t chunks)


cdef extern from "fastkern/optim.h" namespace "fastkern::cpu" nogil:
    void _cpu_step "fastkern::cpu::optim_step"(const OptimStep& args) except +
    void _cpu_norm "fastkern::cpu::optim_norm"(const OptimNorm& args) except +
    void _cpu_scale "fastkern::cpu::optim_scale"(const OptimScale& args) except +


cdef extern from "fastkern/optim.h" namespace "fastkern::cuda" nogil:
    void _cuda_step "fastkern::cuda::optim_step"(const OptimStep& args, Stream stream) except +
    void _cuda_norm "fastkern::cuda::optim_norm"(const OptimNorm& args, Stream stream) except +
    void _cuda_scale "fastkern::cuda::optim_scale"(const OptimScale& args, Stream stream) except +
    void _cuda_write "fastkern::cuda::optim_write"(void* device, const void* host, int64_t bytes, const char* op,
                                                   Stream stream) except +
