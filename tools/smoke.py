# SPDX-License-Identifier: Apache-2.0
"""Does the installed package work here? Prints "python|torch|device|ok ..." or the reason."""

from __future__ import annotations

import platform
import sys
import time

import torch


def main() -> int:
    """Import, one operator forward and backward on each device, and what the build says of itself."""
    begin = time.perf_counter()
    import fastkern

    import_ms = 1e3 * (time.perf_counter() - begin)
    if torch.cuda.is_initialized():
        raise SystemExit("importing fastkern initialised CUDA")
    devices = ["cpu"]
    if torch.cuda.is_available() and fastkern._core.build_info()["cuda"]:
        devices.append("cuda")
    for device in devices:
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
            torch.manual_seed(0)
            x = torch.randn(17, 333, device=device, dtype=dtype, requires_grad=True)
            weight = torch.randn(333, device=device, dtype=dtype, requires_grad=True)
            upstream = torch.randn(17, 333, device=device, dtype=dtype)
            mine = torch.autograd.grad(fastkern.rms_norm(x, weight, eps=1e-6), (x, weight), upstream)
            plain = torch.nn.functional.rms_norm(x, (333,), weight, 1e-6)
            torch.testing.assert_close(fastkern.rms_norm(x, weight, eps=1e-6), plain, rtol=tolerance, atol=tolerance)
            theirs = torch.autograd.grad(plain, (x, weight), upstream)
            for one, other in zip(mine, theirs, strict=True):
                torch.testing.assert_close(one, other, rtol=10 * tolerance, atol=10 * tolerance)
    device = torch.cuda.get_device_name() if "cuda" in devices else "CPU"
    print(f"{platform.python_version()}|{torch.__version__}|{device}|ok, import {import_ms:.0f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
