# SPDX-License-Identifier: Apache-2.0
"""``python -m fastkern.doctor``: runs operators and an optimizer on every device, and says in words what is wrong.

What is looked at: one installation with all its parts, torch, the driver, devices and whether this build has code for
them; then on each device a norm, attention, a loss and pointwise functions, forward and backward, held to the rule of
the tests, and steps of AdamW beside torch's. The exit status is 1 if anything is wrong. Where ``import fastkern`` fails
the message of its ImportError is the diagnosis, and nothing here runs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fastkern
from fastkern import _core, info

OK, NOTE, WRONG = "ok", "note", "wrong"

# Operators of the table that are run, and sizes that take every path of a call but no time.
TRIED: dict[str, dict[str, int]] = {
    "rms_norm": {"M": 33, "N": 257},
    "flash_attn": {"B": 1, "S": 37, "T": 37, "H": 2, "D": 64},
    "cross_entropy": {"M": 17, "V": 1000},
    "swiglu": {"M": 9, "N": 128},
    "gelu": {"M": 9, "N": 130},
}
MINIMUM_DRIVER = "580"


@dataclass(frozen=True)
class Finding:
    """One thing looked at: ``state`` is "ok", "note" (worth knowing) or "wrong"; ``remedy`` says what to do."""

    subject: str
    state: str
    text: str
    remedy: str = ""


# ---- the installation ------------------------------------------------------------------------------------------------


def installation() -> Iterator[Finding]:
    """Version, parts, and whether there is another installation that may be meant."""
    build = _core.build_info()
    here = Path(fastkern.__file__).parent
    yield Finding("fastkern", OK, f"{build['version']} (commit {build['commit']}) in {here}")
    missing = [name for name, path in info.libraries().items() if path.endswith("(missing)")]
    if missing:
        text = f"{', '.join(missing)} missing"
        yield Finding("libraries", WRONG, text, "incomplete: pip install --force-reinstall fastkern")
    else:
        yield Finding("libraries", OK, fastkern.get_library_dir())
    others = other_installations(here, sys.path)
    if others:
        text = f"also in {', '.join(map(str, others))}; the one above is used"
        yield Finding("installations", WRONG, text, "uninstall all of them, then install one: pip uninstall fastkern")
    versions = {d.version for d in importlib.metadata.distributions(name="fastkern")}
    if versions - {build["version"]}:
        text = f"the package says {', '.join(sorted(versions))}, its library {build['version']}"
        yield Finding("versions", WRONG, text, "build or install again: the parts are of different versions")


def other_installations(here: Path, places: Sequence[str]) -> list[Path]:
    """Directories on the module path with another fastkern in them that has compiled parts."""
    found = [Path(place or ".").resolve() / "fastkern" for place in places]
    compiled = [p for p in dict.fromkeys(found) if p.is_dir() and any(p.glob("_core*.so"))]
    core = Path(_core.__file__).resolve().parent
    return [p for p in compiled if p not in (here.resolve(), core)]


# ---- torch, driver, devices ------------------------------------------------------------------------------------------


def machine() -> Iterator[Finding]:
    """Torch, driver and devices, and whether they fit together."""
    yield Finding("torch", OK, f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})")
    build, driver = _core.build_info(), info.driver()
    if driver is None:
        yield Finding("driver", NOTE, "no NVIDIA driver: operators run on the CPU")
        return
    if not build["cuda"]:
        yield Finding("driver", NOTE, f"{driver}, but this build has no CUDA kernels: operators run on the CPU")
        return
    if torch.version.cuda is None:
        remedy = "install a CUDA build of torch to use the GPU: https://pytorch.org/get-started/locally"
        yield Finding("torch", WRONG, "is a build for the CPU, on a machine with an NVIDIA driver", remedy)
    yield driver_finding(driver, _core.driver_version(), build["cuda_version"])
    yield from device_findings(driver)


def driver_finding(driver: str, newest: tuple[int, int] | None, toolkit: str) -> Finding:
    """Whether the driver runs what the library was compiled with."""
    needed = int(toolkit.split(".")[0])
    if newest is None:
        text = f"{driver} does not answer"
        return Finding("driver", WRONG, text, "see whether nvidia-smi works; in a container, pass the GPU on")
    text = f"{driver}, for CUDA up to {newest[0]}.{newest[1]}"
    if newest[0] < needed:
        remedy = f"update the driver to {MINIMUM_DRIVER} or newer"
        return Finding("driver", WRONG, f"{text}: too old for CUDA {toolkit}", remedy)
    return Finding("driver", OK, text)


def device_findings(driver: str) -> Iterator[Finding]:
    """The GPUs that are visible, each with the code that serves it."""
    devices = info.devices()
    if not devices:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        because = f": CUDA_VISIBLE_DEVICES is {hidden!r}" if hidden is not None else ""
        remedy = "unset it" if because else "see what nvidia-smi lists; in a container, pass the GPU on"
        yield Finding("devices", WRONG, f"driver {driver}, but no GPU is visible{because}", remedy)
    for d in devices:
        name = f"cuda:{d['index']}"
        capability = ".".join(map(str, d["capability"]))
        text = f"{d['name']}, compute capability {capability}"
        if d["code"] is None:
            remedy = "build with CUDAARCHS for it, or install a wheel that has it"
            known = " ".join(_core.architectures())
            yield Finding(name, WRONG, f"{text}: this build has code for {known} alone", remedy)
        else:
            yield Finding(name, OK, f"{text}, served by {d['code']}")
    if torch.version.cuda is not None and torch.cuda.device_count() != len(devices):
        text = f"torch sees {torch.cuda.device_count()} GPUs, fastkern {len(devices)}"
        yield Finding("devices", WRONG, text, "set CUDA_VISIBLE_DEVICES before Python starts, not in the program")


def usable_devices() -> list[str]:
    """The CPU and every GPU that both torch and this build can use."""
    served = [d["index"] for d in info.devices() if d["code"]] if _core.build_info()["cuda"] else []
    return ["cpu", *(f"cuda:{i}" for i in served if torch.version.cuda and i < torch.cuda.device_count())]


# ---- operators -------------------------------------------------------------------------------------------------------


def operators(device: str) -> Iterator[Finding]:
    """Forward and backward of a few operators, in every type they have, beside torch and float64."""
    from fastkern.specs import SPECS

    rows = {spec.name: spec for spec in SPECS}
    for name, dims in TRIED.items():
        spec = rows[name].benchmarked
        yield _tried(device, f"{name}, forward and backward", partial(_operator, spec, dims, device))
    yield _tried(device, "AdamW, two steps", partial(_optimizer, device))


def _tried(device: str, what: str, run: Callable[[], str]) -> Finding:
    subject = f"{device}: {what}"
    start = time.perf_counter()
    try:
        text = run()
    except Exception as error:  # whatever is wrong with the machine may show here
        words = " ".join(str(error).split())[:400] or "no message"
        return Finding(subject, WRONG, f"{type(error).__name__}: {words}", _remedy(error))
    return Finding(subject, OK, f"{text} ({1e3 * (time.perf_counter() - start):.0f} ms)")


def _remedy(error: Exception) -> str:
    if isinstance(error, AssertionError):
        return "a wrong result: report it with the output of python -m fastkern.info"
    if isinstance(error, torch.OutOfMemoryError):
        return "the device's memory is taken: see nvidia-smi"
    return "docs/install.md says what error messages mean"


def _operator(spec: Any, dims: dict[str, int], device: str) -> str:
    from fastkern.bench.accuracy import check
    from fastkern.bench.cases import Case

    for dtype in spec.dtypes:
        case = Case(spec, dims, dtype, torch.device(device))
        for direction, verdict in check(case, {"fastkern": spec.function}, ("forward", "backward"))["fastkern"].items():
            where = f"{direction}, {str(dtype).removeprefix('torch.')}: {verdict.error}"
            if verdict.raised:
                raise RuntimeError(where)
            if not verdict.correct:
                raise AssertionError(where)
    return f"as accurate as torch in {', '.join(str(d).removeprefix('torch.') for d in spec.dtypes)}"


def _optimizer(device: str) -> str:
    from fastkern import optim
    from fastkern.specs import assert_accurate

    start = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (1, 257, 1000)]
    trained = []
    for make, dtype in (
        (optim.AdamW, torch.float32),
        (torch.optim.AdamW, torch.float32),
        (torch.optim.AdamW, torch.float64),
    ):
        parameters = [torch.nn.Parameter(t.to(device, dtype, copy=True)) for t in start]
        optimizer = make(parameters, lr=1e-2, weight_decay=0.1)
        for _ in range(2):
            for p in parameters:
                p.grad = p.detach().cos()
            optimizer.step()
        trained.append(parameters)
    for ours, theirs, exact in zip(*trained, strict=True):
        assert_accurate(ours, theirs, exact, 2.0, what="parameter after two steps")
    return "as accurate as torch.optim.AdamW in float32"


# ---- the command -----------------------------------------------------------------------------------------------------


def examine(devices: Sequence[str] | None = None) -> Iterator[Finding]:
    """Everything, each finding as it is made. ``devices``: which to run operators on; None: all that can be used."""
    yield from installation()
    yield from machine()
    for device in usable_devices() if devices is None else devices:
        yield from operators(device)


def line(finding: Finding) -> str:
    """A finding for people."""
    marks = {OK: "ok   ", NOTE: "note ", WRONG: "WRONG"}
    text = f"{marks[finding.state]}  {finding.subject}: {finding.text}"
    return f"{text}\n       -> {finding.remedy}" if finding.remedy and finding.state != OK else text


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastkern.doctor", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", action="append", help="run operators on this device alone; may be repeated")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    chosen = parser.parse_args(arguments)
    for device in chosen.device or ():
        if device not in usable_devices():
            parser.error(f"--device {device}: expected one of {', '.join(usable_devices())}")
    findings = []
    for finding in examine(chosen.device):
        findings.append(finding)
        if not chosen.json:
            print(line(finding), flush=True)
    wrong = sum(f.state == WRONG for f in findings)
    if chosen.json:
        print(json.dumps({"healthy": wrong == 0, "findings": [asdict(f) for f in findings]}, indent=2))
    else:
        print(f"{wrong} of {len(findings)} things are wrong" if wrong else f"All {len(findings)} things are well.")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
