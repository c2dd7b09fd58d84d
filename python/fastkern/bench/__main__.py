# SPDX-License-Identifier: Apache-2.0
"""``python -m fastkern.bench``; see ``--help``."""

import sys

try:
    from fastkern.bench.cli import app
except ModuleNotFoundError as error:
    if error.name not in {"rich", "typer"}:
        raise
    sys.exit(f"python -m fastkern.bench needs {error.name}: pip install fastkern[bench]")

app(prog_name="python -m fastkern.bench")
