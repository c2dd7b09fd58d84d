# SPDX-License-Identifier: Apache-2.0
"""Loading the operator library into torch."""

from __future__ import annotations

from pathlib import Path

import torch

MINIMUM_TORCH = (2, 10)


def load_operators(directory: Path) -> None:
    """Load ``libfastkern_torch.so`` from ``directory``, or say in words why that cannot work.

    Raises:
        ImportError: torch is older than 2.10, or the library is missing or does not load.
    """
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < MINIMUM_TORCH:
        raise ImportError(f"fastkern needs torch >= 2.10, found torch {torch.__version__}: upgrade torch")
    path = directory / "libfastkern_torch.so"
    if not path.exists():
        raise ImportError(f"fastkern: {path} is missing: the installation is incomplete, reinstall fastkern")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(f"fastkern: {path} does not load with torch {torch.__version__}: {error}") from error
