# SPDX-License-Identifier: Apache-2.0
"""Clipping of gradients by their norm."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fastkern.optim import _plan
from fastkern.optim._plan import Bucket, Entry

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scales gradients down, in place, so that the norm of all of them is at most ``max_norm``.

    As :func:`torch.nn.utils.clip_grad_norm_`: two launches for each type of gradients, nothing is waited for, and sums
    have an order of their own, so that the result has the same bits every time. Gradients that need no scaling are not
    written. An optimizer of this package clips at no cost but for the norm: ``optimizer.step(max_norm=1.0)``.

    Args:
        parameters: a tensor or several, of which those without a gradient are left out.
        max_norm: the largest norm that is left alone.
        norm_type: 2, or infinity for the largest absolute value.
        error_if_nonfinite: waits for the norm, and raises if it is not finite.
        foreach: taken for the sake of torch's signature; there is one way.

    Returns:
        The norm before, in float32, a tensor without dimensions on the device of the first gradient.

    Raises:
        RuntimeError: a gradient is sparse or of another type than float32, float16 and bfloat16; with
            ``error_if_nonfinite`` also for a norm that is not finite.
        ValueError: another ``norm_type``.
    """
    del foreach
    norm_type = float(norm_type)
    if norm_type not in (2.0, math.inf):
        raise ValueError(f"fastkern.optim.clip_grad_norm_: norm_type must be 2 or inf, got {norm_type}")
    those = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [p.grad for p in those if p.grad is not None]
    with torch.no_grad():
        buckets: dict[tuple[torch.device, torch.dtype], Bucket] = {}
        for g in grads:
            if g.layout != torch.strided or g.dtype not in _DTYPES:
                raise RuntimeError(
                    "fastkern.optim.clip_grad_norm_: gradients must be dense float32, float16 or bfloat16, got "
                    f"{g.layout} {g.dtype}"
                )
            key = (g.device, g.dtype)
            if key not in buckets:
                buckets[key] = Bucket(g.device, "adam", "nearest", 0, (g.dtype, g.dtype, g.dtype))
                buckets[key].groups = [0]
            like = g if _plan.is_dense(g) else g.contiguous()
            buckets[key].entries.append(Entry(g, like, (), (), None, None, None, 0, 0))
        for bucket in buckets.values():
            bucket.finish()
            bucket.parameters.use_params_as_grads()
        norm, factors = _plan.clip(buckets.values(), float(max_norm), norm_type, lambda device: None)
        if error_if_nonfinite and not math.isfinite(norm.item()):
            raise RuntimeError(
                f"fastkern.optim.clip_grad_norm_: the norm must be finite with error_if_nonfinite, got {norm.item()}"
            )
        for bucket in buckets.values():
            if bucket.parameters.chunks:
                factor = factors[bucket.device]
                bucket.parameters.scale(factor.data_ptr(), _plan.stream_of(bucket.device))
            for param, work in bucket.copies:
                param.copy_(work)
        torch.autograd.graph.increment_version(grads)
    return norm
