# SPDX-License-Identifier: Apache-2.0
"""Importing, forking, locations, _core, and the route a call takes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import fastkern
import pytest
import torch
from fastkern import _core
from fastkern.specs import SPECS, OpSpec
from harness.cases import as_tuple, assert_bitwise, is_float, leaves_of, make_inputs, pick_dims, run_forward
from torch import Tensor

IMPORT_BUDGET_MS = 100  # 70 to 77 on the development machine, for some 250 operators

specs = pytest.mark.parametrize("spec", [pytest.param(s, id=s.name) for s in SPECS])


def run_python(code: str, *arguments: str) -> str:
    """With bytecode kept, as an installed package has it."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout


# ---- import ----------------------------------------------------------------------------------------------------------


def test_import_does_not_initialise_cuda() -> None:
    code = """
import torch, fastkern
assert not torch.cuda.is_initialized()
fastkern._core.build_info(), fastkern._core.architectures()
fastkern.rms_norm(torch.ones(2, 3))
assert not torch.cuda.is_initialized()
"""
    run_python(code)


def test_import_leaves_torch_alone() -> None:
    code = """
import os, torch
state = lambda: (dict(os.environ), torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed(),
                 torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),
                 torch.is_grad_enabled())
before = state()
import fastkern
assert state() == before, (before, state())
"""
    run_python(code)


def test_import_is_light() -> None:
    """No compiler stack and nothing optional is imported along."""
    code = """
import sys, torch
before = set(sys.modules)
import fastkern
assert "fastkern.nn" not in sys.modules
print(*sorted({m.split(".")[0] for m in set(sys.modules) - before}))
"""
    extra = set(run_python(code).split()) - {"fastkern"}
    assert not extra & {"torch._dynamo", "triton", "rich", "typer", "matplotlib", "numpy", "hypothesis"}, extra


def test_import_time() -> None:
    """The processor's time over ``import torch``. A busy machine shares its caches, so slows both imports down: there a
    twelfth of torch's own time counts."""
    code = """
import time
start = time.process_time()
import torch
middle = time.process_time()
import fastkern
print(1000 * (middle - start), 1000 * (time.process_time() - middle))
"""
    seen = []
    for _ in range(6):
        torch_ms, ours_ms = map(float, run_python(code).split())
        seen.append((torch_ms, ours_ms))
        if ours_ms <= max(IMPORT_BUDGET_MS, torch_ms / 12):
            return
    raise AssertionError(f"torch's import and ours over it take {seen} ms, budget {IMPORT_BUDGET_MS}")


_FORK = """
import os, sys, torch, fastkern
device = sys.argv[1]
if sys.argv[2] == "used":
    fastkern.rms_norm(torch.ones(64, 64))
child = os.fork()
if child == 0:
    code = 1
    try:
        torch.set_num_threads(1)
        x = torch.arange(1.0, 9.0).reshape(2, 4).to(device)
        y = fastkern.rms_norm(x)
        want = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        code = 0 if torch.allclose(y, want) else 2
    finally:
        os._exit(code)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.parametrize("parent", ["unused", "used"])
def test_fork_after_import(device: str, parent: str) -> None:
    run_python(_FORK, device, parent)


def test_old_torch_is_refused_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fastkern._library import load_operators

    with pytest.raises(ImportError, match="incomplete, reinstall"):
        load_operators(tmp_path)
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(ImportError, match=r"torch >= 2\.10, found torch 2\.9\.1"):
        load_operators(tmp_path)
    monkeypatch.undo()
    (tmp_path / "libfastkern_torch.so").write_text("no library")
    with pytest.raises(ImportError, match="does not load with torch"):
        load_operators(tmp_path)


# ---- locations and _core ---------------------------------------------------------------------------------------------


def test_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", fastkern.__version__)


def test_locations() -> None:
    assert (Path(fastkern.get_include()) / "fastkern" / "core.h").is_file()
    assert (Path(fastkern.get_cmake_dir()) / "fastkernConfig.cmake").is_file()
    for name in ("libfastkern.so", "libfastkern_torch.so"):
        assert (Path(fastkern.get_library_dir()) / name).is_file()


def test_typed() -> None:
    assert resources.files("fastkern").joinpath("py.typed").is_file()


def test_everything_public_is_documented() -> None:
    for name in fastkern.__all__:
        value = getattr(fastkern, name)
        assert not callable(value) or value.__doc__, f"fastkern.{name} has no docstring"


def test_build_info() -> None:
    info = _core.build_info()
    assert set(info) >= {"version", "commit", "compiler", "cuda", "cuda_version", "architectures"}
    assert info["version"] == fastkern.__version__
    assert info["architectures"] == _core.architectures()
    assert bool(info["architectures"]) == info["cuda"] == bool(info["cuda_version"])
    assert all(re.fullmatch(r"\d+a?", arch) for arch in _core.architectures())


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_devices_without_gpu() -> None:
    assert _core.device_count() == 0
    with pytest.raises(RuntimeError):
        _core.device_info(0)


@pytest.mark.cuda
def test_devices(cuda: None) -> None:
    assert _core.device_count() == torch.cuda.device_count()
    major, _ = _core.driver_version()
    assert major >= 12
    info, torchs = _core.device_info(0), torch.cuda.get_device_properties(0)
    assert info["name"] == torchs.name
    assert info["capability"] == (torchs.major, torchs.minor)
    assert info["multiprocessors"] == torchs.multi_processor_count
    assert info["memory_bytes"] == torchs.total_memory
    for missing in (-1, torch.cuda.device_count()):
        with pytest.raises(RuntimeError):
            _core.device_info(missing)
    assert is_float(fastkern.rms_norm(torch.ones(2, 8, device="cuda")))  # the error did not stick


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("rms_norm", 64, torch.float64), ValueError, r"plan: dtype must be one of .*, got float64"),
        (("rms_norm", 64, "text"), ValueError, r"plan: dtype must be one of .*, got text"),
        (("rms_norm", -1, torch.float32), ValueError, r"plan: n must be >= 0, got -1"),
        (("rms_norm", "64", torch.float32), TypeError, "integer"),
        (("rms_norm", 2**63, torch.float32), OverflowError, "int"),
    ],
)
def test_plan_refuses(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _core.plan(*arguments)


@pytest.mark.skipif(_core.build_info()["cuda"], reason="for builds without CUDA kernels")
def test_plan_without_cuda() -> None:
    with pytest.raises(RuntimeError, match="no CUDA kernels"):
        _core.plan("rms_norm", 64, torch.float32)


@pytest.mark.skipif(not _core.build_info()["cuda"], reason="for builds with CUDA kernels")
def test_plan() -> None:
    with pytest.raises(ValueError, match="plan: op must be"):
        _core.plan("no_such_op", 64, torch.float32)
    for op in ("rms_norm", "rms_norm_bwd", "layer_norm", "layer_norm_bwd"):
        for dtype in (torch.float32, "bfloat16", torch.float16):
            for n in (0, 1, 7, 1024, 4097, 65536, 262144, 2**40):
                plan = _core.plan(op, n, dtype)
                assert plan["kernel"].startswith("norm_bwd_" if op.endswith("_bwd") else "norm_")
                assert plan["threads_per_block"] % 32 == 0
                assert 32 <= plan["threads_per_block"] <= 512
                assert plan["threads_per_row"] * plan["rows_per_block"] == plan["threads_per_block"]
                assert plan["blocks_per_row"] in {1, 2, 4, 8, 16}
                held = plan["threads_per_row"] * plan["blocks_per_row"] * plan["elements_per_thread"]
                assert held >= n or not plan["resident"]


# ---- devices and routes ----------------------------------------------------------------------------------------------


def _small(spec: OpSpec, device: str = "cpu") -> dict[str, Any]:
    dims = pick_dims(spec, 3, limit=1 << 12)[1]
    return make_inputs(spec, device, torch.float32, dims, spec.variants[0])


@specs
def test_mixed_devices_are_refused(spec: OpSpec, device: str) -> None:
    """An argument on another device raises and names itself, also where the other device is meta or the CPU."""
    inputs = _small(spec, device)
    expected = run_forward(spec.function, inputs)
    tensors = [name for name, value in inputs.items() if isinstance(value, Tensor)]
    for name in tensors if len(tensors) > 1 else ():
        for other in {"meta", "cpu"} - {device}:
            for call in (spec.function, spec.op):
                with pytest.raises((RuntimeError, NotImplementedError), match=spec.name):
                    call(**{**inputs, name: inputs[name].to(other)})
                for ours, before in zip(run_forward(spec.function, inputs), expected, strict=True):
                    assert_bitwise(ours, before, f"{spec.name} after {name} on {other}")


@specs
def test_meta_tensors(spec: OpSpec) -> None:
    """All on meta: shapes and dtypes without data, from the same rules."""
    inputs = _small(spec)
    meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in inputs.items()}
    for call in (spec.function, spec.op):
        expected = run_forward(spec.function, inputs)
        for ours, real in zip(as_tuple(call(**meta))[: len(expected)], expected, strict=True):
            assert (ours.device.type, ours.shape, ours.dtype) == ("meta", real.shape, real.dtype)
            assert ours.stride() == real.stride()


@specs
def test_no_autograd_without_need(spec: OpSpec, device: str) -> None:
    """No node where no input requires grad or gradients are off; a node where one does."""
    inputs = _small(spec, device)
    for output in as_tuple(spec.function(**inputs)):
        assert output.grad_fn is None
        assert not output.requires_grad
    leaves = leaves_of(inputs, spec.differentiable)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert all(o.grad_fn is None for o in as_tuple(spec.function(**leaves)))
    for call in (spec.function, spec.op) if spec.differentiable else ():
        assert all(o.grad_fn is not None for o in as_tuple(call(**leaves)) if is_float(o))


@specs
def test_results_are_fresh(spec: OpSpec, device: str) -> None:
    """Outputs share no memory with inputs, so writing one changes nothing else."""
    inputs = _small(spec, device)
    places = {v.untyped_storage().data_ptr() for v in inputs.values() if isinstance(v, Tensor)}
    for output in run_forward(spec.function, inputs):
        assert output.untyped_storage().data_ptr() not in places
        assert output.is_contiguous()


@specs
def test_gradients_that_do_not_exist_are_refused(spec: OpSpec, device: str) -> None:
    """A function without a gradient says so instead of giving none."""
    inputs = _small(spec, device)
    for name in [k for k, v in inputs.items() if is_float(v)] if not spec.differentiable else ():
        leaves = leaves_of(inputs, (name,))
        with pytest.raises(RuntimeError, match=f"{spec.name}: {name} must not require grad"):
            spec.function(**leaves)
        with torch.no_grad():
            spec.function(**leaves)


@specs
def test_in_a_module(spec: OpSpec, device: str) -> None:
    """One optimiser step through parameters changes them, and they stay finite."""
    if not spec.differentiable:
        pytest.skip("has no gradient")
    leaves = {k: torch.nn.Parameter(v) if k in spec.differentiable and is_float(v) else v
              for k, v in _small(spec, device).items()}  # fmt: skip
    parameters = [v for v in leaves.values() if isinstance(v, torch.nn.Parameter)]
    before = [p.detach().clone() for p in parameters]
    optimiser = torch.optim.SGD(parameters, lr=0.1)
    # Weighted: the plain sum of squares of a normalised row hardly depends on it.
    outputs = [torch.atleast_1d(o) for o in as_tuple(spec.function(**leaves))]
    sum((o * torch.linspace(0.5, 1.5, o.shape[-1], device=o.device)).square().sum() for o in outputs).backward()
    optimiser.step()
    for parameter, old in zip(parameters, before, strict=True):
        assert bool(parameter.isfinite().all())
        assert not torch.equal(parameter, old)


@pytest.mark.parametrize("function", [fastkern.rms_norm, torch.ops.fastkern.rms_norm], ids=["function", "operator"])
@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0)])
def test_vmap_over_nothing(function: Any, in_dims: tuple[int | None, ...]) -> None:
    shapes = [(*([0] if dim == 0 else []), *shape) for dim, shape in zip(in_dims, [(3, 8), (8,)], strict=True)]
    x, weight = (torch.randn(shape, requires_grad=True) for shape in shapes)
    y = torch.func.vmap(function, in_dims=in_dims)(x, weight)
    assert y.shape == (0, 3, 8)
    y.sum().backward()
    for t in (x, weight):
        assert t.grad is not None
        assert t.grad.shape == t.shape
        assert not bool(t.grad.any())


def test_vmap_refuses_scalars() -> None:
    """The batch is no dimension of the operator's own."""
    with pytest.raises(RuntimeError, match=r"rms_norm: x must have at least one dimension"):
        torch.func.vmap(fastkern.rms_norm)(torch.arange(1.0, 4.0))
