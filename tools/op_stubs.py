# SPDX-License-Identifier: Apache-2.0
"""Writes python/fastkern/torch_ops.pyi: the types of ``torch.ops.fastkern``, from the schemas that are registered.

``--check`` writes nothing and says whether it is up to date.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import fastkern
import torch

PATH = Path(__file__).resolve().parent.parent / "python" / "fastkern" / "torch_ops.pyi"

HEAD = """# SPDX-License-Identifier: Apache-2.0
# Written by tools/op_stubs.py from the registered schemas. Do not edit.
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

"""

_TYPES = {"Tensor": "Tensor", "int": "int", "float": "float", "bool": "bool", "str": "str", "ScalarType": "torch.dtype"}


def python_type(type_: Any) -> str:
    """A schema's type as that of an argument in Python."""
    kind = type_.kind()
    if kind == "OptionalType":
        return f"{python_type(type_.getElementType())} | None"
    if kind == "ListType":
        return f"Sequence[{python_type(type_.getElementType())}]"
    name = str(type_)
    if name not in _TYPES:
        raise SystemExit(f"tools/op_stubs.py: no Python type for {name} of kind {kind}")
    return _TYPES[name]


def result_type(schema: Any) -> str:
    """What a call gives."""
    types = [python_type(r.type) for r in schema.returns]
    return "None" if not types else types[0] if len(types) == 1 else f"tuple[{', '.join(types)}]"


def parameters(schema: Any) -> str:
    """Arguments with types; a default is there, its value is the schema's."""
    parts, named = [], False
    for argument in schema.arguments:
        if argument.kwarg_only and not named:
            parts.append("*")
            named = True
        default = " = ..." if argument.has_default_value() else ""
        parts.append(f"{argument.name}: {python_type(argument.real_type)}{default}")
    return ", ".join(parts)


def _breadth(schema: Any) -> tuple[int, ...]:
    """Ranks an overload: a narrower type of an argument before one that takes it as well, as int before float."""
    order = {"Tensor": 0, "bool": 1, "int": 2, "float": 3}
    return tuple(order.get(python_type(a.real_type).removesuffix(" | None"), 0) for a in schema.arguments)


def functions(schemas: list[Any]) -> dict[str, list[Any]]:
    """Schemas by operator, the overloads of each in an order that a type checker can tell apart."""
    found: dict[str, list[Any]] = {}
    for schema in sorted(schemas, key=lambda s: (s.name, len(s.arguments), _breadth(s), s.overload_name)):
        found.setdefault(schema.name.removeprefix("fastkern::"), []).append(schema)
    return found


def stubs() -> str:
    """The whole file."""
    assert fastkern.__version__  # the import registers the operators
    registered = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("fastkern::")]
    lines = []
    for name, schemas in functions(registered).items():
        for schema in schemas:
            if len(schemas) > 1:
                lines.append("@overload")
            lines.append(f"def {name}({parameters(schema)}) -> {result_type(schema)}: ...")
    return HEAD + "\n".join(lines) + "\n"


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        current = PATH.exists() and PATH.read_text(encoding="utf-8") == stubs()
        print(f"{PATH.name} is {'up to date' if current else 'not up to date: run python tools/op_stubs.py'}")
        return int(not current)
    PATH.write_text(stubs(), encoding="utf-8")
    print(f"{PATH} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
