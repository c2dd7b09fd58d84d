# SPDX-License-Identifier: Apache-2.0
"""What a run covers: the options of the command line, the sizes they leave, the machine it happens on."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastkern import info
from fastkern.bench import cases
from fastkern.bench.results import BACKWARD, FORWARD
from fastkern.specs import Dims, OpSpec

# Distribution names of peers whose column is named otherwise.
DISTRIBUTIONS = {
    "liger": "liger-kernel",
    "quack": "quack-kernels",
    "flag_gems": "flag-gems",
    "flash_attn": "flash-attn",
}

QUICK_ELEMENTS = 2**20
CPU_ELEMENTS = 2**25


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    forward_only: bool = False
    quick: bool = False
    providers: tuple[str, ...] = ()  # empty: all

    @property
    def directions(self) -> tuple[str, ...]:
        """Directions to time."""
        return (FORWARD,) if self.forward_only else (FORWARD, BACKWARD)


def name_of(dtype: torch.dtype) -> str:
    """``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def sizes(spec: OpSpec, options: Options) -> tuple[Dims, ...]:
    """The sizes of the spec's row that this run takes."""
    on_cpu = options.device.type == "cpu"
    if on_cpu and spec.cpu_bench_dims and not options.quick:
        return spec.cpu_bench_dims
    limit = QUICK_ELEMENTS if options.quick else CPU_ELEMENTS if on_cpu else None
    if limit is None:
        return spec.bench_dims
    known = cases.known_sizes(spec, options.device)
    return tuple(d for d in known if cases.elements(d) <= limit) or (cases.smallest(spec, options.device),)


def device_name(device: torch.device) -> str:
    """The GPU's name or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else info.cpu_name()


def environment(options: Options, specs: Sequence[OpSpec]) -> dict[str, Any]:
    """Where and when: ``fastkern.info``'s facts, the peers' versions, the command."""
    facts = info.environment()
    peers = dict.fromkeys(peer for spec in specs for peer in spec.peers)
    found = {peer: info.package_version(DISTRIBUTIONS.get(peer, peer)) for peer in peers}
    facts["device_type"] = options.device.type
    facts["device"] = device_name(options.device)
    facts["peers"] = {peer: version for peer, version in found.items() if version}
    facts["date"] = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    facts["argv"] = sys.argv[1:]
    facts["options"] = {"quick": options.quick, "forward_only": options.forward_only}
    return facts
