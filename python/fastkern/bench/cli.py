# SPDX-License-Identifier: Apache-2.0
"""The command line of ``python -m fastkern.bench``."""

from __future__ import annotations

import difflib
import importlib.util
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fastkern import _core, specs
from fastkern.bench import attention_fp8, markdown, optimizers, report, runner
from fastkern.bench import compare as comparing
from fastkern.bench import html as page
from fastkern.bench.cases import label, provider_names
from fastkern.bench.scope import Options, device_name, name_of
from fastkern.specs import OpSpec

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHORT_DTYPES = {"f32": "float32", "fp32": "float32", "f16": "float16", "fp16": "float16", "bf16": "bfloat16"}


def _words(text: str) -> list[str]:
    return [w.strip() for w in text.split(",") if w.strip()]


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def table() -> list[OpSpec]:
    """All rows: the operators of ``fastkern.specs``, attention in 8 bits and the optimizers."""
    return [*specs.SPECS, *attention_fp8.SPECS, *optimizers.SPECS]


def select(only_run: str, family: str = "") -> tuple[list[OpSpec], dict[str, str]]:
    """The operators that ``--only-run`` and ``--family`` name, and why the others are left out.

    A word of ``--only-run`` is an operator, else a family; ``family:softmax`` is a family whatever operators there are.
    """
    if not only_run.strip() and not family.strip():
        return table(), {}
    operators = {s.name for s in table()}
    families = {s.family for s in table()}
    words = _words(only_run) + [f"family:{name}" for name in _words(family)]
    names = {w for w in words if w in operators}
    whole = {w.removeprefix("family:") for w in words if w not in operators}
    unknown = sorted(whole - families)
    if unknown or not words:
        rows = ", ".join(f"{s.name} ({s.family})" for s in table())
        wrong = f"no operator or family named {', '.join(unknown)}." if unknown else "no operator named."
        hint = _nearest(unknown[0], sorted(operators | families)) if unknown else ""
        option = "--only-run" if only_run.strip() else "--family"
        raise typer.BadParameter(f"{wrong}{hint} There are: {rows}", param_hint=option)
    chosen = [s for s in table() if s.name in names or s.family in whole]
    return chosen, {s.name: "not named by --only-run" for s in table() if s not in chosen}


def _device(text: str) -> torch.device:
    usable = torch.cuda.is_available() and _core.build_info()["cuda"]
    try:
        device = torch.device(text or ("cuda" if usable else "cpu"))
    except RuntimeError as error:
        raise typer.BadParameter(f"{text!r} is not a device: cpu, cuda or cuda:N", param_hint="--device") from error
    if device.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{text!r}: fastkern runs on cpu and cuda", param_hint="--device")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise typer.BadParameter("torch finds no CUDA device", param_hint="--device")
        if not _core.build_info()["cuda"]:
            raise typer.BadParameter("this build of fastkern has no CUDA kernels", param_hint="--device")
        if importlib.util.find_spec("triton") is None:
            raise typer.BadParameter("timing on CUDA needs triton: pip install triton", param_hint="--device")
        if (device.index or 0) >= torch.cuda.device_count():
            raise typer.BadParameter(f"{text}: there are {torch.cuda.device_count()} devices", param_hint="--device")
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)  # do_bench and the peers use the current device
    return device


def _dtypes(text: str, device: torch.device) -> tuple[torch.dtype, ...]:
    names = _words(text) or ["bfloat16" if device.type == "cuda" else "float32"]
    full = [SHORT_DTYPES.get(n, n) for n in names]
    for given, name in zip(names, full, strict=True):
        if name not in DTYPES:
            raise typer.BadParameter(f"{given!r} is not one of {', '.join(DTYPES)}", param_hint="--dtype")
    return tuple(DTYPES[n] for n in dict.fromkeys(full))


def _providers(text: str, chosen: list[OpSpec]) -> tuple[str, ...]:
    names = _words(text)
    known = list(dict.fromkeys(name for spec in chosen for name in provider_names(spec)))
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(known)}", param_hint="--providers")
    return tuple(names)


def _baseline(path: Path | None, device: torch.device) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        document = comparing.load(path)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--compare") from error
    here, there = device_name(device), document["environment"]["device"]
    if here != there:
        raise typer.BadParameter(f"{path} was measured on {there}, this is {here}", param_hint="--compare")
    return document


def _list() -> None:
    for s in table():
        typer.echo(f"{s.name} ({s.family})")
        typer.echo(f"  dtypes: {', '.join(name_of(d) for d in s.dtypes)}")
        typer.echo(f"  sizes ({' x '.join(s.bench_dims[0])}): {', '.join(label(d) for d in s.bench_dims)}")
        typer.echo(f"  providers: {', '.join(provider_names(s))}")


@app.command()
def main(
    only_run: Annotated[
        str, typer.Option(help="operators or families, separated by commas; family:NAME where both have the name")
    ] = "",
    family: Annotated[str, typer.Option(help="whole families, separated by commas")] = "",
    forward_only: Annotated[bool, typer.Option("--forward-only", help="leave backward out")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="say why a cell is empty")] = False,
    device: Annotated[str, typer.Option(help="cuda, cuda:N or cpu (default: cuda if there is one)")] = "",
    dtype: Annotated[str, typer.Option(help="separated by commas (default: bfloat16 on cuda, float32 on cpu)")] = "",
    providers: Annotated[str, typer.Option(help="columns beside ours, separated by commas (default: all)")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="small sizes, few repetitions")] = False,
    json: Annotated[Path | None, typer.Option(help="write everything as one JSON document")] = None,
    csv: Annotated[Path | None, typer.Option(help="write the records as CSV")] = None,
    html: Annotated[Path | None, typer.Option(help="write a report to look at, in one file")] = None,
    plot: Annotated[Path | None, typer.Option(help="directory for PNG and SVG charts")] = None,
    markdown_path: Annotated[Path | None, typer.Option("--markdown", help="write the tables into this page")] = None,
    compare: Annotated[
        Path | None, typer.Option(help="an earlier --json document; what is slower than in it fails the run")
    ] = None,
    threshold: Annotated[float, typer.Option(min=0, help="percent that --compare allows")] = 5.0,
    list_: Annotated[bool, typer.Option("--list", help="list operators, sizes and providers, and stop")] = False,
) -> None:
    """Check and time fastkern's operators beside every installed peer.

    Every provider is checked against a float64 reference before it is timed. The exit status is 1 when one of our
    operators is wrong or, with --compare, slower than it was.
    """
    if list_:
        _list()
        return
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise typer.BadParameter("needs matplotlib: pip install fastkern[bench]", param_hint="--plot")
    chosen, skipped = select(only_run, family)
    where = _device(device)
    baseline = _baseline(compare, where)
    options = Options(where, _dtypes(dtype, where), forward_only, quick, _providers(providers, chosen))

    console = report.console()
    reporter = report.ConsoleReporter(console, verbose)
    reporter.line(f"Selected: {', '.join(s.name for s in chosen)}")
    for why in dict.fromkeys(skipped.values()):
        reporter.line(f"Skipped: {', '.join(name for name, w in skipped.items() if w == why)} ({why})")
    results = runner.run(chosen, options, reporter)
    results.skipped = {**skipped, **results.skipped}

    comparison = None
    if baseline is not None:
        whole = not (skipped or forward_only or quick or dtype)
        comparison = comparing.compare(baseline, results.document(), threshold, str(compare), whole)
    written = []
    if json is not None:
        report.write_json(json, results)
        written.append(json)
    if csv is not None:
        report.write_csv(csv, results)
        written.append(csv)
    if markdown_path is not None:
        markdown.update(markdown_path, results)
        written.append(markdown_path)
    if html is not None:
        page.write(html, results, comparison)
        written.append(html)
    if plot is not None:
        from fastkern.bench.plot import write_plots

        written += write_plots(plot, results)
    for path in written:
        reporter.line(f"Wrote {path}")
    report.print_environment(console, results.environment)
    report.print_results(console, results)
    if comparison is not None:
        report.print_table(console, comparison.table())
    if results.failures or (comparison is not None and comparison.failed):
        raise typer.Exit(1)
