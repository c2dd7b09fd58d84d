# SPDX-License-Identifier: Apache-2.0
"""Compares a benchmark document with the stored one and fails on what became slower.

    python -m fastkern.bench --json new.json
    python tools/compare_bench.py new.json docs/bench_baseline.json [--tolerance 5]

Times are compared relative to the copy bandwidth of their own run where both measured it, so that the
clocks of the day matter less. ``--update`` writes the new document over the stored one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

SCHEMA = "fastkern-bench/1"
OURS = "fastkern"


def measurements(document: dict[str, Any]) -> dict[tuple[str, ...], float]:
    """Microseconds of our own kernels at one TB/s of copy bandwidth, by operator, size, dtype and direction."""
    if document.get("schema") != SCHEMA:
        raise SystemExit(f"not a {SCHEMA} document")
    scale = document["ceiling"]["copy_gbps"] / 1e3
    return {
        (record["op"], record["size"], record["dtype"], record["direction"]): record["us"] * scale
        for record in document["records"]
        if record["provider"] == OURS and record["us"] is not None
    }


def main() -> int:
    """Print what changed by more than the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("new", type=Path)
    parser.add_argument("stored", type=Path)
    parser.add_argument("--tolerance", type=float, default=5.0, help="percent")
    parser.add_argument("--update", action="store_true")
    options = parser.parse_args()
    if options.update or not options.stored.exists():
        shutil.copy(options.new, options.stored)
        print(f"{options.stored} written")
        return 0

    new = measurements(json.loads(options.new.read_text()))
    stored = measurements(json.loads(options.stored.read_text()))
    shared = sorted(new.keys() & stored.keys())
    slower = 0
    for key in shared:
        change = 100 * (new[key] / stored[key] - 1)
        if abs(change) > options.tolerance:
            word = "slower" if change > 0 else "faster"
            print(f"{' '.join(key)}: {abs(change):.1f} % {word}")
            slower += change > 0
    lost = sorted(stored.keys() - new.keys())
    for key in lost:
        print(f"{' '.join(key)}: no longer measured")
    print(f"{len(shared)} compared, {slower} slower by more than {options.tolerance:g} %, {len(lost)} lost")
    return int(slower > 0 or bool(lost) or not shared)


if __name__ == "__main__":
    sys.exit(main())
