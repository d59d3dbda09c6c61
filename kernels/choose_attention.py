"""Which implementation of attention serves a run best: measured on the GPU that will run it, at the shape that it will
have.
"""

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .attention import BACKENDS, attention, check_backend, first_line, obstacle


class AttentionChoice(NamedTuple):
    """What `choose_attention` found."""

    name: str
    milliseconds: dict[str, float]  # forward + backward of each backend that was measured, fastest first
    left_out: dict[str, str]  # the other backends, and why


def choose_attention(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    name: str | None = None,
    compiled: bool = False,
) -> AttentionChoice:
    """Measure the backends of `attention` at the shape of a run, and name the fastest.

    Every backend first has to agree with float64 on the last clip of a whole batch, output and gradients, within twice
    the error of plain PyTorch in `dtype` and 2 ulp. Timings differ from rank to rank: measure on one and
    take its choice on all.

    Args:
        shape: [B, H, N, d] of q. As much memory as attention takes there must be free.
        dtype: of q, k and v.
        device: on CUDA devices backends are measured; elsewhere the choice is "torch".
        name: take this backend, and measure nothing.
        compiled: leave out what `torch.compile(fullgraph=True)` cannot trace.

    Raises:
        ValueError: a `name` that is unknown or cannot run here.
        RuntimeError: not one backend works, for want of memory most likely.
    """
    device, head_dim = torch.device(device), shape[3]
    if name is None and device.type != "cuda":
        name = "torch"
    if name is not None:
        check_backend(name, device, dtype, head_dim)
        return AttentionChoice(name, {}, {})

    *qkv, d_out = inputs = _example(shape, dtype, device)
    steps: dict[str, Callable[[], object]] = {}
    left_out: dict[str, str] = {}
    for each in BACKENDS:
        reason = obstacle(each, device, dtype, head_dim)
        if compiled and each == "flash-attn-4":
            reason = reason or "torch.compile cannot trace it"
        reason = reason or _disagreement(each, *inputs)
        if reason is None:
            steps[each] = functools.partial(_train, functools.partial(attention, backend=each), qkv, d_out)
        else:
            left_out[each] = reason
    if not steps:
        raise RuntimeError(f"no attention backend works at {shape}: {left_out}")
    milliseconds = _measure(steps)
    fastest = min(milliseconds, key=milliseconds.__getitem__)
    return AttentionChoice(fastest, dict(sorted(milliseconds.items(), key=lambda item: item[1])), left_out)


def _example(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v as the model gives them, views of one projection [B, N, 3, H, d], and dO as it comes back, [B, N, H *
    d].
    """
    B, H, N, D = shape
    generator = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(B, N, 3, H, D, dtype=dtype, device=device, generator=generator)
    q, k, v = (x.requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4).unbind())
    return q, k, v, torch.randn(B, N, H * D, dtype=dtype, device=device, generator=generator)


def _train(
    function: Callable[..., torch.Tensor], qkv: Sequence[torch.Tensor], d_out: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """O, dQ, dK and dV."""
    out = function(*qkv)
    return out, *torch.autograd.grad(out.transpose(1, 2).reshape(d_out.shape), qkv, d_out)


def _disagreement(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, d_out: torch.Tensor) -> str | None:
    """Why the backend must not be used: it raises, or it computes something else."""
    try:
        actual = _train(functools.partial(attention, backend=name), (q, k, v), d_out)
    except Exception as error:
        return f"raised {type(error).__name__}: {first_line(error)}"
    last = [x[-1:].detach() for x in (q, k, v)]
    same_dtype = _train(_definition, [x.requires_grad_() for x in last], d_out[-1:])
    exact = _train(_definition, [x.detach().double().requires_grad_() for x in last], d_out[-1:].double())
    for label, x, same, true in zip(("output", "dq", "dk", "dv"), actual, same_dtype, exact, strict=True):
        ulp = torch.finfo(q.dtype).eps * true.abs().max()
        deviation, allowed = (x[-1:] - true).abs().max(), 2 * (same - true).abs().max() + 2 * ulp
        if not deviation <= allowed:  # NaN, too
            return f"{label} is off by {deviation:.2g}, where {allowed:.2g} is allowed"
    return None


def _definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(dim=3) @ v


def _measure(steps: dict[str, Callable[[], object]], warm_up: int = 3, rounds: int = 10) -> dict[str, float]:
    """Median milliseconds on the GPU. The steps take turns, so that a clock that changes meanwhile is the same to
    all.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(warm_up + rounds):
        for name, step in steps.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            step()
            end.record()
            end.synchronize()
            if turn >= warm_up:
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(each) for name, each in times.items()}
