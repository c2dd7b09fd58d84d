# SPDX-License-Identifier: Apache-2.0
"""Rewrites cmake/torch_shim_symbols.txt, the C functions that torch 2.10's stable ABI offers.

Any torch from 2.10 on gives the same list, because its headers guard what is newer::

    python tools/torch_shim_symbols.py /path/to/site-packages/torch/include
    python tools/torch_shim_symbols.py --check ...     only compares
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

LIST = Path(__file__).resolve().parent.parent / "cmake" / "torch_shim_symbols.txt"
HEADERS = ("torch/csrc/inductor/aoti_torch/c/shim.h", "torch/csrc/stable/c/shim.h")
TARGET = "0x020a000000000000ULL"
TITLE = "# C shim of libtorch_cpu, torch 2.10. Written by tools/torch_shim_symbols.py."


def shim_symbols(include: Path) -> list[str]:
    """Names of the functions that the headers declare for torch 2.10."""
    source = "".join(f"#include <{header}>\n" for header in HEADERS)
    command = ["g++", "-std=c++20", "-E", "-P", f"-DTORCH_TARGET_VERSION={TARGET}", f"-I{include}", "-x", "c++", "-"]
    text = subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout
    names = set(re.findall(r"\b((?:aoti|torch)_\w+)\s*\(", text))
    # Declared and deleted, to catch a misuse.
    return sorted(names - set(re.findall(r"\b(\w+)\s*\(\s*\)\s*=\s*delete", text)))


def main() -> int:
    """Write the list, or compare it with what the headers say."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--check"]
    if len(arguments) != 1:
        print(__doc__)
        return 2
    text = "\n".join([TITLE, *shim_symbols(Path(arguments[0]))]) + "\n"
    if "--check" in sys.argv:
        same = LIST.read_text() == text
        print(f"{LIST.name}: {'agrees with' if same else 'differs from'} {arguments[0]}")
        return int(not same)
    LIST.write_text(text)
    print(f"{LIST.name}: {len(text.splitlines()) - 1} functions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
