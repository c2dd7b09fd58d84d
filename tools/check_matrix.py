# SPDX-License-Identifier: Apache-2.0
"""Tries one wheel on many Pythons and torches, and prints a table.

Each combination of --python and --torch gets an environment of its own under --work; environments that
exist already are named with --env. Without a GPU the many gigabytes of CUDA packages are left out: empty
libraries take their place, which is enough for the CPU::

    python tools/check_matrix.py dist/*.whl --python python3.10 python3.12 --torch 2.10.0 2.15.0
    python tools/check_matrix.py dist/*.whl --env /opt/other/venv --tests "tests/test_ops.py -q"
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from empty_cuda_libraries import add_empty_cuda_libraries

ROOT = Path(__file__).resolve().parent.parent
# What torch imports of what it depends on.
TORCH_NEEDS = ["filelock", "typing_extensions", "sympy", "networkx", "jinja2", "fsspec", "numpy", "setuptools"]
TEST_NEEDS = ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis"]


@dataclass
class Outcome:
    """One row of the table."""

    python: str
    torch: str
    device: str = "-"
    smoke: str = "-"
    tests: str = "-"

    @property
    def failed(self) -> bool:
        """Whether anything that ran did not pass."""
        return not self.smoke.startswith("ok") or not (self.tests == "-" or "passed" in self.tests)


def last_line(process: subprocess.CompletedProcess[str]) -> str:
    """The last line that a process printed."""
    lines = (process.stdout + process.stderr).strip().splitlines()
    return lines[-1] if lines else f"exit status {process.returncode}"


def run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command outside the source tree, so that only the installed package can be found."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run([*map(str, command)], cwd=cwd or "/", env=clean, capture_output=True, text=True)


def make_environment(directory: Path, python: str, torch: str, gpu: bool) -> Path:
    """A virtual environment with one torch; kept and reused."""
    interpreter = directory / "bin" / "python"
    if (directory / "ready").exists():
        return interpreter
    shutil.rmtree(directory, ignore_errors=True)
    steps: list[list[str | Path]] = [[python, "-m", "venv", directory]]
    pip = [interpreter, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    if gpu:
        steps.append([*pip, f"torch=={torch}", "numpy"])
    else:
        steps.append([*pip, *TORCH_NEEDS])
        steps.append([*pip, "--no-deps", "--no-cache-dir", f"torch=={torch}"])
    for step in steps:
        done = run(*step)
        if done.returncode:
            raise RuntimeError(last_line(done))
    if not gpu:
        add_empty_cuda_libraries(directory)
    (directory / "ready").touch()
    return interpreter


def try_wheel(interpreter: Path, wheel: Path, tests: str, outcome: Outcome) -> None:
    """Install the wheel, run the smoke test and, if asked for, tests of the source tree."""
    pip = [interpreter, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    done = run(*pip, "--no-deps", "--force-reinstall", wheel)
    if done.returncode:
        outcome.smoke = f"install: {last_line(done)}"
        return
    done = run(interpreter, ROOT / "tools" / "smoke.py")
    if done.returncode:
        outcome.smoke = last_line(done)
        return
    outcome.python, outcome.torch, outcome.device, outcome.smoke = last_line(done).split("|")
    if tests:
        run(*pip, *TEST_NEEDS)
        with tempfile.TemporaryDirectory() as directory:
            # Only the tests travel, not the package's sources.
            for name in ("tests", "pyproject.toml"):
                source = ROOT / name
                target = Path(directory) / name
                shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
            done = run(interpreter, "-m", "pytest", *tests.split(), cwd=Path(directory))
        outcome.tests = last_line(done).strip("= ")
        if done.returncode:
            print(done.stdout[-6000:])


def main() -> int:
    """Try every combination."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--python", nargs="*", default=[sys.executable], help="interpreters")
    parser.add_argument("--torch", nargs="*", default=[], help="versions of torch")
    parser.add_argument("--env", nargs="*", default=[], help="environments that hold a torch already")
    parser.add_argument("--tests", default="", help="arguments for pytest, run against the installed wheel")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "matrix")
    parser.add_argument("--discard", action="store_true", help="remove each environment after use")
    options = parser.parse_args()
    wheel = options.wheel.resolve()
    gpu = shutil.which("nvidia-smi") is not None

    outcomes = []
    places: list[tuple[str, str, Path | None]] = [("", "", Path(place).absolute()) for place in options.env]
    places += [(python, torch, None) for torch in options.torch for python in options.python]
    for python, torch, place in places:
        begin = time.monotonic()
        outcome = Outcome(Path(python).name or str(place), torch or "its own")
        directory = place or options.work / f"{python.strip('/').replace('/', '-')}-torch-{torch}"
        try:
            interpreter = directory / "bin/python" if place else make_environment(directory, python, torch, gpu)
            try_wheel(interpreter, wheel, options.tests, outcome)
        except (RuntimeError, OSError) as error:
            outcome.smoke = str(error)
        outcomes.append(outcome)
        seconds = time.monotonic() - begin
        print(f"{outcome.python} torch {outcome.torch}: {outcome.smoke} ({seconds:.0f} s)", flush=True)
        if options.discard and not place:
            shutil.rmtree(directory, ignore_errors=True)

    print(f"\n| Python | torch | device | import and rms_norm | tests |\n|{'---|' * 5}")
    for row in outcomes:
        print(f"| {row.python} | {row.torch} | {row.device} | {row.smoke} | {row.tests} |")
    failures = sum(row.failed for row in outcomes)
    print(f"\n{wheel.name}: {len(outcomes) - failures} of {len(outcomes)} combinations pass")
    return int(failures > 0 or not outcomes)


if __name__ == "__main__":
    sys.exit(main())
