# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""What the compiled library knows and Python wants to know; importing it does not touch CUDA."""

import weakref

from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.object cimport PyObject, PyObject_CallMethodObjArgs, PyObject_GetAttr
from libc.stdint cimport int64_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memset

_DTYPES = {"float32": DType.f32, "float16": DType.f16, "bfloat16": DType.bf16}
_STATE_DTYPES = {**_DTYPES, "uint8": DType.u8}
_NORMS = {"rms_norm": NormKind.rms, "layer_norm": NormKind.layer}


def build_info():
    """Version, commit, compiler and CUDA facts of this build, as a dict."""
    cdef const BuildInfo* info = &_build_info()
    return {
        "version": info.version.decode(),
        "commit": info.commit.decode(),
        "compiler": info.compiler.decode(),
        "cuda": bool(info.cuda),
        "cuda_version": info.cuda_version.decode(),
        "architectures": architectures(),
    }


def architectures():
    """CUDA architectures compiled in, e.g. ``["80", "90a"]``; empty without CUDA."""
    return _build_info().cuda_archs.decode().split()


def device_count():
    """Number of CUDA devices; 0 without a driver. Initialises the CUDA driver."""
    return _device_count()


def driver_version():
    """Highest CUDA version of the driver as ``(major, minor)``, or None without a driver."""
    cdef int version = _driver_version()
    return (version // 1000, version % 1000 // 10) if version else None


def device_info(int device):
    """Capabilities of one CUDA device, as a dict. Initialises CUDA on it.

    Raises RuntimeError for a device that does not exist.
    """
    cdef DeviceInfo info = _device_info(device)
    return {
        "name": info.name.decode(),
        "capability": (info.capability_major, info.capability_minor),
        "multiprocessors": info.multiprocessors,
        "shared_memory_per_block": info.shared_memory_per_block,
        "l2_bytes": info.l2_bytes,
        "memory_bytes": info.memory_bytes,
    }


def plan(op, int64_t n, dtype):
    """The launch configuration ``op`` takes on CUDA, capability 9.0, for rows of ``n`` elements of ``dtype``.

    ``op`` is ``"rms_norm"``, ``"layer_norm"`` or either with ``_bwd``; ``dtype`` a torch dtype or its name. Raises
    ValueError otherwise, RuntimeError in a build without CUDA.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"plan: dtype must be one of {sorted(_DTYPES)}, got {name}")
    if n < 0:
        raise ValueError(f"plan: n must be >= 0, got {n}")
    if not _build_info().cuda:
        raise RuntimeError("plan: this build has no CUDA kernels")
    norm = str(op).removesuffix("_bwd")
    if norm not in _NORMS:
        raise ValueError(f"plan: op must be one of {sorted(_NORMS)}, or one with _bwd, got {op!r}")
    cdef Plan result
    if norm == op:
        result = norm_plan(_NORMS[norm], n, _DTYPES[name])
    else:
        result = norm_bwd_plan(_NORMS[norm], n, _DTYPES[name])
    return {
        "kernel": result.kernel.decode(),
        "threads_per_block": result.threads_per_block,
        "rows_per_block": result.rows_per_block,
        "threads_per_row": result.threads_per_row,
        "elements_per_thread": result.elements_per_thread,
        "resident": bool(result.resident),
        "shared_bytes": result.shared_bytes,
        "stages": result.stages,
        "blocks_per_sm": result.blocks_per_sm,
        "blocks_per_row": result.blocks_per_row,
    }


cdef extern from "Python.h":
    """
    typedef PyObject *(*fastkern_descr_get)(PyObject *, PyObject *, PyObject *);
    typedef PyObject *(*fastkern_method)(PyObject *, PyObject *);
    static PyObject *fastkern_type_of(PyObject *instance) { return (PyObject *)Py_TYPE(instance); }
    static void *fastkern_slot_of(PyObject *cls, int slot) { return PyType_GetSlot((PyTypeObject *)cls, slot); }
    """
    ctypedef object (*DescrGet "fastkern_descr_get")(object descriptor, PyObject* instance, PyObject* cls)
    ctypedef object (*NoArguments "fastkern_method")(PyObject* instance, PyObject* none)
    const int METH_NOARGS
    const int Py_tp_descr_get
    NoArguments PyCFunction_GetFunction(object function) except NULL
    int PyCFunction_GetFlags(object function) except -1
    void* _slot_of "fastkern_slot_of"(object cls, int slot) except NULL
    PyObject* _type_of "fastkern_type_of"(PyObject* instance)
    PyObject* PyList_GetItem(object those, Py_ssize_t i) except NULL
    PyObject* PyWeakref_GetObject(PyObject* ref) except NULL
    unsigned long long PyLong_AsUnsignedLongLong(object number) except? 0


cdef class _TensorAccess:
    """How attributes of torch.Tensor and torch.nn.Parameter themselves, not of subclasses, are read without a look-up
    by name: through what a look-up by name finds."""

    cdef PyObject* tensor
    cdef PyObject* parameter
    cdef object grad, dtype
    cdef DescrGet get_grad
    cdef DescrGet get_dtype
    cdef NoArguments get_data_ptr

    def __cinit__(self):
        import torch

        cdef object data_ptr = torch.empty(0).data_ptr
        self.grad, self.dtype = (self.found(torch.Tensor, name) for name in ("grad", "dtype"))
        self.get_grad = <DescrGet>_slot_of(type(self.grad), Py_tp_descr_get)
        self.get_dtype = <DescrGet>_slot_of(type(self.dtype), Py_tp_descr_get)
        self.tensor = self.parameter = NULL
        if PyCFunction_GetFlags(data_ptr) & METH_NOARGS:  # else every tensor is read by name
            self.get_data_ptr = PyCFunction_GetFunction(data_ptr)
            self.tensor, self.parameter = <PyObject*>torch.Tensor, <PyObject*>torch.nn.Parameter

    cdef object found(self, cls, name):
        for base in cls.__mro__:
            if name in vars(base):
                return vars(base)[name]
        raise AttributeError(name)

    cdef bint knows(self, PyObject* t) noexcept:
        cdef PyObject* cls = _type_of(t)
        return cls == self.parameter or cls == self.tensor

    cdef uint64_t address_of(self, PyObject* t) except? 0:
        """``t.data_ptr()``."""
        if self.knows(t):
            return PyLong_AsUnsignedLongLong(self.get_data_ptr(t, NULL))
        return PyLong_AsUnsignedLongLong(PyObject_CallMethodObjArgs(<object>t, "data_ptr", NULL))

    cdef object grad_of(self, PyObject* t):
        return self.get_grad(self.grad, t, _type_of(t)) if self.knows(t) else PyObject_GetAttr(<object>t, "grad")

    cdef object dtype_of(self, PyObject* t):
        return self.get_dtype(self.dtype, t, _type_of(t)) if self.knows(t) else PyObject_GetAttr(<object>t, "dtype")


cdef _TensorAccess _access = None


cdef class OptimParameters:
    """Parameters of one signature as the kernels of an optimizer see them: addresses in a table.

    ``params`` have the gradients; ``likes`` are what is updated, the same tensors where those are dense. A step reads
    for each parameter its address, its gradient and that one's address where nothing changed. What ``odd`` gives
    stands for a gradient whose elements do not lie as the parameter's do.
    """

    cdef OptimStep _step
    cdef char* _host
    cdef uint64_t* _param_seen
    cdef uint64_t* _grad_seen
    cdef Py_ssize_t _count
    cdef list _params, _likes, _grads, _keep, _odd, _contiguous
    cdef _TensorAccess _access
    cdef object _grad_dtype, _memory
    cdef bint _static_changed, _grads_changed, _cuda
    cdef int _patience, _left  # weak references are made again after so many steps
    cdef Stream _stream
    cdef readonly int64_t bytes
    cdef readonly int64_t chunks
    cdef readonly list updated  # the parameters with gradients

    def __cinit__(self, kind, rounding, param, grad, state, int device, list params, list likes):
        global _access
        if _access is None:
            _access = _TensorAccess()
        self._access = _access
        self._count = len(params)
        self.bytes = OptimTable.bytes(self._count)
        self._host = <char*>PyMem_Malloc(self.bytes)
        self._param_seen = <uint64_t*>PyMem_Malloc(16 * max(self._count, 1))
        if not self._host or not self._param_seen:
            raise MemoryError
        self._grad_seen = self._param_seen + self._count
        memset(self._host, 0, self.bytes)
        memset(self._param_seen, 0, 16 * max(self._count, 1))
        self._params, self._likes = params, likes
        self._grads = [None] * self._count  # weak references
        self._contiguous = [like is param and like.is_contiguous() for like, param in zip(likes, params)]
        self._keep = []
        self._odd = []
        self.updated = []
        self._grad_dtype = grad
        self._cuda = device >= 0
        self._stream.device = device
        self._step.kind = OptimKind[kind]
        self._step.rounding = OptimRounding[rounding]
        self._step.param = _DTYPES[str(param)[6:]]
        self._step.grad = _DTYPES[str(grad)[6:]]
        self._step.state = _STATE_DTYPES[str(state)[6:]]
        self._step.tensors = self._count
        self._step.host = self._host

    def __dealloc__(self):
        PyMem_Free(self._host)
        PyMem_Free(self._param_seen)

    def set(self, Py_ssize_t i, tuple states, tuple scales, extra, step, product, int group, uint64_t index):
        """What parameter ``i`` has: its states and scalars, tensors or None, which are kept alive."""
        cdef OptimTensor* t = OptimTable(self._host, self._count).tensor() + i
        cdef Py_ssize_t k
        like = self._likes[i]
        t.param = <void*><uintptr_t>like.data_ptr()
        for k in range(len(states)):
            t.state[k] = self._address(states[k])
        for k in range(len(scales)):
            t.scale[k] = <float*>self._address(scales[k])
        t.extra = self._address(extra)
        t.step = <float*>self._address(step)
        t.product = <float*>self._address(product)
        t.numel = like.numel()
        t.group = group
        t.index = <uint32_t>index
        self._param_seen[i] = self._params[i].data_ptr()

    cdef void* _address(self, tensor) except? NULL:
        if tensor is None:
            return NULL
        self._keep.append(tensor)
        return <void*><uintptr_t>tensor.data_ptr()

    def finish(self, memory):
        """After the last ``set``: ``memory`` on the device, of ``bytes`` bytes; None on the CPU."""
        cdef OptimTable table = OptimTable(self._host, self._count)
        table.number_chunks(b"fastkern.optim")
        self.chunks = table.chunks()
        self._memory = memory
        self._step.table = <void*><uintptr_t>memory.data_ptr() if memory is not None else self._host
        self._static_changed = True

    def collect(self, odd):
        """Reads the gradients' addresses; False if a parameter is no longer what it was, or a gradient's type."""
        cdef const void** grads = OptimTable(self._host, self._count).grad()
        cdef _TensorAccess access = self._access
        cdef PyObject* param
        cdef PyObject* seen
        cdef uint64_t address
        cdef Py_ssize_t i
        cdef bint others = False  # have gradients
        # A gradient that was looked at is known again by a weak reference. Where gradients are new in every step, as
        # after zero_grad(), making them costs more than looking again, and so they are made ever more rarely.
        cdef bint watch = self._left == 0, lost = False
        if self._odd:
            self._odd = []
        for i in range(self._count):
            param = PyList_GetItem(self._params, i)
            if access.address_of(param) != self._param_seen[i]:
                return False
            grad = access.grad_of(param)
            if grad is None:
                address = 0
                self._grads[i] = None
            else:
                address = access.address_of(<PyObject*>grad)
                seen = PyList_GetItem(self._grads, i)
                if address != self._grad_seen[i] or seen == <PyObject*>None or (
                        PyWeakref_GetObject(seen) != <PyObject*>grad):
                    lost = lost or seen != <PyObject*>None
                    if access.dtype_of(<PyObject*>grad) is not self._grad_dtype:
                        return False
                    like = self._likes[i]
                    if (grad.is_contiguous() if self._contiguous[i]
                            else like is <object>param and grad.stride() == like.stride()):
                        self._grads[i] = weakref.ref(grad) if watch else None
                    else:  # looked at again in every step
                        grad = odd(grad, like)
                        self._odd.append(grad)
                        self._grads[i] = None
                        address = grad.data_ptr()
            if address == 0 and grad is not None:
                address = 16  # a tensor without elements
            if address != self._grad_seen[i]:
                others = others or address == 0 or self._grad_seen[i] == 0
                self._grad_seen[i] = address
                grads[i] = <const void*><uintptr_t>address
                self._grads_changed = True
        if lost:
            self._patience = min(self._patience + 1, 6)
            self._left = 1 << self._patience
        elif not watch:
            self._left -= 1
        if others:
            self.updated = [self._params[i] for i in range(self._count) if self._grad_seen[i] != 0]
        return True

    def write(self, uint64_t stream):
        """Brings the table on the device up to date, on a CUDA stream."""
        cdef int64_t start = OptimTable.grad_offset(self._count)
        if not self._cuda:
            return
        self._stream.handle = <void*><uintptr_t>stream
        if self._static_changed:
            start = 0
        elif not self._grads_changed or self._count <= kOptimInlineGrads:
            return
        _cuda_write(<char*>self._step.table + start, self._host + start, self.bytes - start, b"fastkern.optim",
                    self._stream)
        self._static_changed = self._grads_changed = False

    def step(self, list groups, uint64_t grad_scale, uint64_t grad_factor, uint64_t found_inf, uint64_t seed,
             uint64_t workspace, uint64_t stream):
        """One step on what was collected. Of ``groups`` each is ``(lr, lr_address, beta1, beta2, eps, weight_decay,
        decay_base, decoupled, nesterov, maximize)``."""
        cdef OptimGroup* group
        cdef Py_ssize_t i
        self._step.op = b"fastkern.optim"
        self._step.groups = <int>len(groups)
        for i in range(len(groups)):
            group = &self._step.group[i]
            lr, address, beta1, beta2, eps, weight_decay, decay_base, decoupled, nesterov, maximize = groups[i]
            group.lr, group.lr_tensor = lr, <const float*><uintptr_t>address
            group.beta1, group.beta2, group.eps, group.weight_decay = beta1, beta2, eps, weight_decay
            group.decay_base = decay_base
            group.decoupled, group.nesterov, group.maximize = decoupled, nesterov, maximize
        self._step.grad_scale = <const float*><uintptr_t>grad_scale
        self._step.grad_factor = <const float*><uintptr_t>grad_factor
        self._step.found_inf = <const float*><uintptr_t>found_inf
        self._step.seed = seed
        self._step.workspace = <float*><uintptr_t>workspace
        self._stream.handle = <void*><uintptr_t>stream
        with nogil:
            if self._cuda:
                _cuda_step(self._step, self._stream)
            else:
                _cpu_step(self._step)

    def use_params_as_grads(self):
        """Lets ``norm`` and ``scale`` work on ``likes``."""
        cdef OptimTable table = OptimTable(self._host, self._count)
        cdef Py_ssize_t i
        for i in range(self._count):
            table.grad()[i] = table.tensor()[i].param

    def use_grads(self, list grads):
        """Takes these tensors as the gradients, their elements in the order of those of ``likes``."""
        cdef OptimTable table = OptimTable(self._host, self._count)
        cdef Py_ssize_t i
        self._keep.append(grads)
        for i in range(self._count):
            table.grad()[i] = <const void*><uintptr_t>(grads[i].data_ptr() or 16)  # 16: a tensor without elements
        self._grads_changed = True
        self.updated = self._params

    def workspace_bytes(self):
        """Bytes of the ``workspace`` of ``step``."""
        return optim_workspace(self._step.kind, self._count, self.chunks)

    def norm(self, bint largest, bint first, bint last, double max_norm, uint64_t grad_scale, uint64_t partials,
             uint64_t sum_, uint64_t norm, uint64_t factor, uint64_t stream):
        """Adds these gradients to a norm; see ``OptimNorm`` in ``fastkern/optim.h``."""
        cdef OptimNorm args
        args.op = b"fastkern.optim"
        args.grad, args.tensors = self._step.grad, self._count
        args.host, args.table = self._host, self._step.table
        args.largest, args.first, args.last = largest, first, last
        args.max_norm = max_norm
        args.grad_scale = <const float*><uintptr_t>grad_scale
        args.partials = <float*><uintptr_t>partials
        args.sum = <double*><uintptr_t>sum_
        args.norm = <float*><uintptr_t>norm
        args.factor = <float*><uintptr_t>factor
        self._stream.handle = <void*><uintptr_t>stream
        with nogil:
            if self._cuda:
                _cuda_norm(args, self._stream)
            else:
                _cpu_norm(args)

    def scale(self, uint64_t factor, uint64_t stream):
        """Multiplies these gradients, in place."""
        cdef OptimScale args
        args.op = b"fastkern.optim"
        args.grad, args.tensors = self._step.grad, self._count
        args.host, args.table = self._host, self._step.table
        args.factor = <const float*><uintptr_t>factor
        self._stream.handle = <void*><uintptr_t>stream
        with nogil:
            if self._cuda:
                _cuda_scale(args, self._stream)
            else:
                _cpu_scale(args)
