# SPDX-License-Identifier: Apache-2.0
"""The C++ example, built against the installed package as a user would, and run."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import fastkern
import pytest
import torch

SOURCE = Path(__file__).resolve().parent.parent / "examples" / "cpp"


def run(*command: str | Path) -> str:
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def build_with_cmake(build: Path) -> None:
    run(
        *("cmake", "-S", SOURCE, "-B", build),
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}",
        f"-Dfastkern_DIR={fastkern.get_cmake_dir()}",
    )
    run("cmake", "--build", build)


def build_by_hand(build: Path) -> None:
    root = Path(torch.__file__).parent
    includes = (fastkern.get_include(), root / "include", root / "include/torch/csrc/api/include")
    directories = (fastkern.get_library_dir(), root / "lib")
    libraries = ("fastkern_torch", "fastkern", "torch", "torch_cpu", "c10", "torch_cuda", "c10_cuda")
    run(
        *("g++", "-std=c++20", "-O1", "-o", build / "fastkern_example", SOURCE / "main.cpp"),
        *(f"-I{path}" for path in includes),
        *(f"-L{path}" for path in directories),
        *(f"-Wl,-rpath,{path}" for path in directories),
        *("-Wl,--no-as-needed", "-Wl,--allow-shlib-undefined"),
        *(f"-l{name}" for name in libraries if (root / "lib" / f"lib{name}.so").exists() or "fastkern" in name),
    )


@pytest.mark.slow
@pytest.mark.timeout(900)  # torch/torch.h takes a minute to compile on a busy machine
def test_builds_and_agrees_with_torch(tmp_path: Path) -> None:
    # find_package(Torch) of a CUDA build asks for a whole CUDA toolkit, which few machines with such a torch have.
    tool, build = ("g++", build_by_hand) if torch.version.cuda else ("cmake", build_with_cmake)
    for name in ("g++", tool):
        if not shutil.which(name):
            pytest.skip(f"{name} is not installed")
    build(tmp_path)
    output = run(tmp_path / "fastkern_example")
    losses = [float(loss) for loss in re.findall(r"^step +\d+ +loss ([\d.]+)$", output, re.MULTILINE)]
    assert len(losses) >= 2, output
    assert losses[-1] < losses[0] / 4, output
    assert "WRONG" not in output
    assert f"on {'cuda' if torch.cuda.is_available() else 'cpu'}\n" in output
    assert output.endswith("all good\n")
