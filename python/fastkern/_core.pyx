# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""What the compiled library knows and Python wants to know; importing it does not touch CUDA."""

from libc.stdint cimport int64_t

_DTYPES = {"float32": DType.f32, "float16": DType.f16, "bfloat16": DType.bf16}
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
