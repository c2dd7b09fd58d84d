# SPDX-License-Identifier: Apache-2.0
"""The examples run as a user runs them, and notice when they should."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPT = EXAMPLES / "train_gpt.py"
TINY = "--device cpu --steps 12 --batch 2 --context 16 --layers 1 --width 16 --heads 2 --kv-heads 1 --sample-bytes 8"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {i}: the square of {i} is {i * i}\n" for i in range(500)))
    return path


def load(name: str) -> ModuleType:
    """A script as a module, known to the other scripts by its name."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def train_gpt() -> Iterator[ModuleType]:
    module, threads = load("train_gpt"), torch.get_num_threads()
    torch.set_num_threads(1)  # too tiny for more
    yield module
    torch.set_num_threads(threads)
    del sys.modules["train_gpt"]


@pytest.fixture(scope="module")
def generate(train_gpt: ModuleType) -> Iterator[ModuleType]:
    yield load("generate")
    del sys.modules["generate"]


def run(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *TINY.split(), *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)


@pytest.mark.parametrize("kernels", ["both", "fastkern"])
def test_train_gpt_runs(kernels: str, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "new" / "plot.png"
    # once on the text that every machine has
    source = [] if kernels == "both" else ["--data", data]
    result = run("--kernels", kernels, "--plot", picture, *source)
    assert result.returncode == 0, result.stderr
    names = ["torch", "fastkern"] if kernels == "both" else [kernels]
    assert re.search(rf"^  step +{' +'.join(names)}", result.stdout, re.M)
    rows = re.findall(r"^ +\d+ +\d\.\d{4}.*$", result.stdout, re.M)
    assert len(rows) == 12
    assert all(len(row.split()) == (4 if kernels == "both" else 2) for row in rows)
    for name in names:
        row = rf"^{name} +\d\.\d{{4}} +\d\.\d{{4}} +[\d,]+ +\d+\.\d\dx +\d\.\d{{3}}% +0\.0$"
        assert re.search(row, result.stdout, re.M)
    assert ("agree: relative difference" in result.stdout) == (kernels == "both")
    assert f"{names[-1]} writes:\n\n" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("options", ["--dtype float32", "--dtype bfloat16 --kv-heads 2", "--optimizer sgd"])
def test_train_gpt_with_fastkern_is_the_same_to_rounding(train_gpt: ModuleType, data: Path, options: str) -> None:
    o = train_gpt.parse([*TINY.split(), "--data", str(data), "--lr", "0.01", *options.split()])
    runs = train_gpt.train(o, train_gpt.Text(o), [train_gpt.Kernels(), train_gpt.fastkern_kernels()])
    train_gpt.assert_agreement(*runs)
    assert runs[1].losses[-1] < runs[1].losses[0]
    if o.dtype == "float32":
        assert runs[0].losses == pytest.approx(runs[1].losses, abs=5e-4)


def test_train_gpt_with_an_optimizer_that_torch_has_not(train_gpt: ModuleType, data: Path) -> None:
    o = train_gpt.parse([*TINY.split(), "--data", str(data), "--kernels", "fastkern", "--optimizer", "lion"])
    (run,) = train_gpt.train(o, train_gpt.Text(o), [train_gpt.fastkern_kernels()])
    assert run.losses[-1] < run.losses[0]


def test_train_gpt_large_model_is_gpt2_sized(train_gpt: ModuleType) -> None:
    o = train_gpt.parse(["--device", "cpu", "--model", "124m"])
    with torch.device("meta"):
        model = train_gpt.GPT(o, train_gpt.Kernels())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(124e6, rel=0.01)
    assert (o.batch, o.context, o.dtype) == (32, 1024, "bfloat16")


def test_train_gpt_is_deterministic_and_learns(train_gpt: ModuleType, data: Path) -> None:
    options = train_gpt.parse([*TINY.split(), "--data", str(data), "--steps", "40", "--lr", "0.01", "--untied"])
    text = train_gpt.Text(options)
    one, two = train_gpt.train(options, text, [train_gpt.Kernels(), train_gpt.Kernels()])
    assert one.losses == two.losses
    assert one.validation == two.validation < one.losses[0] - 1
    assert one.sample("x", 20, 0.7) == two.sample("x", 20, 0.7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "kernel",
    [
        lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-6) * 1.05,
        lambda x, weight: F.rms_norm(x, weight.shape, weight.detach(), 1e-6),
        lambda x, weight: F.rms_norm(x.detach(), weight.shape, weight, 1e-6),
        lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-6) * torch.nan,
    ],
    ids=["wrong scale", "no gradient of weight", "no gradient of x", "nan"],
)
def test_train_gpt_notices_a_wrong_kernel(
    train_gpt: ModuleType, data: Path, kernel: Callable[..., torch.Tensor], dtype: str
) -> None:
    options = train_gpt.parse([*TINY.split(), "--data", str(data), "--dtype", dtype])

    def add_norm(branch: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = x if branch is None else x + branch
        return kernel(x, weight), x

    wrong = dataclasses.replace(train_gpt.Kernels(), name="wrong", add_norm=add_norm)
    runs = train_gpt.train(options, train_gpt.Text(options), [train_gpt.Kernels(), wrong])
    with pytest.raises(train_gpt.DisagreementError, match="torch and wrong disagree"):
        train_gpt.assert_agreement(*runs)


def test_train_gpt_with_and_without_compile(
    train_gpt: ModuleType,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Four runs in turns and a table of them; what compiling does is not of interest here."""
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    for name in ("table.md", "new/table.json"):
        path = tmp_path / name
        options = ["--data", str(data), "--compile", "also", "--table", str(path), "--plot", str(tmp_path / "plot.png")]
        train_gpt.main([*TINY.split(), *options])
        names = ["torch", "fastkern", "torch compiled", "fastkern compiled"]
        if path.suffix == ".md":
            assert re.findall(r"^\| ([a-z ]+) \| [\d,]+ \| \d", path.read_text(), re.M) == names
        else:
            rows = json.loads(path.read_text())["rows"]
            assert [row["kernels"] for row in rows] == names
            assert rows[0]["training loss"] == rows[2]["training loss"]
    assert len(compiled) == 4
    output = capsys.readouterr().out
    assert re.search(r"fastkern compiled: \d\.\d\dx the speed of torch compiled", output)
    assert output.count("agree: ") == 6


def test_train_gpt_reports_a_disagreement(train_gpt: ModuleType, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = dataclasses.replace(train_gpt.Kernels(), name="fastkern", swiglu=lambda x: F.glu(x))
    monkeypatch.setattr(train_gpt, "fastkern_kernels", lambda: wrong)
    monkeypatch.setattr(train_gpt, "plot", lambda runs, path: str(path))
    with pytest.raises(train_gpt.DisagreementError, match="loss of step 1"):
        train_gpt.main([*TINY.split(), "--data", str(data)])


def test_train_gpt_without_matplotlib(train_gpt: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "matplotlib is not installed" in train_gpt.plot([], tmp_path / "plot.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "no/such/file"], "cannot read the text no/such/file: No such file or directory"),
        (["--data", __file__, "--context", "100000"], "too little text"),
        (["--device", "cuda:99"], "PyTorch .* sees .* GPUs"),
        (["--device", "gpu"], "--device gpu: not a device"),
        (["--device", "meta"], "kernels for cpu and cuda"),
        (["--width", "18", "--heads", "4"], "--width 18 is not a multiple of 2 x --heads 4"),
        (["--kv-heads", "3"], "--heads 2 is not a multiple of --kv-heads 3"),
        (["--optimizer", "lion"], "--optimizer lion: torch has none"),
        (["--steps", "0"], "--steps 0: must be positive"),
        (["--lr", "nan"], "--lr nan: must be positive"),
        (["--vocab", "100"], "--vocab 100: a byte has 256 values"),
    ],
)
def test_train_gpt_answers_errors_in_words(
    train_gpt: ModuleType, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        train_gpt.main([*TINY.split(), "--kernels", "torch", *options])
    assert stopped.value.code not in (0, None)
    assert re.search(message, f"{stopped.value}\n{capsys.readouterr().err}")


def test_train_gpt_without_fastkern(
    train_gpt: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fastkern", None)
    options = [*TINY.split(), "--data", str(data), "--plot", str(tmp_path / "plot.png")]
    train_gpt.main([*options, "--kernels", "torch"])
    with pytest.raises(SystemExit, match="fastkern cannot be imported"):
        train_gpt.main(options)


def test_generate(generate: ModuleType, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--data", str(data), "--steps", "2", "--tokens", "5"]
    generate.main([*options, "--prompt", "line 1: the", "--prompt", "s"])
    written = capsys.readouterr().out
    assert written.count(" is followed by\n") == 2
    assert "agree: plain PyTorch without a cache" in written


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_generate_writes_what_a_model_without_a_cache_would(
    train_gpt: ModuleType, generate: ModuleType, temperature: float
) -> None:
    """Random weights, prompts of different lengths: row by row, token by token, the same choices."""
    torch.manual_seed(1)
    model = train_gpt.GPT(train_gpt.parse([*TINY.split(), "--layers", "2"]), train_gpt.fastkern_kernels())
    prompts = [[3, 1, 4, 1, 5], [9], [2, 6]]
    rows, logits = generate.generate(model, prompts, 9, temperature, seed=3)
    assert [row[: len(prompt)] for row, prompt in zip(rows, prompts, strict=True)] == prompts
    assert generate.largest_difference(model, rows, logits) < 1e-5
    generator = torch.Generator().manual_seed(3)
    expected = [list(prompt) for prompt in prompts]
    with torch.no_grad():
        for _ in range(9):
            last = torch.cat([model(torch.tensor([row])) for row in expected])
            for row, token in zip(expected, generate.pick(last, temperature, generator).tolist(), strict=True):
                row.append(token)
    assert rows == expected


@pytest.mark.parametrize("fault", ["a lost token", "a wrong position", "nan"])
def test_generate_notices_a_wrong_cache(train_gpt: ModuleType, generate: ModuleType, fault: str) -> None:
    torch.manual_seed(1)
    model = train_gpt.GPT(train_gpt.parse([*TINY.split(), "--layers", "2"]), train_gpt.fastkern_kernels())

    class Wrong(generate.Decoder):
        def __init__(self, model: torch.nn.Module, batch: int, capacity: int) -> None:
            super().__init__(model, batch, 2 * capacity)

        def advance(self, tokens: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
            logits = super().advance(tokens, new)
            if fault == "a lost token":
                self.keys[:, :, 1] = 0
            elif fault == "a wrong position":
                self.lengths = self.lengths + 1
            return logits * torch.nan if fault == "nan" else logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "Decoder", Wrong)
        rows, logits = generate.generate(model, [[3, 1, 4, 1, 5], [9, 2]], 9, 0.0)
    assert generate.largest_difference(model, rows, logits) > generate.LIMIT


def test_vision_learns() -> None:
    vision = load("vision")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, accuracy = vision.train(vision.parse(["--device", "cpu", "--steps", "50", "--batch", "32"]))
    finally:
        torch.set_num_threads(threads)
        del sys.modules["vision"]
    assert accuracy > 0.5, "a sixth would be chance"
    assert model.training
    images, labels = vision.make_images(40, torch.Generator().manual_seed(7))
    assert images.shape == (40, 3, 32, 32)
    assert set(labels.tolist()) == set(range(6))


def test_finetune_hf(
    train_gpt: ModuleType, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    script = load("finetune_hf")
    sizes = "--device cpu --steps 4 --warm-up 1 --turn 2 --batch 2 --context 16 --hidden 32 --layers 1 --heads 2"
    monkeypatch.setattr(sys, "argv", ["finetune_hf.py", *sizes.split(), "--data", str(data)])
    script.main()
    output = capsys.readouterr().out
    assert re.search(r"norm +LlamaRMSNorm +fastkern.rms_norm +3 ", output), output
    assert re.search(r"fastkern: \d+\.\d\dx the speed of transformers$", output, re.M)
    assert "the same bits as a model that was never patched" in output
    monkeypatch.setattr(script, "LIMIT", -1.0)
    with pytest.raises(SystemExit, match="the losses of fastkern and transformers differ"):
        script.main()
