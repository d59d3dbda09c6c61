"""The gate before every measurement: is what a provider computes right?"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .cases import Case, Provider


class Verdict(NamedTuple):
    """Of the output or gradient that comes nearest to its allowance, or is farthest beyond it."""

    checked: str
    error: float
    allowed: float

    @property
    def is_red(self) -> bool:
        """Whether the error is above its allowance, or not a number."""
        return not self.error <= self.allowed


class Gate:
    """Knows a case's exact results, and those of its reference in the same dtype."""

    def __init__(self, case: Case, reference: Provider, inputs: dict[str, Any], gradient: torch.Tensor | None) -> None:
        self._case, self._inputs, self._gradient = case, inputs, gradient
        self._same_dtype = self._results(reference.run)
        doubles = {name: _to_double(value) for name, value in inputs.items()}
        gradient = None if gradient is None else gradient.double()
        assert case.exact is not None  # a ceiling, which has none, is not judged
        self._exact = _results(case, case.exact, doubles, gradient)

    def _results(self, run: Callable[..., Any]) -> dict[str, torch.Tensor]:
        return _results(self._case, run, self._inputs, self._gradient)

    def judge(self, provider: Provider) -> dict[str, Verdict]:
        """The verdict for each mode; the provider's own exceptions pass through."""
        judge = provider.judge or self._case.judge
        outputs: list[Verdict] = []
        gradients: list[Verdict] = []
        for name, actual in self._results(provider.run).items():
            error, allowed = judge(name, actual, self._same_dtype[name], self._exact[name])
            (gradients if name.startswith("gradient") else outputs).append(
                Verdict(name, error, allowed * provider.slack)
            )
        verdicts = {"forward": outputs, "backward": gradients, "both": outputs + gradients}
        return {mode: max(verdicts[mode], key=_distance) for mode in self._case.needs}


def _distance(verdict: Verdict) -> float:
    return verdict.error / verdict.allowed if verdict.allowed else (math.inf if verdict.is_red else 0.0)


def _results(
    case: Case, run: Callable[..., Any], inputs: dict[str, Any], gradient: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Outputs by name, and `gradient of NAME` for each learned input."""
    leaves = {name: value.detach().requires_grad_(name in case.learned) for name, value in inputs.items()}
    outputs = as_tuple(run(**leaves))
    # a baseline may lack the last ones
    results = dict(zip(case.outputs, (output.detach() for output in outputs), strict=False))
    if case.learned:
        gradients = torch.autograd.grad(outputs[0], [leaves[name] for name in case.learned], gradient)
        results |= {f"gradient of {name}": value for name, value in zip(case.learned, gradients, strict=True)}
    return results


def as_tuple(outputs: Any) -> tuple[torch.Tensor, ...]:
    """The outputs of a provider that may have one or several."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _to_double(value: torch.Tensor) -> torch.Tensor:
    return value.double() if value.is_floating_point() else value
