# SPDX-License-Identifier: Apache-2.0
"""Reads what ptxas said about each kernel: the ``.ptxas`` files that a build leaves beside its objects."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

# wgmma instructions that ptxas had to serialise: the kernel runs, at a fraction of its speed.
SERIALISED = re.compile(r"C75(?:10|15|17|19)|wgmma.*serializ", re.IGNORECASE)

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_PROPERTIES = re.compile(r"Function properties for (\w+)")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass
class Kernel:
    """One kernel for one architecture."""

    symbol: str
    architecture: str
    source: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    name: str = ""

    @property
    def spills(self) -> bool:
        """Whether registers went to memory."""
        return self.spill_stores + self.spill_loads > 0


def read_report(path: Path) -> tuple[list[Kernel], list[str]]:
    """Kernels and serialisation warnings of one report."""
    source = path.name.removesuffix(".ptxas").removesuffix(".o")
    kernels: list[Kernel] = []
    warnings: list[str] = []
    inside = ""
    for line in path.read_text().splitlines():
        if SERIALISED.search(line):
            warnings.append(f"{source}: {line.strip()}")
        elif found := _ENTRY.search(line):
            kernels.append(Kernel(found[1], found[2], source))
            inside = found[1]
        elif found := _PROPERTIES.search(line):
            inside = found[1]
        elif kernels and inside == kernels[-1].symbol and (found := _SPILLS.search(line)):
            kernel = kernels[-1]
            kernel.stack, kernel.spill_stores, kernel.spill_loads = (int(part) for part in found.groups())
        elif kernels and (found := _USED.search(line)):
            kernels[-1].registers = int(found[1])
            shared = _SHARED.search(line)
            kernels[-1].shared = int(shared[1]) if shared else 0
    return kernels, warnings


def demangle(kernels: list[Kernel]) -> None:
    """Fill in the readable names."""
    if not kernels:
        return
    symbols = "\n".join(kernel.symbol for kernel in kernels)
    output = subprocess.run(["c++filt"], input=symbols, capture_output=True, text=True, check=True)
    for kernel, name in zip(kernels, output.stdout.splitlines(), strict=True):
        # A kernel is told apart by its name and template arguments, not by its parameters.
        short = re.sub(r"^(?:void|auto) ", "", name)
        short = re.sub(r"\(anonymous namespace\)::|\w*_GLOBAL__N_\w*::", "", short)
        short = re.sub(r"\b(?:fastkern|cuda)::", "", short)
        kernel.name = _without_parameters(short)


def _without_parameters(name: str) -> str:
    depth = 0
    for position, letter in enumerate(name):
        if letter in "<>":
            depth += 1 if letter == "<" else -1
        elif letter == "(" and depth == 0:
            return name[:position]
    return name
