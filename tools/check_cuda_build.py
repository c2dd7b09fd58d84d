# SPDX-License-Identifier: Apache-2.0
"""CUDA compile gate: compiles every kernel for sm_90a and sm_80 and reads ptxas's report.

Fails when a kernel spills registers that is not named in tools/spills_allowed.txt, when ptxas
serialised wgmma instructions, or when a compilation fails. Needs no GPU. A build tree that already
holds an architecture's objects is used as it is; the others get trees of their own::

    python tools/check_cuda_build.py [--all] [--tree 90a=build/editable] [90a 80 ...]
"""

from __future__ import annotations

import argparse
import fnmatch
import subprocess
import sys
from pathlib import Path

from ptxas_report import Kernel, demangle, read_report

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = ROOT / "tools" / "spills_allowed.txt"
TARGETS = ("fastkern_cuda", "fastkern_cuda_sm90")


def configured_for(tree: Path) -> list[str]:
    """The architectures an existing tree compiles; empty if there is no such tree."""
    cache = tree / "CMakeCache.txt"
    if not cache.exists():
        return []
    for line in cache.read_text().splitlines():
        if line.startswith("CMAKE_CUDA_ARCHITECTURES:"):
            return line.split("=", 1)[1].split(";")
    return []


def build(architecture: str, tree: Path, jobs: int) -> None:
    """Compile the kernels of one architecture; quick where little changed."""
    if architecture not in configured_for(tree):
        command = ["cmake", "-S", str(ROOT), "-B", str(tree), "-G", "Ninja", "-DFASTKERN_CUDA=on"]
        options = [f"-DCMAKE_CUDA_ARCHITECTURES={architecture}", "-DFASTKERN_TORCH=OFF", "-DFASTKERN_TESTS=OFF"]
        subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
    command = ["cmake", "--build", str(tree), "--parallel", str(jobs), "--target", "fastkern_kernels"]
    built = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if built.returncode:
        print(built.stdout)
        raise SystemExit(f"the kernels do not compile for sm_{architecture}")


def current_reports(tree: Path) -> list[Path]:
    """Reports of the sources that exist, not of ones since removed."""
    reports = []
    for name in TARGETS:
        directory = tree / "CMakeFiles" / f"{name}.dir"
        for report in sorted(directory.rglob("*.ptxas")):
            source = ROOT / report.relative_to(directory).as_posix().removesuffix(".o.ptxas")
            if source.exists() and report.with_suffix("").exists():
                reports.append(report)
    return reports


def collect(architecture: str, tree: Path) -> tuple[list[Kernel], list[str]]:
    """Kernels and warnings of one architecture."""
    kernels: list[Kernel] = []
    warnings: list[str] = []
    for report in current_reports(tree):
        found, said = read_report(report)
        kernels += [kernel for kernel in found if kernel.architecture == f"sm_{architecture}"]
        warnings += said
    demangle(kernels)
    return sorted(kernels, key=lambda kernel: (kernel.source, kernel.name)), warnings


def table(kernels: list[Kernel], every: bool) -> None:
    """Print registers, shared memory, stack and spills: a line a kernel, or one a template."""
    groups: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault(kernel.name if every else kernel.name.split("<")[0], []).append(kernel)
    print(f"  {'variants':>8} {'registers':>9} {'shared':>11} {'stack':>6} {'spilled':>7}  kernel")
    for name, group in groups.items():
        registers = span([kernel.registers for kernel in group])
        shared = span([kernel.shared for kernel in group])
        stack = max(kernel.stack for kernel in group)
        spilled = max(kernel.spill_stores + kernel.spill_loads for kernel in group)
        print(f"  {len(group):>8} {registers:>9} {shared:>11} {stack:>6} {spilled:>7}  {name}")


def span(values: list[int]) -> str:
    """The range of some numbers."""
    return str(min(values)) if min(values) == max(values) else f"{min(values)}-{max(values)}"


def main() -> int:
    """Run the gate for each architecture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architectures", nargs="*", default=["90a", "80"])
    parser.add_argument("--tree", action="append", default=[], help="ARCH=DIRECTORY of an existing build")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--all", action="store_true", help="one line for each template instance")
    options = parser.parse_args()
    trees = dict(entry.split("=", 1) for entry in options.tree)
    lines = ALLOWED.read_text().splitlines() if ALLOWED.exists() else []
    allowed = [line.strip() for line in lines if line.strip() and not line.startswith("#")]

    bad = 0
    for architecture in options.architectures:
        tree = Path(trees.get(architecture, ROOT / "build" / f"gate-{architecture}"))
        if architecture not in configured_for(tree):
            tree = ROOT / "build" / f"gate-{architecture}"
        build(architecture, tree, options.jobs)
        kernels, warnings = collect(architecture, tree)
        if not kernels:
            print(f"sm_{architecture}: no kernels found in {tree}")
            bad += 1
            continue
        print(f"sm_{architecture}:")
        table(kernels, options.all)
        spilling = [
            kernel
            for kernel in kernels
            if kernel.spills and not any(fnmatch.fnmatch(kernel.name, pattern) for pattern in allowed)
        ]
        for kernel in spilling:
            print(f"FAIL sm_{architecture}: {kernel.name} spills {kernel.spill_stores} + {kernel.spill_loads} bytes")
        for warning in warnings:
            print(f"FAIL sm_{architecture}: wgmma serialised, {warning}")
        garbled = [kernel for kernel in kernels if kernel.registers == 0]
        if garbled:
            print(f"FAIL sm_{architecture}: no register count for {garbled[0].name} in its report")
        bad += len(spilling) + len(warnings) + len(garbled)
        most = max(kernel.registers for kernel in kernels)
        count = f"{len(kernels)} kernels, at most {most} registers"
        print(f"sm_{architecture}: {count}, {len(spilling)} spill beyond what is allowed")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
