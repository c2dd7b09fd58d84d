# SPDX-License-Identifier: Apache-2.0
"""``python -m fastkern.info``: what this installation is, what the machine has, and which kernels a call would take."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fastkern
from fastkern import _core

PLAN_SIZES = (128, 1024, 4096, 8192, 32768, 262144)
CHUNK_CLASSES, CHUNK_ROWS = (32000, 128256, 262144), (4096, 16384, 65536)
PACKAGES = ("triton",)


def package_version(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    """Version of the NVIDIA kernel driver, e.g. ``"580.159.04"``, or None; CUDA is not initialised."""
    try:
        found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", Path("/proc/driver/nvidia/version").read_text(encoding="utf-8"))
        if found:
            return found[1]
    except OSError:
        pass
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


def cpu_name() -> str:
    """The processor's marketing name where the system tells it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def code_for(capability: tuple[int, int], architectures: Sequence[str]) -> str | None:
    """The compiled-in architecture that runs on a device of ``capability``; None when the device is not served.

    ``"90a"`` runs on 9.0 alone; ``"80"`` on 8.0 and the later 8.x. The newest plain architecture is also there as PTX,
    which the driver compiles for devices newer than it.
    """
    major, minor = capability
    if f"{major}{minor}a" in architectures:
        return f"sm_{major}{minor}a"
    plain = sorted((int(a) for a in architectures if a.isdigit()), reverse=True)
    for arch in plain:
        if arch // 10 == major and arch % 10 <= minor:
            return f"sm_{arch}"
    if plain and plain[0] <= major * 10 + minor:
        return f"PTX of compute_{plain[0]}, compiled by the driver at first use"
    return None


def devices() -> list[dict[str, Any]]:
    """CUDA devices with their capability and the code that serves them. Initialises CUDA."""
    found = []
    for index in range(_core.device_count()):
        device = dict(_core.device_info(index))
        device["index"] = index
        device["code"] = code_for(device["capability"], _core.architectures())
        found.append(device)
    return found


def environment() -> dict[str, Any]:
    """The facts a measurement or a bug report needs: versions, build, processor, devices. Initialises CUDA."""
    build = _core.build_info()
    cuda_driver = _core.driver_version()
    return {
        "fastkern": build["version"],
        "commit": build["commit"],
        "compiler": build["compiler"],
        "cuda_toolkit": build["cuda_version"] or None,
        "architectures": build["architectures"],
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "driver": driver(),
        "driver_cuda": ".".join(map(str, cuda_driver)) if cuda_driver else None,
        "packages": {name: version for name in PACKAGES if (version := package_version(name))},
        "devices": devices(),
    }


def libraries() -> dict[str, str]:
    """Where the compiled parts lie."""
    directory = Path(fastkern.get_library_dir())
    places = {name: directory / name for name in ("libfastkern.so", "libfastkern_torch.so")}
    places["_core"] = Path(_core.__file__)
    places["include"] = Path(fastkern.get_include())
    places["cmake"] = Path(fastkern.get_cmake_dir())
    return {name: str(path) if path.exists() else f"{path} (missing)" for name, path in places.items()}


def plans(dtype: str = "bfloat16") -> dict[str, dict[str, dict[int, dict[str, Any]]]]:
    """For each operator whose launch is a function of a row alone, the launch on CUDA for a few row lengths.

    Empty in a build without CUDA.
    """
    from fastkern.specs import SPECS

    table: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for spec in SPECS if _core.build_info()["cuda"] else ():
        directions: dict[str, dict[int, dict[str, Any]]] = {}
        for direction, op in (("forward", spec.name), ("backward", f"{spec.name}_bwd")):
            try:
                launches = {n: _core.plan(op, n, dtype) for n in PLAN_SIZES}
            except ValueError:  # not one of those
                continue
            directions[direction] = {n: {**plan, "why": why(plan)} for n, plan in launches.items()}
        if directions:
            table[spec.name] = directions
    return table


def why(plan: dict[str, Any]) -> str:
    """What a row's launch says, in words."""
    if not plan["resident"]:
        return "too long to stay on the chip: read once more for each pass"
    if plan["blocks_per_row"] > 1:
        return f"shared by a cluster of {plan['blocks_per_row']} blocks"
    if plan["kernel"] == "norm_shared_kernel":
        return "longer than registers hold: waits in shared memory"
    if plan["rows_per_block"] > 1:
        return f"short: {plan['rows_per_block']} to a block"
    return "kept by one block between reading and writing it"


def same_plans() -> dict[str, list[str]]:
    """Operators that launch forward as another one does: norm -> those that add, drop out or quantise around it."""
    from fastkern.specs import SPECS

    names = [s.name for s in SPECS if s.family == "norm"]
    return {norm: [n for n in names if n != norm and norm in n] for norm in ("rms_norm", "layer_norm")}


def chunks(dtype: torch.dtype = torch.bfloat16) -> dict[int, dict[int, int]]:
    """Rows of logits that ``linear_cross_entropy`` has in memory at a time: classes -> rows of the call -> rows."""
    from fastkern.ops.linear_cross_entropy import chunk_of

    return {v: {m: chunk_of(m, v, dtype.itemsize) for m in CHUNK_ROWS} for v in CHUNK_CLASSES}


def report() -> dict[str, Any]:
    """Everything that ``python -m fastkern.info`` shows."""
    from fastkern.specs import SPECS

    return {
        "environment": environment(),
        "libraries": libraries(),
        "operators": {
            s.name: {"family": s.family, "dtypes": [str(d).removeprefix("torch.") for d in s.dtypes]} for s in SPECS
        },
        "plan_dtype": "bfloat16",
        "plans": plans(),
        "same_plans": same_plans(),
        "chunks": chunks(),
    }


def _device_lines(environment: dict[str, Any]) -> list[str]:
    if not environment["devices"]:
        reason = "no CUDA device" if environment["architectures"] else "this build has no CUDA kernels"
        return [f"  {reason}: operators run on the CPU"]
    lines = []
    for d in environment["devices"]:
        capability = ".".join(map(str, d["capability"]))
        served = f"served by {d['code']}" if d["code"] else "NOT served: no code for this architecture in this build"
        lines.append(
            f"  cuda:{d['index']}  {d['name']}, capability {capability}, {d['multiprocessors']} multiprocessors, "
            f"{d['memory_bytes'] / 2**30:.0f} GiB, L2 {d['l2_bytes'] / 2**20:.0f} MiB: {served}"
        )
    return lines


def _plan_lines(name: str, directions: dict[str, Any]) -> list[str]:
    lines = []
    for direction, plan in directions.items():
        lines.append(f"  {name} {direction}")
        lines.append(
            f"    {'N':>8}  {'kernel':<24}{'threads':>8}{'rows/block':>12}{'threads/row':>13}{'blocks/row':>12}"
            f"{'elements':>10}  a row is"
        )
        for n, p in plan.items():
            lines.append(
                f"    {n:>8}  {p['kernel']:<24}{p['threads_per_block']:>8}{p['rows_per_block']:>12}"
                f"{p['threads_per_row']:>13}{p['blocks_per_row']:>12}{p['elements_per_thread']:>10}"
                f"  {p['why']}"
            )
    return lines


def text(facts: dict[str, Any]) -> str:
    """``report()`` as plain text, for people."""
    e = facts["environment"]
    rows = {
        "fastkern": f"{e['fastkern']} (commit {e['commit']})",
        "built with": f"{e['compiler']}, " + (f"CUDA {e['cuda_toolkit']}" if e["cuda_toolkit"] else "no CUDA"),
        "architectures": " ".join(e["architectures"]) or "CPU only",
        "torch": f"{e['torch']} (CUDA {e['torch_cuda'] or 'none'})",
        "python": f"{e['python']} on {e['platform']}",
        "driver": f"{e['driver']} (CUDA up to {e['driver_cuda']})" if e["driver"] else "none",
        "processor": f"{e['cpu']}, {e['cpu_count']} CPUs, {e['torch_threads']} torch threads",
        "packages": ", ".join(f"{name} {version}" for name, version in e["packages"].items()) or "no triton",
    }
    lines = [f"{name:<14} {value}" for name, value in rows.items()]
    lines += ["", "Devices", *_device_lines(e)]
    lines += ["", "Libraries", *(f"  {name:<21} {path}" for name, path in facts["libraries"].items())]
    lines += ["", "Operators"]
    width = max(map(len, facts["operators"]))
    lines += [f"  {name:<{width}} {op['family']}: {', '.join(op['dtypes'])}" for name, op in facts["operators"].items()]
    if facts["plans"]:
        lines += ["", f"Launches on CUDA, compute capability 9.0, {facts['plan_dtype']}, rows of N elements"]
    for name, directions in facts["plans"].items():
        lines += _plan_lines(name, directions)
        if also := facts["same_plans"].get(name):
            lines.append(f"  forward of {', '.join(also)}: as {name}")
    lines += ["", f"linear_cross_entropy, {facts['plan_dtype']}: rows of logits in memory at a time"]
    lines.append(f"  {'classes':>8}" + "".join(f"{f'{m} rows':>14}" for m in CHUNK_ROWS))
    for classes, by_rows in facts["chunks"].items():
        lines.append(f"  {classes:>8}" + "".join(f"{rows:>14}" for rows in by_rows.values()))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastkern.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    chosen = parser.parse_args(arguments)
    facts = report()
    print(json.dumps(facts, indent=2) if chosen.json else text(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
