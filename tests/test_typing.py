# SPDX-License-Identifier: Apache-2.0
"""The types of the public names and of ``torch.ops.fastkern``: up to date, and seen by a user's type checker."""

from __future__ import annotations

import inspect
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import fastkern
import pytest
import torch
from fastkern import torch_ops

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = Path(__file__).parent / "typing" / "user_program.py"
PACKAGE = Path(fastkern.__file__).parent


def test_stubs_are_up_to_date() -> None:
    tool = ROOT / "tools" / "op_stubs.py"
    if not tool.exists():
        pytest.skip("needs the source tree")
    stubs = runpy.run_path(str(tool))["stubs"]()
    assert (PACKAGE / "torch_ops.pyi").read_text(encoding="utf-8") == stubs, "run python tools/op_stubs.py"


def test_typed_names_are_the_operators() -> None:
    assert torch_ops.rms_norm is torch.ops.fastkern.rms_norm
    named = set(re.findall(r"^def (\w+)\(", (PACKAGE / "torch_ops.pyi").read_text(encoding="utf-8"), re.MULTILINE))
    assert named == set(dir(torch_ops))
    with pytest.raises(AttributeError):
        _ = torch_ops.no_such_operator


def test_public_functions_have_types() -> None:
    assert (PACKAGE / "py.typed").exists()
    for name in fastkern.__all__:
        function = getattr(fastkern, name)
        if inspect.isfunction(function):
            signature = inspect.signature(function)
            untyped = [p for p, what in signature.parameters.items() if what.annotation is inspect.Parameter.empty]
            assert not untyped, f"fastkern.{name}: {untyped}"
            assert signature.return_annotation is not inspect.Signature.empty, f"fastkern.{name}"


def test_a_users_program(tmp_path: Path) -> None:
    """mypy --strict, of the package as it is installed. Torch is not looked into, which takes a minute; lint does."""
    pytest.importorskip("mypy")
    config = tmp_path / "mypy.ini"
    config.write_text(
        "[mypy]\nstrict = True\nwarn_return_any = False\ndisallow_subclassing_any = False\n"
        "[mypy-torch,torch.*]\nfollow_imports = skip\n"
        "[mypy-fastkern,fastkern.*]\nfollow_imports = silent\n",
        encoding="utf-8",
    )
    environment = dict(os.environ)
    if "site-packages" not in PACKAGE.parts:
        environment["MYPYPATH"] = str(PACKAGE.parent)
    command = [sys.executable, "-m", "mypy", "--config-file", str(config), "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run([*command, str(PROGRAM)], capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
