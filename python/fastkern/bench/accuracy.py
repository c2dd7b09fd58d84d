# SPDX-License-Identifier: Apache-2.0
"""Whether a provider computes the right thing: its outputs and gradients against float64, by the spec's rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkern import specs
from fastkern.bench.cases import Case, Function, tensors
from fastkern.bench.results import BACKWARD, FORWARD


@dataclass(frozen=True)
class Verdict:
    """``correct`` is None where it could not be told: the provider raised, or the reference does not fit in memory."""

    correct: bool | None
    error: str | None = None
    raised: bool = False


def reason(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:300]}"


def check(case: Case, functions: Mapping[str, Function], directions: Sequence[str]) -> dict[str, dict[str, Verdict]]:
    """Judge every provider in every direction: provider -> direction -> verdict."""
    try:
        truth = Truth(case, backward=BACKWARD in directions)
    except torch.OutOfMemoryError as error:
        verdict = Verdict(None, f"not checked, the float64 reference does not fit: {reason(error)}")
        return {name: dict.fromkeys(directions, verdict) for name in functions}
    return {name: {d: truth.verdict(function, d) for d in directions} for name, function in functions.items()}


class Truth:
    """The float64 reference and the baseline's result for a case: what a provider is judged by."""

    def __init__(self, case: Case, backward: bool) -> None:
        self.case = case
        with torch.no_grad():
            self.outputs = tensors(case.spec.reference(**specs.in_float64(case.inputs)))
            self._assert_exact(self.outputs, "output")
            self.baseline = self._numbers(tensors(case.once(case.spec.measure)))
        self.slack = case.spec.slack(case.inputs, tuple(self.outputs))
        self.grads: tuple[Tensor | None, ...] = ()
        self.baseline_grads: tuple[Tensor | None, ...] = ()
        if backward:
            leaves = case.with_grad(specs.in_float64(case.inputs))
            grads = [dy.double() for dy in case.grad_outputs]
            self.grads = case.gradients(tensors(case.spec.reference(**leaves)), leaves, grads)
            self._assert_exact([g for g in self.grads if g is not None], "gradient")
            self.baseline_grads = case.both(case.spec.measure)()

    def _assert_exact(self, results: Sequence[Tensor], what: str) -> None:
        narrow = {t.dtype for t in results if t.is_floating_point()} - {torch.float64}
        if narrow:
            raise RuntimeError(f"{self.case.spec.name}: the reference's {what} in float64 is {narrow.pop()}: no truth")

    def _numbers(self, outputs: list[Tensor]) -> list[Tensor]:
        """What the outputs stand for."""
        return list(self.case.spec.decoded(self.case.inputs, tuple(outputs)))

    def verdict(self, function: Function, direction: str) -> Verdict:
        """Judge a provider in one direction; whatever it raises is part of the verdict."""
        try:
            (self.check_forward if direction == FORWARD else self.check_backward)(function)
        except AssertionError as error:
            return Verdict(False, str(error))
        except Exception as error:  # a peer may raise anything
            return Verdict(None, reason(error), raised=True)
        return Verdict(True)

    def check_forward(self, function: Function) -> None:
        """Raise AssertionError, naming the output, unless ``function`` is as accurate as the spec asks."""
        self._compare(tensors(self.case.once(function)))

    def check_backward(self, function: Function) -> None:
        """The same for a recorded forward and every gradient."""
        case, spec = self.case, self.case.spec
        outputs = tensors(case.forward_with_grad(function)())
        self._compare(outputs)
        grads = case.gradients(outputs, case.leaves, case.grad_outputs)
        for name, got, baseline, truth in zip(case.learned, grads, self.baseline_grads, self.grads, strict=True):
            if truth is None or baseline is None:
                continue
            assert got is not None, f"gradient of {name} is missing"
            specs.assert_accurate(got, baseline, truth, spec.backward_factor, what=f"gradient of {name}")

    def _compare(self, outputs: list[Tensor]) -> None:
        assert len(outputs) == len(self.outputs), f"{len(outputs)} outputs, expected {len(self.outputs)}"
        rows = zip(self._numbers(outputs), self.baseline, self.outputs, self.slack, strict=True)
        for i, (got, baseline, truth, slack) in enumerate(rows):
            what = "output" if len(outputs) == 1 else f"output {i}"
            if truth.is_floating_point():
                factor = self.case.spec.forward_factor
                specs.assert_accurate(got, baseline, truth, factor, what=what, slack=slack)
            else:
                assert torch.equal(got, baseline), f"{what} differs from torch"
