# SPDX-License-Identifier: Apache-2.0
"""Rules about files that no linter knows: length, the SPDX line, no leftover notes, no stray binaries."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {".h", ".cpp", ".cu", ".cuh", ".py", ".pyx", ".pxd", ".cmake", ".sh"}
AIM = 300
LIMIT = 600
MAX_BYTES = 1_000_000
LEFTOVER = re.compile(r"\b(TODO|FIXME|XXX)\b(?!\(#\d+\))")


def tracked() -> list[Path]:
    """The files git knows or would add; without git, everything outside hidden and build directories."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode == 0:
        names = listing.stdout.splitlines()
        return [ROOT / name for name in names if (ROOT / name).is_file()]
    skipped = {"build", "dist"}
    found = [path for path in ROOT.rglob("*") if path.is_file()]
    return [
        path
        for path in found
        if not any(part in skipped or part.startswith(".venv") for part in path.relative_to(ROOT).parts)
    ]


def problems(path: Path) -> list[str]:
    """What is wrong with one file, in words."""
    if path.stat().st_size > MAX_BYTES:
        return [f"{path.stat().st_size} bytes: too large for the repository"]
    if path.suffix not in SOURCES:
        return []
    text = path.read_text()
    lines = text.splitlines()
    found = []
    if len(lines) > LIMIT:
        found.append(f"{len(lines)} lines: above {LIMIT} a file is two ideas")
    if lines and not any("SPDX-License-Identifier: Apache-2.0" in line for line in lines[:3]):
        found.append("no SPDX line at the top")
    if path.name != Path(__file__).name:
        for number, line in enumerate(lines, 1):
            if LEFTOVER.search(line):
                found.append(f"line {number}: a leftover note without an issue")
    return found


def main() -> int:
    """Report every problem; files above the aim are named without failing."""
    failed = False
    for path in tracked():
        name = path.relative_to(ROOT)
        for problem in problems(path):
            print(f"{name}: {problem}")
            failed = True
        if path.suffix in SOURCES:
            count = len(path.read_text().splitlines())
            if AIM < count <= LIMIT:
                print(f"note: {name} has {count} lines, the aim is at most {AIM}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
