# SPDX-License-Identifier: Apache-2.0
"""``python -m fastkern.bench`` from end to end on the CPU, and its parts where they decide something."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")

from fastkern import specs
from fastkern.bench import attention_fp8, markdown, optimizers, tables
from fastkern.bench import html as report_page
from fastkern.bench.accuracy import check
from fastkern.bench.cases import Case
from fastkern.bench.cli import app, select
from fastkern.bench.compare import compare
from fastkern.bench.results import Record, Results, speedup
from fastkern.bench.timing import EVENTS, GRAPH, Ceiling, Clock
from typer.testing import CliRunner, Result

CPU = torch.device("cpu")
SMALL = dataclasses.replace(
    specs.RMS_NORM, bench_dims=({"M": 1, "N": 64}, {"M": 4, "N": 96}), cpu_bench_dims=(), peers={}
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # thread pools of parallel test processes would wait for each other
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command line on the given spec table."""
    monkeypatch.setattr(Clock, "copy_bandwidth", lambda self: Ceiling(gbps=10.0, bytes=2**20))
    monkeypatch.setattr(Clock, "matmul_rate", lambda self, dtype: 0.1)

    def run(*arguments: object, table: tuple[specs.OpSpec, ...] = (SMALL,)) -> Result:
        monkeypatch.setattr(specs, "SPECS", table)
        monkeypatch.setattr(optimizers, "SPECS", ())
        monkeypatch.setattr(attention_fp8, "SPECS", ())
        return CliRunner().invoke(app, [*map(str, arguments), "--quick", "--device", "cpu"])

    return run


def changed(**changes: Any) -> tuple[specs.OpSpec, ...]:
    return (dataclasses.replace(SMALL, **changes),)


def document(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


# ---- the whole command -----------------------------------------------------------------------------------------------


def test_files_agree(bench: Callable[..., Result], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = {name: tmp_path / "deep" / f"out.{name}" for name in ("json", "csv", "markdown", "html")}
    plots = tmp_path / "plots"
    files = [part for name, path in paths.items() for part in (f"--{name}", path)]
    result = bench("--only-run", "rms_norm", *files, "--plot", plots)
    assert result.exit_code == 0, result.output
    assert "Selected: rms_norm" in result.output
    assert "[1/1] benchmarking rms_norm" in result.output
    assert "Skipped: rms_norm torch.compile" in result.output

    found = document(paths["json"])
    assert found["schema"] == "fastkern-bench/1"
    for key in ("fastkern", "commit", "torch", "python", "device", "date", "argv", "peers", "driver"):
        assert key in found["environment"]
    assert {(r["direction"], r["provider"], r["size"]) for r in found["records"]} == {
        (d, p, s) for d in ("forward", "backward") for p in ("fastkern", "torch") for s in ("1x64", "4x96")
    }
    for r in found["records"]:
        assert r["correct"] is True
        assert r["method"] == "timer"
        assert r["gbps"] == pytest.approx(r["bytes"] / r["us"] / 1e3)
        assert r["percent_of_copy"] == pytest.approx(100 * r["gbps"] / found["ceiling"]["copy_gbps"])
        assert r["tflops"] == pytest.approx(r["flops"] / r["us"] / 1e6)
        assert (r["ceiling"], r["percent_of_ceiling"]) == ("copy", pytest.approx(r["percent_of_copy"]))
        m, n = r["dims"]["M"], r["dims"]["N"]
        assert r["bytes"] == 4 * ((2 * m * n + n) if r["direction"] == "forward" else (3 * m * n + 2 * n))
    assert all(h["no_grad_us"] > 0 and h["with_grad_us"] > 0 for h in found["host"])
    assert all(m["forward_bytes"] is None for m in found["memory"])

    with paths["csv"].open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(found["records"])
    for line, r in zip(lines, found["records"], strict=True):
        assert line["size"] == r["size"]
        assert float(line["us"]) == pytest.approx(r["us"])

    page = paths["markdown"].read_text(encoding="utf-8")
    assert "## norm" in page
    assert "rms_norm backward, float32" in page
    assert "not available" in page
    for direction in ("forward", "backward"):
        assert (plots / f"rms_norm_{direction}_float32.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (plots / f"rms_norm_{direction}_float32.svg").read_text(encoding="utf-8")
    assert_whole_report(paths["html"].read_text(encoding="utf-8"), ["rms_norm"])
    summary = result.output.rpartition("Summary")[2]
    assert ["rms_norm", "float32", "4x96", "bwd"] in [line.split()[:4] for line in summary.splitlines()]


class _Tags(HTMLParser):
    """Which tags are open at the end, which were closed out of order, and what the page would load."""

    void = ("meta", "line", "br", "link", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.loads: list[str] = []
        self.points: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.void:
            self.open.append(tag)
        self.loads += [f"{tag} {k}" for k, v in attrs if k == "src" or (k == "href" and not (v or "").startswith("#"))]
        self.points += [v or "" for k, v in attrs if tag == "polyline" and k == "points"]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open = self.open[:-1] if tag not in self.void else self.open

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def assert_whole_report(text: str, operators: list[str]) -> None:
    tags = _Tags()
    tags.feed(text)
    assert (tags.open, tags.wrong) == ([], [])
    assert tags.loads == [], "the report needs other files"
    assert "url(" not in text
    assert "prefers-color-scheme: dark" in text
    for name in operators:
        assert f'<section id="{name}">' in text
    numbers = [float(n) for points in tags.points for n in points.replace(",", " ").split()]
    assert numbers
    assert all(math.isfinite(n) and 0 <= n < 2000 for n in numbers)


def test_forward_only_leaves_backward_out(bench: Callable[..., Result], tmp_path: Path) -> None:
    def no_backward(*_: object) -> int:
        raise AssertionError("backward was asked for")

    table = changed(traffic=lambda inputs, backward: no_backward() if backward else 1)
    result = bench("--forward-only", "--json", tmp_path / "out.json", table=table)
    assert result.exit_code == 0, result.output
    found = document(tmp_path / "out.json")
    assert {r["direction"] for r in found["records"]} == {"forward"}
    assert all(h["with_grad_us"] is None for h in found["host"])
    assert "backward" not in result.output.replace("forward + backward", "")


@pytest.mark.parametrize("name", ["rms_nom", "norms", "rms_norm,nothing", ","])
def test_unknown_operator(bench: Callable[..., Result], name: str) -> None:
    result = bench("--only-run", name)
    assert result.exit_code == 2
    assert "rms_norm (norm)" in " ".join(result.output.replace("│", " ").split())


def test_an_operators_name_wins_over_its_familys(monkeypatch: pytest.MonkeyPatch) -> None:
    row = dataclasses.replace
    table = (row(SMALL, name="softmax", family="softmax"), row(SMALL, name="logsumexp", family="softmax"), SMALL)
    monkeypatch.setattr(specs, "SPECS", table)
    monkeypatch.setattr(optimizers, "SPECS", ())
    monkeypatch.setattr(attention_fp8, "SPECS", ())
    assert [s.name for s in select("softmax")[0]] == ["softmax"]
    assert [s.name for s in select("family:softmax")[0]] == ["softmax", "logsumexp"]
    assert [s.name for s in select("", "softmax")[0]] == ["softmax", "logsumexp"]
    assert [s.name for s in select("logsumexp, norm")[0]] == ["logsumexp", "rms_norm"]
    assert len(select("")[0]) == 3


def test_selection_by_family(bench: Callable[..., Result]) -> None:
    other = dataclasses.replace(SMALL, name="other", family="else")
    result = bench("--only-run", "norm", "--forward-only", table=(SMALL, other))
    assert result.exit_code == 0, result.output
    assert "Selected: rms_norm\n" in result.output
    assert "Skipped: other (not named by --only-run)" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--dtype", "int8"), "float32, float16, bfloat16"), (("--providers", "nobody"), "torch.compile")],
)
def test_bad_options(bench: Callable[..., Result], arguments: tuple[str, ...], words: str) -> None:
    result = bench(*arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", " ").split())


def test_no_such_device() -> None:
    assert CliRunner().invoke(app, ["--device", "nowhere"]).exit_code == 2


def test_dtypes(bench: Callable[..., Result], tmp_path: Path) -> None:
    table = changed(dtypes=(torch.float32, torch.bfloat16))
    result = bench("--dtype", "bf16,float16", "--forward-only", "--json", tmp_path / "out.json", table=table)
    assert result.exit_code == 0, result.output
    assert {r["dtype"] for r in document(tmp_path / "out.json")["records"]} == {"bfloat16"}
    assert "Skipped: rms_norm float16" in result.output


def test_list(bench: Callable[..., Result]) -> None:
    result = bench("--list")
    assert result.exit_code == 0
    assert "1x64, 4x96" in result.output
    assert "Running" not in result.output


# ---- correctness before timing ---------------------------------------------------------------------------------------


def _wrong_forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return specs.RMS_NORM.function(x, weight, eps) * 1.001


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        return dy * 1.001


def _wrong_backward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _WrongGradient.apply(specs.RMS_NORM.function(x, weight, eps))


def _raises(**inputs: Any) -> torch.Tensor:
    raise ValueError("not today")


@pytest.mark.parametrize(
    ("function", "words"),
    [(_wrong_forward, "output"), (_wrong_backward, "gradient of x"), (_raises, "not today")],
)
def test_wrong_operator_is_failed_and_not_timed(
    bench: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    function: Callable[..., torch.Tensor],
    words: str,
) -> None:
    monkeypatch.setattr(Clock, "time", lambda *_: pytest.fail("a wrong operator was timed"))
    out = ("--json", tmp_path / "out.json", "--markdown", tmp_path / "out.md")
    result = bench(*out, table=changed(function=function))
    assert result.exit_code == 1
    assert "FAILED: rms_norm" in result.output
    assert words in result.output
    found = document(tmp_path / "out.json")
    assert words in found["failures"]["rms_norm float32"]
    assert all(r["us"] is None for r in found["records"])


def test_wrong_and_raising_peers_are_marked(bench: Callable[..., Result], tmp_path: Path) -> None:
    peers = {"sloppy": _wrong_forward, "broken": _raises}
    result = bench("--forward-only", "--verbose", "--json", tmp_path / "out.json", table=changed(peers=peers))
    assert result.exit_code == 0, result.output
    assert "less accurate than the rule allows" in result.output
    assert "not today" in result.output
    found = {r["provider"]: r for r in document(tmp_path / "out.json")["records"] if r["size"] == "4x96"}
    assert found["sloppy"]["correct"] is False
    assert found["sloppy"]["us"] > 0
    assert found["broken"]["us"] is None
    assert "not today" in found["broken"]["error"]
    assert found["fastkern"]["correct"] is True


def test_missing_peers(bench: Callable[..., Result], tmp_path: Path) -> None:
    def absent(**inputs: Any) -> torch.Tensor:
        import a_package_that_nobody_has

        return a_package_that_nobody_has.rms_norm(**inputs)

    table = changed(peers={"absent": absent})
    result = bench("--forward-only", "--json", tmp_path / "out.json", table=table)
    assert result.exit_code == 0, result.output
    assert "Not installed: absent" in result.output
    found = document(tmp_path / "out.json")
    assert "a_package_that_nobody_has" in found["not_installed"]["absent"]
    assert "absent" not in {r["provider"] for r in found["records"]}


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_says_what_to_install(missing: str) -> None:
    code = (
        f"import sys, runpy; sys.modules[{missing!r}] = None; runpy.run_module('fastkern.bench', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "pip install fastkern[bench]" in done.stderr


def test_a_reference_that_is_not_exact_is_no_truth() -> None:
    def rounded(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return specs.RMS_NORM.reference(x, weight, eps).float()

    case = Case(dataclasses.replace(SMALL, reference=rounded), {"M": 2, "N": 8}, torch.float32, CPU)
    with pytest.raises(RuntimeError, match=r"rms_norm: the reference's output in float64 is torch\.float32"):
        check(case, {"fastkern": SMALL.function}, ["forward"])


# ---- against an earlier run ------------------------------------------------------------------------------------------


def _document(**times: float) -> dict[str, Any]:
    """Times of ours at two sizes, bounded by memory and by arithmetic."""
    records = [
        {"op": "a", "dtype": "float32", "size": size, "direction": "forward", "provider": "fastkern", "us": us,
         "ceiling": "matmul" if size == "large" else "copy"}
        for size, us in times.items()
    ]  # fmt: skip
    ceiling = {"copy_gbps": 100.0, "matmul_tflops": {"float32": 1.0}}
    return {"schema": "fastkern-bench/1", "ceiling": ceiling, "records": records, "environment": {"device": "CPU"}}


def test_comparison() -> None:
    old, new = _document(small=10.0, large=100.0, gone=1.0), _document(small=10.4, large=94.0)
    found = compare(old, new, 5, "old.json", whole=False)
    assert (found.slower, found.lost, found.failed) == ([], [], False)
    assert [round(c.percent, 1) for c in found.faster] == [-6.0]
    assert compare(old, new, 3, "old.json", whole=False).slower[0].key[2] == "small"
    assert compare(old, new, 5, "old.json", whole=True).lost == [("a", "float32", "gone", "forward")]
    new["ceiling"]["copy_gbps"] = 110.0  # of a faster machine, which explains nothing of what arithmetic bounds
    assert [(c.key[2], round(c.percent, 1)) for c in compare(old, new, 5, "old.json", whole=False).slower] == [
        ("small", 14.4)
    ]
    assert compare(_document(), new, 5, "old.json", whole=False).failed


def test_a_slower_run_fails(bench: Callable[..., Result], tmp_path: Path) -> None:
    old, page = tmp_path / "old.json", tmp_path / "out.html"
    one = changed(bench_dims=({"M": 1, "N": 64},))
    assert bench("--forward-only", "--json", old, table=one).exit_code == 0
    same = bench("--forward-only", "--compare", old, "--threshold", 1e6, table=one)
    assert same.exit_code == 0, same.output
    assert "1 measurements compared" in same.output
    then = document(old)
    for record in then["records"]:
        record["us"] /= 1e4
    old.write_text(json.dumps(then), encoding="utf-8")
    slower = bench("--forward-only", "--compare", old, "--html", page, table=one)
    assert slower.exit_code == 1
    assert "% slower" in slower.output
    assert "1 slower" in page.read_text(encoding="utf-8")
    then["environment"]["device"] = "another"
    old.write_text(json.dumps(then), encoding="utf-8")
    assert "was measured on another" in " ".join(bench("--compare", old).output.replace("│", " ").split())
    old.write_text("{}", encoding="utf-8")
    assert bench("--compare", old).exit_code == 2


# ---- the parts -------------------------------------------------------------------------------------------------------


def _record(provider: str, us: float | None, method: str = EVENTS, **changes: Any) -> Record:
    record = Record("rms_norm", "norm", {"M": 2, "N": 3}, "2x3", "float32", "forward", provider, 1000, 10, correct=True)
    if us is not None:
        record.timed(us, method, Ceiling(100.0, 1))
    return dataclasses.replace(record, **changes)


def _results(*records: Record) -> Results:
    environment = {
        "device": "GPU", "device_type": "cuda", "driver": "1.2", "date": "2026-01-02T03:04:05Z", "torch": "2.10",
        "fastkern": "0.1", "commit": "abc", "packages": {}, "peers": {}, "options": {"quick": False},
    }  # fmt: skip
    return Results(environment, Ceiling(100.0, 1), list(records), selected=["rms_norm"])


def test_best_peer_counts_inaccurate_ones_and_stays_within_a_method() -> None:
    row = {
        "fastkern": _record("fastkern", 2.0, GRAPH),
        "torch": _record("torch", 4.0, GRAPH),
        "a": _record("a", 3.0, GRAPH, correct=False),
        "b": _record("b", 1.0, EVENTS),
        "c": _record("c", None),
    }
    assert speedup(row) == (1.5, "a")
    (table,) = tables.latency(_results(*row.values()), "rms_norm")
    cells = dict(zip(table.columns, table.rows[0], strict=True))
    assert cells["a"] == "3.00!"
    assert cells["b"] == "1.00*"
    assert cells["c"] == "-"
    assert cells["vs best"] == "1.50x a"
    assert cells["method"] == "graph"
    assert table.best == [table.columns.index("fastkern")]


def test_what_arithmetic_bounds_is_measured_in_tflops() -> None:
    record = _record("fastkern", None)
    record.flops = 2_000_000
    record.timed(4.0, EVENTS, Ceiling(100.0, 1, {"float32": 1.0}))
    assert (record.ceiling, record.tflops, record.percent_of_ceiling) == ("matmul", 0.5, 50.0)
    results = _results(record)
    results.ceiling = Ceiling(100.0, 1, {"float32": 1.0})
    (table,) = tables.latency(results, "rms_norm")
    cells = dict(zip(table.columns, table.rows[0], strict=True))
    assert (cells["TFLOP/s"], cells["% ceiling"]) == ("0.5", "50")
    text = report_page.page(results)
    assert_whole_report(text, ["rms_norm"])
    assert "matrix product, 1 TFLOP/s" in text


def test_markdown_is_updated_in_place(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n\nWords.\n\n## norm\n\nMore words.\n\n## softmax\n\nOther words.\n", encoding="utf-8")
    markdown.update(page, _results(_record("fastkern", 2.0), _record("torch", 3.0)))
    once = page.read_text(encoding="utf-8")
    assert once.index("More words.") < once.index("rms_norm forward") < once.index("## softmax")
    assert "Measured 2026-01-02 on one GPU (driver 1.2, torch 2.10) with fastkern 0.1, commit abc." in once
    markdown.update(page, _results(_record("fastkern", 2.0), _record("torch", 3.0)))
    assert page.read_text(encoding="utf-8") == once
    markdown.update(page, _results(_record("fastkern", 7.0), _record("torch", 3.0)))
    again = page.read_text(encoding="utf-8")
    assert again.count("<!-- fastkern-bench: rms_norm on cuda -->") == 1
    assert "| 7.00 |" in again
    assert "| 2.00 |" not in again
    assert again.endswith("Other words.\n")


def test_markdown_keeps_what_was_not_measured(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    markdown.update(page, _results(_record("fastkern", 2.0)))
    cpu = _results(_record("fastkern", 9.0))
    cpu.environment |= {"device_type": "cpu", "device": "CPU", "torch_threads": 2}
    markdown.update(page, cpu)
    markdown.update(page, _results(_record("fastkern", None, error="wrong")))
    text = page.read_text(encoding="utf-8")
    assert "2.00" in text
    assert "9.00" in text
    assert text.count("## norm\n") == 1


def test_short_rows_are_timed_by_graph_on_cuda_alone() -> None:
    clock = Clock(CPU)
    assert not clock.short(1.0, 5.0)
    clock.cuda = True
    assert clock.short(1.0, 5.0)
    assert clock.short(15.0, 19.0)
    assert not clock.short(15.0, 22.0)
    assert clock.short(1.0, 60.0)  # a small backward whose host time shows
    assert not clock.short(1.0, 300.0)  # few bytes, much arithmetic


def test_host_time_is_the_time_of_a_call() -> None:
    calls = []
    us = Clock(CPU, quick=True).host(lambda: calls.append(1))
    assert 0 < us < 1000
    assert len(calls) == 20 * 6 + 2
    long = Clock(CPU, quick=True).host(lambda: (calls.append(1), time.sleep(2e-3)))
    assert long > 1500
    assert len(calls) == 20 * 6 + 2 + 8


def test_timing_leaves_preparation_out() -> None:
    prepared = []

    def prepare() -> Callable[[], None]:
        prepared.append(1)
        return lambda: None

    assert Clock(CPU, quick=True).time(prepare).us < 100
    assert prepared == [1]


def test_cases_share_inputs_and_gradients_between_providers() -> None:
    one, two = (Case(SMALL, {"M": 3, "N": 5}, torch.float32, CPU) for _ in range(2))
    assert torch.equal(one.inputs["x"], two.inputs["x"])
    assert torch.equal(one.grad_outputs[0], two.grad_outputs[0])
    assert not one.inputs["x"].requires_grad
    backward = one.backward(SMALL.baseline)
    first, second = backward(), backward()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_copy_bandwidth_counts_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    ceiling = Clock(CPU, quick=True).copy_bandwidth()
    assert ceiling.gbps > 0.1
    assert ceiling.us(int(ceiling.gbps * 1e9)) == pytest.approx(1e6)


def test_compiled_reference_is_timed_forward_and_backward(bench: Callable[..., Result], tmp_path: Path) -> None:
    def eager_compile(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        return function

    # What torch.compile makes of the reference is torch's matter; that its column is filled is ours.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", eager_compile)
        result = bench("--providers", "torch,torch.compile", "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    compiled = [r for r in document(tmp_path / "out.json")["records"] if r["provider"] == "torch.compile"]
    assert len(compiled) == 4
    assert all(r["us"] > 0 for r in compiled)
