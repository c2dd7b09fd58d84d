# SPDX-License-Identifier: Apache-2.0
"""Cross entropy and its gradient in differentiable torch operations, computed in float32.

Forward mode and second derivatives take these.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkern.ops._loss_check import Options

_WORDS = ("none", "mean", "sum")


def _z(logits: Tensor, o: Options) -> Tensor:
    z = logits.float() * o.logit_scale
    return o.softcap * torch.tanh(z / o.softcap) if o.softcap else z


def _counted(target: Tensor, o: Options) -> Tensor:
    """Which rows count."""
    if target.is_floating_point():
        return torch.ones(target.shape[:-1], dtype=torch.bool, device=target.device)
    return target != o.ignore_index


def cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, o: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the operator returns, but for its state, of which the shape alone is right."""
    z, soft = _z(logits, o), target.is_floating_point()
    counted = _counted(target, o)
    flat = z.reshape(-1, z.shape[-1])
    if not soft:  # what does not count is not read
        flat = torch.where(counted.reshape(-1, 1), flat, 0.0)
    loss = F.cross_entropy(
        flat,
        target.float().reshape(flat.shape) if soft else target.long().reshape(-1),
        None if weight is None else weight.float(),
        ignore_index=-100 if soft else o.ignore_index,
        label_smoothing=o.label_smoothing,
        reduction=_WORDS[o.reduction],
    )
    lse = torch.where(counted, torch.logsumexp(z, -1), 0.0)
    zloss = o.lse_square_scale * lse.square()
    if o.reduction == 0:
        loss = loss.reshape(zloss.shape)
    else:
        zloss = zloss.sum() / counted.sum() if o.reduction == 1 else zloss.sum()
    state = torch.zeros(3 * counted.numel() + 2, dtype=torch.int32, device=logits.device)
    return loss + zloss, lse, zloss, state


def gradient(
    dloss: Tensor | None,
    dlse: Tensor | None,
    dzloss: Tensor | None,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    o: Options,
) -> Tensor:
    """The gradient by logits, in float32."""
    z, counted = _z(logits, o), _counted(target, o)
    classes = z.shape[-1]
    even = o.label_smoothing / classes
    if target.is_floating_point():
        shares = target.float() * (1 - o.label_smoothing) + even
        own = torch.ones_like(counted, dtype=torch.float32)
    else:
        safe = torch.where(counted, target, 0).long()
        shares = torch.zeros_like(z).scatter(-1, safe.unsqueeze(-1), 1 - o.label_smoothing) + even
        own = (torch.ones_like(z[..., 0]) if weight is None else weight.float()[safe]) * counted
    if weight is not None:
        shares = shares * weight.float()
    lse = torch.logsumexp(z, -1)
    zero = torch.zeros((), device=z.device)
    by_loss = zero if dloss is None else dloss
    by_zloss = by_loss if dzloss is None else by_loss + dzloss
    if o.reduction == 1:
        by_zloss = by_zloss / counted.sum()
        by_loss = by_loss / (own.sum() if not target.is_floating_point() else counted.sum())
    of_target = (by_loss.unsqueeze(-1) if by_loss.dim() else by_loss) * shares
    of_softmax = of_target.sum(-1) + by_zloss * (2 * o.lse_square_scale) * lse
    if dlse is not None:
        of_softmax = of_softmax + dlse
    dz = of_softmax.unsqueeze(-1) * torch.softmax(z, -1) - of_target
    dz = dz * (1 - (z / o.softcap).square()) if o.softcap else dz
    return torch.where(counted.unsqueeze(-1), dz * o.logit_scale, 0.0)
