# SPDX-License-Identifier: Apache-2.0
"""Stands in for the CUDA packages of a torch that was installed without them, for use on a CPU.

Each missing library becomes an empty one next to torch's own. Every function in it answers "no device".
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

NO_DEVICE = 100  # cudaErrorNoDevice, CUDA_ERROR_NO_DEVICE


OURS = re.compile(r"(?:cu|nv|nccl|__cuda)[A-Za-z_0-9]*$")


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _symbols(library: Path, option: str) -> set[tuple[str, str]]:
    """Names and versions of a library's undefined or defined symbols."""
    lines = _output("nm", "-D", option, str(library)).splitlines()
    return {(name, version.lstrip("@")) for name, _, version in (line.split()[-1].partition("@") for line in lines)}


def _required_versions(library: Path) -> dict[str, set[str]]:
    """Which symbol versions a library asks of which other library."""
    required: dict[str, set[str]] = {}
    section = _output("objdump", "-p", str(library)).partition("Version References:")[2]
    name = ""
    for line in section.splitlines():
        if found := re.match(r"\s+required from (\S+):", line):
            name = found[1]
        elif len(fields := line.split()) == 4:
            required.setdefault(name, set()).add(fields[3])
    return required


def _compile(target: Path, symbols: set[tuple[str, str]], versions: set[str]) -> None:
    names = sorted({name for name, version in symbols if not version or version in versions})
    options = ["-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{target.name}"]
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "empty.c"
        source.write_text("".join(f"int {name}(void) {{ return {NO_DEVICE}; }}\n" for name in names))
        if versions:
            script = Path(scratch) / "empty.map"
            text = ""
            for version in sorted(versions):
                members = "".join(f"{name}; " for name, wanted in sorted(symbols) if wanted == version)
                text += f"{version} {{ {'global: ' + members if members else ''}}};\n"
            script.write_text(text)
            options.append(f"-Wl,--version-script={script}")
        subprocess.run(["gcc", *options, str(source), "-o", str(target)], check=True)


def add_empty_cuda_libraries(environment: Path) -> list[str]:
    """Add what the torch of ``environment`` needs and does not find; returns the names."""
    directory = next(environment.glob("lib/python3*/site-packages/torch/lib"))
    libraries = sorted(directory.glob("*.so*"))
    present = {library.name for library in libraries}
    needed: set[str] = set()
    wanted: set[tuple[str, str]] = set()
    defined: set[str] = set()
    versions: dict[str, set[str]] = {}
    for library in libraries:
        needed |= set(re.findall(r"NEEDED\).*\[(.+)\]", _output("readelf", "-dW", str(library))))
        wanted |= _symbols(library, "--undefined-only")
        defined |= {name for name, _ in _symbols(library, "--defined-only")}
        for name, asked in _required_versions(library).items():
            versions.setdefault(name, set()).update(asked)
    missing = sorted(name for name in needed - present if re.match(r"lib(?:cu|nv|nccl)", name))
    symbols = {(name, version) for name, version in wanted if name not in defined and OURS.match(name)}
    for name in missing:
        _compile(directory / name, symbols, versions.get(name, set()))
    return missing
