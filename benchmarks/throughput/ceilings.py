"""What a device could do at best, measured."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch

from ssast.benchmarks.cases import COPY, Provider, Setting, ceiling_cases
from ssast.benchmarks.timing import Job, measure

CEILING_SECONDS = 1.0


def _run(provider: Provider, inputs: dict[str, Any], *_: Any) -> Any:
    return provider.run(**inputs)


def ceiling_rates(device: torch.device) -> dict[str, Any]:
    """Measured here and now: the largest matrix product and copy of `ssast.benchmarks.kernels`."""
    rates: dict[str, Any] = {}
    setting = Setting(device, torch.bfloat16, production=False, with_triton=False, with_compiled=False)
    for case in ceiling_cases(setting):
        with torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else contextlib.nullcontext():
            inputs, provider = case.make_inputs(0), case.providers[0]
            job = Job(provider.name, 1, functools.partial(_run, provider, inputs))
            seconds = measure([job], device, CEILING_SECONDS)[provider.name].quantile(0.5)
        need = case.needs["forward"]
        if case.shape.startswith(COPY):
            rates["copy_gb_per_s"] = need.bytes / seconds / 1e9
        else:
            rates |= {"matmul_tflops": need.flop / seconds / 1e12, "dtype": case.dtype}
    return rates
