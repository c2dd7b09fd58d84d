# SPDX-License-Identifier: Apache-2.0
"""One batching rule for every operator on rows.

Where nothing but row operands is batched, the batch is one more leading dimension, or part of the first. Else one call
for each entry, and the results stacked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkern.ops import _schema


def register(
    name: str,
    *,
    rows: Sequence[str] = (),
    check: Callable[..., Any] | None = None,
    merges: Callable[[dict[str, Any]], bool] = lambda arguments: True,
    mutates: str | None = None,
    folds: bool = False,
) -> None:
    """Give ``fastkern::<name>`` its rule.

    Args:
        name: of the operator.
        rows: arguments that may be batched as one more leading dimension; none: always entry by entry.
        check: the operator's checks, called with the arguments of one entry: the batch is none of x's own dimensions,
            so its rank and shape are not those that the operator gets.
        merges: whether the call with these arguments treats every row alike, wherever it lies.
        mutates: the argument that is written in place.
        folds: the operator has a batch dimension of its own, the first one of each of ``rows``: vmap's batch becomes
            part of it instead of one more dimension.
    """
    op = getattr(torch.ops.fastkern, name).default
    schema = _schema.arguments(name)
    names = [a.name for a in schema]

    def entries(info: Any, value: Any, dim: int | None) -> list[Any]:
        if dim is None:
            return [value] * max(info.batch_size, 1)
        # Of an empty batch, one to get the shape of a result from: a sum of nothing is zeros, and in the graph.
        return list(value.unbind(dim)) or [value.sum(dim, dtype=value.dtype)]

    def folded(batch: int, values: list[Any]) -> tuple[Tensor, ...]:
        own = values[names.index(rows[0])].shape[1]
        for i, name in enumerate(names):
            if name in rows and values[i] is not None:
                values[i] = values[i].flatten(0, 1)
        # One dimension: what stands for a result nobody asked for.
        return tuple(r.unflatten(0, (batch, own)) if r.dim() > 1 else r.expand(batch, 0) for r in op(*values))

    def rule(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> tuple[Any, Any]:
        values = [*given, *(a.default_value for a in schema[len(given) :])]
        dims = [*in_dims, *([None] * (len(values) - len(in_dims)))]
        arguments = {a.name: value for a, value in zip(schema, values, strict=True)}
        batched = {a.name for a, dim in zip(schema, dims, strict=True) if dim is not None}
        if mutates is not None and mutates not in batched:
            raise RuntimeError(f"fastkern::{name}: {mutates} must be batched by vmap too, to be written in place")
        if info.batch_size > 0 and batched <= set(rows) and merges(arguments):
            if check is not None:
                check(*(v if dim is None else v.select(dim, 0) for v, dim in zip(values, dims, strict=True)))
            for i, (a, value, dim) in enumerate(zip(schema, values, dims, strict=True)):
                if dim is not None:
                    values[i] = value.movedim(dim, 0)
                elif a.name in rows and isinstance(value, Tensor):
                    values[i] = value.expand(info.batch_size, *value.shape)
            result = folded(info.batch_size, values) if folds else op(*values)
        else:
            per_entry = [entries(info, value, dim) for value, dim in zip(values, dims, strict=True)]
            results = [op(*entry) for entry in zip(*per_entry, strict=True)]
            if isinstance(results[0], Tensor):
                result = torch.stack(results)[: info.batch_size]
            else:
                result = tuple(torch.stack(parts)[: info.batch_size] for parts in zip(*results, strict=True))
        return result, 0 if isinstance(result, Tensor) else (0,) * len(result)

    torch.library.register_vmap(f"fastkern::{name}", rule)
