# SPDX-License-Identifier: Apache-2.0
"""Installs the requirements of one of pyproject.toml's extras, without building the package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Install the extras named on the command line into this interpreter's environment."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [requirement for name in sys.argv[1:] for requirement in extras[name]]
    print("== installing", *sys.argv[1:], flush=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    return subprocess.run([*pip, *wanted]).returncode


if __name__ == "__main__":
    sys.exit(main())
