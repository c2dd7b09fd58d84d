# SPDX-License-Identifier: Apache-2.0
"""Devices, hypothesis profiles and a clean slate between tests."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

# Examples are drawn from literals of the loaded modules besides: other ones in each worker, in each order of tests.
providers._get_local_constants = providers.Constants
_COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None, "print_blob": True}
settings.register_profile("ci", max_examples=400, derandomize=True, **_COMMON)
settings.register_profile("quick", max_examples=100, derandomize=True, **_COMMON)
settings.register_profile("nightly", max_examples=20_000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Graphs that torch.compile kept for another version of the library call operators with that version's arguments.
_COMPILED = os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp(prefix="fastkern-inductor-"))

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread a worker: two pools on the same cores wait for each other
    torch.set_num_threads(1)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Every test that takes it runs on the CPU and, where there is one, on a CUDA device."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    _skip_without_kernels(request, request.param)
    return request.param


def _skip_without_kernels(request: pytest.FixtureRequest, device: str) -> None:
    """A row of the operator table says on which devices its operator runs."""
    callspec, marker = getattr(request.node, "callspec", None), request.node.get_closest_marker("operator")
    spec = marker.args[0] if marker else callspec.params.get("spec") if callspec else None
    if spec is not None and device not in spec.devices:
        pytest.skip(f"{spec.name} has no {device} kernels")


def pytest_unconfigure(config: pytest.Config) -> None:
    """The workers share their parent's cache; the parent removes it."""
    if not hasattr(config, "workerinput") and os.path.basename(_COMPILED).startswith("fastkern-inductor-"):
        shutil.rmtree(_COMPILED, ignore_errors=True)


@pytest.fixture
def cuda(request: pytest.FixtureRequest) -> None:
    """For tests of what only CUDA has; mark them with ``pytest.mark.cuda``."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    _skip_without_kernels(request, "cuda")


@pytest.fixture(autouse=True)
def _clean_slate() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    assert not torch.are_deterministic_algorithms_enabled(), "a test left deterministic mode on"
    assert torch.is_grad_enabled(), "a test left gradients off"
