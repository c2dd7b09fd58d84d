# SPDX-License-Identifier: Apache-2.0
"""Checks a built wheel: tag, size, contents, limited API, system symbol versions, exported symbols.

Usage::

    python tools/check_wheel.py dist/fastkern-*.whl [--archs "80 90a 100 120"]
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

TAG = "cp310-abi3-manylinux_2_28_x86_64"
MAX_MEGABYTES = 60
# The oldest system that manylinux_2_28 stands for.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}
LIBRARIES = {
    "fastkern/lib/libfastkern.so": r"(vtable for |typeinfo (name )?for )?fastkern::",
    "fastkern/lib/libfastkern_torch.so": r"fastkern_\w+$",
    "fastkern/_core.abi3.so": r"PyInit__core$",
}
CONTENTS = [
    *LIBRARIES,
    "fastkern/__init__.py",
    "fastkern/py.typed",
    "fastkern/include/fastkern/core.h",
    "fastkern/include/fastkern/cuda/elementwise/pointwise.cuh",
    "fastkern/lib/cmake/fastkern/fastkernConfig.cmake",
]
# Sources; but headers for users' own kernels belong there.
FOREIGN = re.compile(r"\.(pyx|pxd|cu|cpp|o|a)$|^(?!fastkern/include/).*\.cuh$|^tests/|__pycache__")
NEEDED = {
    "libc.so.6",
    "libdl.so.2",
    "libfastkern.so",
    "libgcc_s.so.1",
    "libm.so.6",
    "libpthread.so.0",
    "librt.so.1",
    "libstdc++.so.6",
    "libtorch_cpu.so",
    "ld-linux-x86-64.so.2",
}


def output(*command: str) -> str:
    """Standard output of a command."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def check_library(path: Path, pattern: str) -> list[str]:
    """Problems of one shared library."""
    found = []
    exported = [line.split(maxsplit=2)[-1] for line in output("nm", "-DC", "--defined-only", str(path)).splitlines()]
    stray = [name for name in exported if not re.match(pattern, name)]
    if stray:
        found.append(f"{path.name} exports {len(stray)} foreign symbols, such as {stray[0]}")
    dynamic = output("readelf", "-dW", str(path))
    for library in re.findall(r"NEEDED\).*\[(.+)\]", dynamic):
        if library not in NEEDED:
            found.append(f"{path.name} needs {library}")
    for entry in re.findall(r"R(?:UN)?PATH\).*\[(.+)\]", dynamic):
        if not entry.startswith("$ORIGIN"):
            found.append(f"{path.name} has the run path {entry}")
    for family, numbers in set(re.findall(r"\((GLIBC|GLIBCXX|CXXABI)_([\d.]+)\)", output("objdump", "-T", str(path)))):
        if tuple(int(part) for part in numbers.split(".")) > NEWEST[family]:
            found.append(f"{path.name} needs {family}_{numbers}")
    if b"/tmp/" in path.read_bytes() or str(Path.home()).encode() + b"/" in path.read_bytes():
        found.append(f"{path.name} holds a path of the build machine")
    return found


def architectures(library: Path) -> list[str] | None:
    """Architectures with machine code in the library; None if there is no cuobjdump to ask."""
    wheels = Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/cuobjdump")
    tool = shutil.which("cuobjdump") or next(wheels, None)
    if tool is None:
        return None
    # It fails on a library without any.
    listing = subprocess.run([str(tool), "--list-elf", str(library)], capture_output=True, text=True).stdout
    return sorted(set(re.findall(r"\.sm_(\w+)\.cubin", listing)), key=lambda name: int(re.sub(r"\D", "", name)))


def main() -> int:
    """Print each check's outcome."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--archs", default="", help="architectures that must be inside")
    options = parser.parse_args()
    wheel: Path = options.wheel
    problems = []

    if not wheel.name.endswith(f"{TAG}.whl"):
        problems.append(f"the tag is not {TAG}: {wheel.name}")
    size = wheel.stat().st_size / 1e6
    if size > MAX_MEGABYTES:
        problems.append(f"{size:.1f} MB, the limit is {MAX_MEGABYTES} MB")

    with tempfile.TemporaryDirectory() as directory:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            archive.extractall(directory)
        problems += [f"{name} is missing" for name in CONTENTS if name not in names]
        problems += [f"{name} does not belong in a wheel" for name in names if FOREIGN.search(name)]
        for name, pattern in LIBRARIES.items():
            if name in names:
                problems += check_library(Path(directory) / name, pattern)
        inside = architectures(Path(directory) / "fastkern/lib/libfastkern.so")
    missing = [arch for arch in options.archs.split() if inside is not None and arch not in inside]
    if missing:
        problems.append(f"no machine code for {', '.join(missing)}")

    limited = [sys.executable, "-m", "abi3audit", "--strict", "--verbose", str(wheel)]
    audit = subprocess.run(limited, capture_output=True, text=True)
    if audit.returncode:
        problems.append(f"abi3audit: {(audit.stdout + audit.stderr).strip()}")

    found = "(no cuobjdump)" if inside is None else " ".join(inside) or "no GPU"
    for problem in problems:
        print(f"FAIL {problem}")
    print(f"{wheel.name}: {size:.1f} MB, {len(names)} files, machine code for {found}")
    print("wheel: all checks passed" if not problems else f"wheel: {len(problems)} problems")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
