# SPDX-License-Identifier: Apache-2.0
"""Who may include whom, where kernels are launched, and how long a file may get (docs/architecture.md)."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

_SOURCE = {".h", ".cpp", ".cuh", ".cu"}
_INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)

pytestmark = pytest.mark.skipif(not (ROOT / "cpp").is_dir(), reason="needs the source tree")


def _files(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in _SOURCE)


def _includes(path: Path) -> list[tuple[str, str]]:
    """(bracket, name) of each include."""
    return _INCLUDE.findall(path.read_text())


def room_of(path: Path) -> str:
    """The room a source lies in: cpp/include, cpp/cpu, cpp/torch, cuda, cuda/ptx, cuda/tile or cuda/<family>."""
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) == 2 else "/".join(parts[:2])


def _resolve(path: Path, name: str) -> str | None:
    """The room of a quoted include, looked up next to the file and in the folders that the build gives."""
    for base in (path.parent, ROOT / "cpp/include", ROOT / "cuda", ROOT / "cpp"):
        if (base / name).is_file():
            return room_of((base / name).resolve())
    return None


def _allowed(room: str) -> set[str]:
    if room == "cpp/include":
        return {"cpp/include"}
    if room in ("cpp/cpu", "cpp/torch"):
        return {"cpp/include", room}
    if room == "cuda":  # launch.cuh, dispatch.h
        return {"cpp/include", "cuda"}
    if room == "cuda/ptx":
        return {"cpp/include", "cuda/ptx"}
    if room == "cuda/tile":
        return {"cpp/include", "cuda/ptx", "cuda/tile", "cuda"}
    return {"cpp/include", "cuda", "cuda/ptx", "cuda/tile", room}  # a family: never another family


def test_includes() -> None:
    wrong = []
    for path in _files("cpp", "cuda"):
        for bracket, name in _includes(path):
            if bracket == "<" and not name.startswith("fastkern/"):
                continue
            room = _resolve(path, name)
            if room is None:
                wrong.append(f"{path.relative_to(ROOT)}: {name} is in no room")
            elif room not in _allowed(room_of(path)):
                wrong.append(f"{path.relative_to(ROOT)} ({room_of(path)}) includes {name} ({room})")
    assert not wrong, "\n".join(wrong)


def test_torch_is_seen_in_one_room() -> None:
    include = ROOT / "cpp/include/fastkern"
    allowed = {include / "torch.h", *include.glob("torch/*.h")}
    for path in _files("cpp", "cuda"):
        names = [name for _, name in _includes(path)]
        seen = [n for n in names if n.startswith(("torch/", "ATen/", "c10/", "fastkern/torch"))]
        if room_of(path) == "cpp/torch":
            stable = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
            seen = [n for n in seen if not n.startswith(stable)]
        assert path in allowed or not seen, f"{path.relative_to(ROOT)} includes {seen}"


def test_cuda_is_not_needed_by_public_headers() -> None:
    for path in _files("cpp"):
        seen = [
            name for _, name in _includes(path) if name.startswith(("cuda", "cub/", "thrust/", "cute/", "cutlass/"))
        ]
        assert not seen, f"{path.relative_to(ROOT)} includes {seen}"


def test_installed_kernels_are_complete() -> None:
    """Kernels that users compile come with all that they include."""
    cmake = (ROOT / "cmake/FastkernInstall.cmake").read_text()
    installed = {(ROOT / name).resolve() for name in re.findall(r"\bcuda/[\w/]+\.cuh\b", cmake)}
    assert installed
    for path in installed:
        for bracket, name in _includes(path):
            if bracket == '"' and not (ROOT / "cpp/include" / name).is_file():
                assert (path.parent / name).resolve() in installed, (
                    f"{path.name} includes {name}, which is not installed"
                )


def test_no_template_library_in_kernels() -> None:
    for path in _files("cuda"):
        seen = [n for _, n in _includes(path) if n.startswith(("cute/", "cutlass/", "thrust/"))]
        assert not seen, f"{path.relative_to(ROOT)} includes {seen}"


def test_one_launcher() -> None:
    for path in _files("cpp", "cuda"):
        if path == ROOT / "cuda/launch.cuh":
            continue
        code = _COMMENT.sub("", path.read_text())
        assert "<<<" not in code, f"{path.relative_to(ROOT)} launches a kernel itself: use cuda/launch.cuh"
        assert "cudaLaunchKernel" not in code, f"{path.relative_to(ROOT)} launches a kernel itself: use cuda/launch.cuh"


def test_files() -> None:
    """Length, licence line, leftovers: the rules of tools/check_tree.py, which `make lint` applies to every file."""
    problems = runpy.run_path(str(ROOT / "tools/check_tree.py"))["problems"]
    python = [p for folder in ("python", "tests", "tools", "examples") for p in (ROOT / folder).rglob("*.py")]
    paths = [*_files("cpp", "cuda", "tests", "examples"), *python]
    found = [f"{path.relative_to(ROOT)}: {problem}" for path in paths for problem in problems(path)]
    assert not found, "\n".join(found)


def test_family_rooms_agree() -> None:
    """A family is the same word in every room."""
    not_families = {"ptx", "tile", "core"}
    cuda = {p.name for p in (ROOT / "cuda").iterdir() if p.is_dir()} - not_families
    for family in cuda:
        for path in (f"cpp/include/fastkern/{family}.h", f"cpp/cpu/{family}*.cpp", f"cpp/torch/{family}.cpp",
                     f"python/fastkern/ops/{family}.py"):  # fmt: skip
            assert any(ROOT.glob(path)), f"cuda/{family} has no {path}"
