# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from typing import Any

import torch

def build_info() -> dict[str, Any]: ...
def architectures() -> list[str]: ...
def device_count() -> int: ...
def driver_version() -> tuple[int, int] | None: ...
def device_info(device: int) -> dict[str, Any]: ...
def plan(op: str, n: int, dtype: torch.dtype | str) -> dict[str, Any]: ...

class OptimParameters:
    bytes: int
    chunks: int
    updated: list[torch.Tensor]
    def __init__(
        self,
        kind: str,
        rounding: str,
        param: torch.dtype,
        grad: torch.dtype,
        state: torch.dtype,
        device: int,
        params: list[torch.Tensor],
        likes: list[torch.Tensor],
    ) -> None: ...
    def set(
        self,
        i: int,
        states: tuple[torch.Tensor | None, ...],
        scales: tuple[torch.Tensor, ...],
        extra: torch.Tensor | None,
        step: torch.Tensor | None,
        product: torch.Tensor | None,
        group: int,
        index: int,
    ) -> None: ...
    def finish(self, memory: torch.Tensor | None) -> None: ...
    def collect(self, odd: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> bool: ...
    def use_params_as_grads(self) -> None: ...
    def use_grads(self, grads: list[torch.Tensor]) -> None: ...
    def workspace_bytes(self) -> int: ...
    def write(self, stream: int) -> None: ...
    def step(
        self,
        groups: list[tuple[Any, ...]],
        grad_scale: int,
        grad_factor: int,
        found_inf: int,
        seed: int,
        workspace: int,
        stream: int,
    ) -> None: ...
    def norm(
        self,
        largest: bool,
        first: bool,
        last: bool,
        max_norm: float,
        grad_scale: int,
        partials: int,
        sum_: int,
        norm: int,
        factor: int,
        stream: int,
    ) -> None: ...
    def scale(self, factor: int, stream: int) -> None: ...
