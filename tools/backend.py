# SPDX-License-Identifier: Apache-2.0
"""The build backend: scikit-build-core, plus nvcc from the package registry when there is none.

pip asks a backend what a build needs. When CUDA kernels are wanted and no nvcc >= 12.8 is on the
machine, the answer includes the compiler's wheels (about 100 MB). FASTKERN_CUDA=off avoids that.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from scikit_build_core import build as _build
from scikit_build_core.build import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

NVCC_MINIMUM = (12, 8)
NVCC_WHEELS = "cuda-toolkit[nvcc,cudart,cccl]==13.0.*"


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """What a wheel build needs besides ``build-system.requires``."""
    _insist_on_torch(config_settings or {})
    return [*_build.get_requires_for_build_wheel(config_settings), *_compiler(config_settings)]


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    """What an editable build needs besides ``build-system.requires``."""
    _insist_on_torch(config_settings or {})
    return [*_build.get_requires_for_build_editable(config_settings), *_compiler(config_settings)]


def _insist_on_torch(settings: dict[str, Any]) -> None:
    """Say it now that torch's headers are missing, before pip downloads torch only to fail afterwards."""
    named = "cmake.define.FASTKERN_TORCH_INCLUDE" in settings or "FASTKERN_TORCH_INCLUDE" in os.environ
    if named or "FASTKERN_TORCH_INCLUDE" in os.environ.get("CMAKE_ARGS", ""):
        return
    finder = Path(__file__).resolve().parent.parent / "cmake" / "find_torch_include.py"
    if not subprocess.run([sys.executable, str(finder)], capture_output=True, text=True).stdout.strip():
        raise SystemExit(
            "\nfastkern: building from source needs the headers of torch >= 2.10, and this Python has no torch.\n"
            'Install it first (python -m pip install "torch>=2.10"), then build again; or name the headers with\n'
            "the environment variable FASTKERN_TORCH_INCLUDE=/path/to/site-packages/torch/include.\n"
        )


def _compiler(config_settings: dict[str, Any] | None) -> list[str]:
    return [] if _cuda_is_off(config_settings or {}) or _system_nvcc() else [NVCC_WHEELS]


def _cuda_is_off(settings: dict[str, Any]) -> bool:
    define = re.search(r"-DFASTKERN_CUDA(?::\w+)?=(\w+)", os.environ.get("CMAKE_ARGS", ""))
    wishes = [
        settings.get("cmake.define.FASTKERN_CUDA"),
        os.environ.get("FASTKERN_CUDA"),
        define and define.group(1),
    ]
    wish = next((str(wish) for wish in wishes if wish), "auto")
    return wish.lower() in {"off", "0", "no", "false"}


def _system_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc")]
    candidates += [os.path.join(home, "bin", "nvcc") for home in homes if home]
    for nvcc in candidates:
        if nvcc and os.path.exists(nvcc):
            text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
            found = re.search(r"release (\d+)\.(\d+)", text)
            if found and (int(found[1]), int(found[2])) >= NVCC_MINIMUM:
                return nvcc
    return None
