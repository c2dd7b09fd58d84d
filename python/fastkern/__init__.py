# SPDX-License-Identifier: Apache-2.0
"""fastkern: hand-written GPU (and CPU) kernels for PyTorch.

``import fastkern`` registers every operator as ``torch.ops.fastkern.*`` and does not initialise CUDA.
The documented Python functions are the same operators with defaults::

    y = fastkern.rms_norm(x, weight)            # or torch.ops.fastkern.rms_norm(x, weight)
"""

from __future__ import annotations

from pathlib import Path

from fastkern import _core
from fastkern._library import load_operators

load_operators(Path(_core.__file__).parent / "lib")

from fastkern.ops.norm import rms_norm  # noqa: E402  (registers fakes and gradients of loaded operators)

__version__: str = _core.build_info()["version"]

__all__ = ["__version__", "get_cmake_dir", "get_include", "get_library_dir", "rms_norm"]


def get_library_dir() -> str:
    """Directory of ``libfastkern.so`` and ``libfastkern_torch.so``."""
    return str(Path(_core.__file__).parent / "lib")


def get_include() -> str:
    """Directory to put on a C++ compiler's include path; headers are ``fastkern/*.h``."""
    return str(Path(_core.__file__).parent / "include")


def get_cmake_dir() -> str:
    """Directory for ``find_package(fastkern CONFIG PATHS ...)``."""
    return str(Path(_core.__file__).parent / "lib" / "cmake" / "fastkern")
