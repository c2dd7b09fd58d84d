# SPDX-License-Identifier: Apache-2.0
"""CUDA compile gate: compiles every kernel for sm_90a and sm_80 and reads ptxas's report.

Fails when a kernel spills registers that is not named in tools/spills_allowed.txt, when ptxas
serialised wgmma instructions, or when a compilation fails. Needs no GPU. A build tree that already
holds an architecture's objects is used as it is; the others get trees of their own::

    python tools/check_cuda_build.py [--all] [--tree 90a=build/editable] [90a 80 ...]

tools/compiled.txt names what has passed: an architecture, a source and a hash of all that it is compiled from. For
an architecture without a tree only sources that are not there are compiled. ``--fresh`` compiles all, ``--record``
writes down what passed.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

from ptxas_report import Kernel, demangle, read_report

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = ROOT / "tools" / "spills_allowed.txt"
RECORD = ROOT / "tools" / "compiled.txt"
TARGETS = ("fastkern_cuda", "fastkern_cuda_sm90")

# ---- what has passed before ------------------------------------------------------------------------------------------


@cache
def includes(path: Path) -> frozenset[Path]:
    """A file and all of the project's that it includes."""
    found = {path}
    for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE):
        for root in (path.parent, ROOT / "cuda", ROOT / "cpp" / "include"):
            if (root / name).is_file():
                found |= includes((root / name).resolve())
                break
    return frozenset(found)


@cache
def compiler() -> str:
    """The compiler's release, and how it is called."""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    flags = (ROOT / "cmake" / "FastkernCuda.cmake").read_text()
    return "".join(re.findall(r"release [\d.]+", said)) + flags


def digest(source: Path) -> str:
    """Of all that an object is made from."""
    total = hashlib.sha256(compiler().encode())
    for path in sorted(includes(source)):
        total.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:20]


def sources(architecture: str) -> list[Path]:
    """Every source that has code for an architecture."""
    return [p for p in sorted(ROOT.glob("cuda/*/*.cu")) if architecture == "90a" or not p.stem.endswith("_sm90")]


def line_of(architecture: str, source: Path) -> str:
    """As it stands in the record."""
    return f"sm_{architecture} {source.relative_to(ROOT)} {digest(source)}"


def record(architectures: list[str]) -> None:
    """Write down that all sources passed for these architectures."""
    text = RECORD.read_text().splitlines() if RECORD.exists() else []
    head = [line for line in text if line.startswith("#")]
    kept = [line for line in text if line and not line.startswith(("#", *(f"sm_{a} " for a in architectures)))]
    new = [line_of(a, source) for a in architectures for source in sources(a)]
    RECORD.write_text("\n".join([*head, *sorted({*kept, *new})]) + "\n")


# ---- compiling -------------------------------------------------------------------------------------------------------


def configured_for(tree: Path) -> list[str]:
    """The architectures an existing tree compiles; empty if there is no such tree."""
    cache = tree / "CMakeCache.txt"
    if not cache.exists():
        return []
    for line in cache.read_text().splitlines():
        if line.startswith("CMAKE_CUDA_ARCHITECTURES:"):
            return line.split("=", 1)[1].split(";")
    return []


def build(architecture: str, tree: Path, jobs: int, only: list[Path] | None) -> None:
    """Compile the kernels of one architecture, or some of its sources; quick where little changed."""
    if architecture not in configured_for(tree):
        command = ["cmake", "-S", str(ROOT), "-B", str(tree), "-G", "Ninja", "-DFASTKERN_CUDA=on"]
        options = [f"-DCMAKE_CUDA_ARCHITECTURES={architecture}", "-DFASTKERN_TORCH=OFF", "-DFASTKERN_TESTS=OFF"]
        subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
    targets = ["fastkern_kernels"] if only is None else [object_of(source) for source in only]
    command = ["cmake", "--build", str(tree), "--parallel", str(jobs), "--target", *targets]
    built = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if built.returncode:
        print(built.stdout)
        raise SystemExit(f"the kernels do not compile for sm_{architecture}")


def object_of(source: Path) -> str:
    """The name that the build has for it."""
    library = TARGETS[source.stem.endswith("_sm90")]
    return f"CMakeFiles/{library}.dir/{source.relative_to(ROOT)}.o"


def current_reports(tree: Path, only: list[Path] | None) -> list[Path]:
    """Reports of the sources that exist, not of ones since removed; or of some sources."""
    reports = []
    for name in TARGETS:
        directory = tree / "CMakeFiles" / f"{name}.dir"
        for report in sorted(directory.rglob("*.ptxas")):
            source = ROOT / report.relative_to(directory).as_posix().removesuffix(".o.ptxas")
            if source.exists() and report.with_suffix("").exists() and (only is None or source in only):
                reports.append(report)
    return reports


def collect(architecture: str, tree: Path, only: list[Path] | None) -> tuple[list[Kernel], list[str]]:
    """Kernels and warnings of one architecture."""
    kernels: list[Kernel] = []
    warnings: list[str] = []
    for report in current_reports(tree, only):
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
    parser.add_argument("--fresh", action="store_true", help="compile what has passed before as well")
    parser.add_argument("--record", action="store_true", help="write down what passed, if all did")
    parser.add_argument("--all", action="store_true", help="one line for each template instance")
    options = parser.parse_args()
    trees = dict(entry.split("=", 1) for entry in options.tree)
    lines = ALLOWED.read_text().splitlines() if ALLOWED.exists() else []
    allowed = [line.strip() for line in lines if line.strip() and not line.startswith("#")]

    bad = 0
    passed = set() if options.fresh or not RECORD.exists() else set(RECORD.read_text().splitlines())
    for architecture in options.architectures:
        tree, only = Path(trees.get(architecture, "")), None
        if architecture not in trees or architecture not in configured_for(tree):
            tree = ROOT / "build" / f"gate-{architecture}"
            every = sources(architecture)
            only = [source for source in every if line_of(architecture, source) not in passed]
            print(f"sm_{architecture}: {len(every) - len(only)} of {len(every)} sources have passed as they are")
            if not only:
                continue
        build(architecture, tree, options.jobs, only)
        kernels, warnings = collect(architecture, tree, only)
        if not kernels and only is None:
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
        most = max((kernel.registers for kernel in kernels), default=0)
        count = f"{len(kernels)} kernels, at most {most} registers"
        print(f"sm_{architecture}: {count}, {len(spilling)} spill beyond what is allowed")
    if options.record and not bad:
        record(options.architectures)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
