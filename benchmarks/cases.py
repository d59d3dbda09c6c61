"""What is measured: each operator's shapes, inputs, exact result, and the providers that compete.

A provider is one way to compute the operator: "torch" is its own reference, "triton" its kernel, "compiled" the
reference under torch.compile in its default mode; the others are described in operator_baselines.py. All of a case get
the same tensors and must give the same result, within what `Case.judge` allows: kernels by the law (law.py), baselines,
of which only the time is wanted, by SLACK times that.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ssast.kernels import (
    attention,
    embed_patches,
    embed_visible_patches,
    fbank,
    insert_mask_tokens,
    mspm_loss,
    sample_patch_mask,
)
from ssast.kernels.law import error_and_allowance, largest_error

from . import formulas, operator_baselines
from .formulas import Need

SAMPLE_RATE, SECONDS, FRAMES, MEL_BINS = 16000, 10, 1024, 128
GRID, PATCH, K, MASKED, CLUSTER = (8, 64), (16, 16), 256, 400, (3, 4, 5)
P, PREFIX, HEAD_DIM = GRID[0] * GRID[1], 2, 64
MEAN, STD = -4.2677393, 4.5689974  # of AudioSet, as the official recipe normalises
CEILING, COPY, MATMUL = "ceiling", "copy", "matmul"
# a baseline may sum in another order; and a scalar's error in the reference is one draw, small by luck at times
SLACK = 8

Judge = Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor], tuple[float, float]]
"""(name, actual, same-dtype reference, exact) -> (error, allowed)."""


@dataclass(frozen=True)
class Provider:
    """One way to compute an operator."""

    name: str
    run: Callable[..., Any]  # the case's inputs by name -> its outputs
    note: str = ""
    loops_on_host: bool = False  # waits for the device or computes on the host: no CUDA graph can hold it
    judge: Judge | None = None  # in place of the case's
    slack: float = 1.0  # times what is allowed


@dataclass(frozen=True)
class Case:
    """An operator at one shape and dtype: its inputs, its exact result and those who compete."""

    operator: str
    shape: str
    dtype: str
    make_inputs: Callable[[int], dict[str, torch.Tensor]]  # from a seed
    exact: Callable[..., Any] | None  # inputs, floating ones in float64 -> outputs; None: nothing to check
    needs: dict[str, Need]  # for each mode
    providers: tuple[Provider, ...]
    outputs: tuple[str, ...] = ("output",)
    learned: tuple[str, ...] = ()  # inputs that get a gradient, from the first output
    judge: Judge = field(default=lambda name, actual, same_dtype, exact: error_and_allowance(actual, same_dtype, exact))


@dataclass(frozen=True)
class Setting:
    """On what, and how large."""

    device: torch.device
    dtype: torch.dtype
    production: bool  # the shapes of training on a GPU, or small ones of the same kind
    with_triton: bool
    with_compiled: bool
    batch: int | None = None  # in place of every case's own

    def providers(self, *, torch: Callable[..., Any], triton: Callable[..., Any]) -> tuple[Provider, ...]:
        """An operator's reference, that compiled, and its kernel."""
        compiled = (Provider("compiled", _compiled(torch), slack=SLACK),) if self.with_compiled else ()
        return (Provider("torch", torch), *compiled, *((Provider("triton", triton),) if self.with_triton else ()))

    def draw(self, generator: torch.Generator, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Normal values of the setting's dtype on its device."""
        return (scale * torch.randn(*shape, generator=generator, device=self.device)).to(self.dtype)

    def generator(self, seed: int) -> torch.Generator:
        """A generator of the device, so that equal seeds give equal inputs."""
        return torch.Generator(self.device).manual_seed(seed)

    def draw_mask(self, batch: int, seed: int) -> torch.Tensor:
        """int64 [batch, MASKED] patch numbers, ascending."""
        return sample_patch_mask(batch, grid=GRID, num_masked=MASKED, seed=seed, device=self.device, backend="torch")


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled for each shape anew, not once for all shapes: a fixed shape is what training has."""
    return torch.compile(function, dynamic=False)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def fbank_cases(setting: Setting) -> Iterator[Case]:
    """Filter banks of int16 clips, frames in order and in patch order."""
    B, S = setting.batch or (256 if setting.production else 4), SECONDS * SAMPLE_RATE
    options: dict[str, Any] = {"num_frames": FRAMES, "mean": MEAN, "std": STD}

    def make_inputs(seed: int, sample: torch.dtype = torch.int16) -> dict[str, torch.Tensor]:
        noise = torch.randn(B, S, generator=setting.generator(seed), device=setting.device)
        samples = (0.1 * 32767 * noise).round().clamp(-32768, 32767).to(torch.int16)
        return {"waveform": samples if sample == torch.int16 else samples / 32768.0}

    def near(name: str, actual: torch.Tensor, same_dtype: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
        return (actual.double() - exact).abs().mean().item(), 0.02

    kinds = [(None, torch.int16), (PATCH, torch.int16)] + ([(PATCH, torch.float32)] if setting.batch else [])
    for patch, sample in kinds:
        run = functools.partial(fbank, sample_rate=SAMPLE_RATE, num_mel_bins=MEL_BINS, **options, patch=patch)

        full_scale = 32768.0 if sample == torch.int16 else 1.0

        def exact(
            waveform: torch.Tensor, run: Callable[..., torch.Tensor] = run, full_scale: float = full_scale
        ) -> torch.Tensor:
            clips = [
                run(clips / full_scale, dtype=torch.float64, backend="torch") for clips in waveform.double().split(16)
            ]
            return torch.cat(clips)

        others = (
            Provider(
                "official loop",
                functools.partial(operator_baselines.official_fbank, **options, dtype=setting.dtype),
                "clip by clip in Python, on the same device; window and mel filters made once",
                loops_on_host=True,
                slack=SLACK,
            ),
            Provider(
                "stft",
                functools.partial(operator_baselines.stft_fbank, **options, dtype=setting.dtype),
                "not Kaldi's to the bit (no DC removal of each frame): judged by its mean error, within 0.02",
                judge=near,
            ),
        )
        yield Case(
            operator="fbank",
            shape=f"B={B} S={S} T={FRAMES} F={MEL_BINS}" + (f" patches {PATCH[0]}x{PATCH[1]}" if patch else ""),
            dtype=f"{_name(sample)}->{_name(setting.dtype)}",
            make_inputs=functools.partial(make_inputs, sample=sample),
            exact=exact,
            needs=formulas.fbank(B, S, FRAMES, MEL_BINS, sample.itemsize, setting.dtype.itemsize),
            providers=(
                *setting.providers(
                    torch=functools.partial(run, dtype=setting.dtype, backend="torch"),
                    triton=functools.partial(run, dtype=setting.dtype, backend="triton"),
                ),
                *(() if patch else others),
            ),
        )


def mask_cases(setting: Setting) -> Iterator[Case]:
    """Patch masks of both algorithms. Equal masks are asked for, but of the loop, which draws otherwise, valid ones."""
    B = setting.batch or (512 if setting.production else 32)

    def equal(name: str, actual: torch.Tensor, same_dtype: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
        """Patches that differ: none may."""
        return float("inf") if actual.shape != exact.shape else float((actual != exact).sum()), 0.0

    def valid(name: str, actual: torch.Tensor, same_dtype: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
        """Clips whose mask is none."""
        ordered = actual.sort(dim=1).values
        right = (ordered.diff(dim=1) > 0).all(dim=1) & (ordered[:, 0] >= 0) & (ordered[:, -1] < P)
        return float("inf") if actual.shape != exact.shape else float((~right).sum()), 0.0

    for algorithm in ("centered", "official"):
        run = functools.partial(
            sample_patch_mask,
            B,
            grid=GRID,
            num_masked=MASKED,
            cluster=CLUSTER,
            algorithm=algorithm,
            seed=1,
            device=setting.device,
        )
        loop = Provider(
            "official loop",
            functools.partial(
                operator_baselines.official_mask,
                B,
                grid=GRID,
                num_masked=MASKED,
                cluster=CLUSTER,
                device=setting.device,
                generator=random.Random(1),
            ),
            "sets in Python; draws from another generator: judged as valid masks",
            loops_on_host=True,
            judge=valid,
        )
        yield Case(
            operator="mask",
            shape=f"B={B} {GRID[0]}x{GRID[1]} M={MASKED} {algorithm}",
            dtype="int64",
            make_inputs=lambda seed: {},
            exact=functools.partial(run, backend="torch"),
            needs=formulas.mask(B, MASKED),
            providers=(
                *dataclasses.replace(
                    setting, with_compiled=False
                ).providers(  # Inductor takes over ten minutes for its generator
                    torch=functools.partial(run, backend="torch"), triton=functools.partial(run, backend="triton")
                ),
                *((loop,) if algorithm == "official" else ()),
            ),
            judge=equal,
        )


def embed_cases(setting: Setting) -> Iterator[Case]:
    """Patch embedding with mask tokens, and at a batch of one's own without, as in fine-tuning."""
    B = setting.batch or (256 if setting.production else 4)
    sizes = [(D, True) for D in ((768, 192) if setting.production else (192,))]
    if setting.batch:
        sizes += [(D, False) for D, _ in sizes]  # as in fine-tuning
    for D, is_masked in sizes:

        def make_inputs(seed: int, D: int = D, is_masked: bool = is_masked) -> dict[str, torch.Tensor]:
            draw = functools.partial(setting.draw, setting.generator(seed))
            inputs = {
                "patches": draw(B, P, K, scale=0.5),
                "weight": draw(D, K, scale=K**-0.5),
                "bias": draw(D, scale=0.1),
                "position": draw(PREFIX + P, D, scale=0.1),
                "prefix": draw(PREFIX, D, scale=0.1),
            }
            return (
                {**inputs, "mask_token": draw(D, scale=0.1), "mask": setting.draw_mask(B, seed)}
                if is_masked
                else inputs
            )

        yield Case(
            operator="embed",
            shape=f"B={B} P={P} M={MASKED if is_masked else 0} K={K} D={D}",
            dtype=_name(setting.dtype),
            make_inputs=make_inputs,
            exact=functools.partial(embed_patches, backend="torch"),
            needs=formulas.embed(B, P, MASKED if is_masked else 0, K, D, setting.dtype.itemsize),
            providers=setting.providers(
                torch=functools.partial(embed_patches, backend="torch"),
                triton=functools.partial(embed_patches, backend="triton"),
            ),
            learned=("weight", "bias", "position", "prefix") + (("mask_token",) if is_masked else ()),
        )


def visible_embed_cases(setting: Setting) -> Iterator[Case]:
    """Embedding of the visible patches alone."""
    B = setting.batch or (256 if setting.production else 4)
    for D in (768, 192) if setting.production else (192,):

        def make_inputs(seed: int, D: int = D) -> dict[str, torch.Tensor]:
            draw = functools.partial(setting.draw, setting.generator(seed))
            return {
                "patches": draw(B, P, K, scale=0.5),
                "weight": draw(D, K, scale=K**-0.5),
                "bias": draw(D, scale=0.1),
                "position": draw(PREFIX + P, D, scale=0.1),
                "prefix": draw(PREFIX, D, scale=0.1),
                "mask": setting.draw_mask(B, seed),
            }

        yield Case(
            operator="embed_visible",
            shape=f"B={B} P={P} M={MASKED} K={K} D={D}",
            dtype=_name(setting.dtype),
            make_inputs=make_inputs,
            exact=functools.partial(embed_visible_patches, backend="torch"),
            needs=formulas.embed_visible(B, P, MASKED, K, D, setting.dtype.itemsize),
            providers=setting.providers(
                torch=functools.partial(embed_visible_patches, backend="torch"),
                triton=functools.partial(embed_visible_patches, backend="triton"),
            ),
            learned=("weight", "bias", "position", "prefix"),
        )


def mask_token_cases(setting: Setting) -> Iterator[Case]:
    """Mask tokens put back between the encoded visible patches."""
    B = setting.batch or (256 if setting.production else 4)
    for D in (768, 384) if setting.production else (192,):

        def make_inputs(seed: int, D: int = D) -> dict[str, torch.Tensor]:
            draw = functools.partial(setting.draw, setting.generator(seed))
            mask = setting.draw_mask(B, seed)
            is_masked = torch.zeros(B, P, dtype=torch.bool, device=setting.device).scatter_(1, mask, True)
            return {
                "encoded": draw(B, PREFIX + P - MASKED, D),
                "mask_token": draw(D, scale=0.1),
                "position": draw(PREFIX + P, D, scale=0.1),
                "slot": ((~is_masked).cumsum(dim=1) - 1).masked_fill(is_masked, -1).to(torch.int32),
            }

        yield Case(
            operator="mask_tokens",
            shape=f"B={B} P={P} M={MASKED} D={D}",
            dtype=_name(setting.dtype),
            make_inputs=make_inputs,
            exact=functools.partial(insert_mask_tokens, backend="torch"),
            needs=formulas.mask_tokens(B, P, MASKED, D, setting.dtype.itemsize),
            providers=setting.providers(
                torch=functools.partial(insert_mask_tokens, backend="torch"),
                triton=functools.partial(insert_mask_tokens, backend="triton"),
            ),
            learned=("encoded", "mask_token", "position"),
        )


def loss_cases(setting: Setting) -> Iterator[Case]:
    """The joint loss, of given targets and of targets that are gathered by the mask."""
    shapes = [(256, False), (24, False), (256, True)] if setting.production else [(4, False)]
    for B, gathered in shapes if not setting.batch else [(setting.batch, False), (setting.batch, True)]:

        def make_inputs(seed: int, B: int = B, gathered: bool = gathered) -> dict[str, torch.Tensor]:
            generator = setting.generator(seed)
            target = setting.draw(generator, B, P if gathered else MASKED, K, scale=0.5)
            mask = setting.draw_mask(B, seed)
            hidden = target.gather(1, mask[..., None].expand(-1, -1, K)) if gathered else target
            inputs = {
                # near enough to the targets that about half of them are found, as in the middle of training
                "class_pred": (0.08 * hidden.float() + setting.draw(generator, B, MASKED, K, scale=0.2)).to(
                    setting.dtype
                ),
                "recon_pred": setting.draw(generator, B, MASKED, K, scale=0.5),
                "target": target,
            }
            return {**inputs, "mask": mask} if gathered else inputs

        providers = setting.providers(
            torch=functools.partial(mspm_loss, backend="torch"), triton=functools.partial(mspm_loss, backend="triton")
        )
        if not gathered:
            providers += _loss_baselines(setting)
        yield Case(
            operator="loss",
            shape=f"B={B} M={MASKED} K={K}" + (f" gathered from P={P}" if gathered else ""),
            dtype=_name(setting.dtype),
            make_inputs=make_inputs,
            exact=functools.partial(mspm_loss, backend="torch"),
            needs=formulas.loss(B, MASKED, K, setting.dtype.itemsize, gathered),
            providers=providers,
            outputs=("loss", "nce", "mse", "accuracy"),
            learned=("class_pred", "recon_pred"),
            judge=_judge_loss,
        )


def _judge_loss(name: str, actual: torch.Tensor, same_dtype: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """The law; but accuracy counts, and patches in a near tie may count either way: up to two in ten thousand."""
    if name == "accuracy":
        return largest_error(actual, exact), 2e-4
    return error_and_allowance(actual, same_dtype, exact)


def _loss_baselines(setting: Setting) -> tuple[Provider, ...]:
    def near(name: str, actual: torch.Tensor, same_dtype: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
        return ((actual.double() - exact).norm() / exact.norm()).item(), 0.05

    loop = Provider(
        "official loop", operator_baselines.official_loss, "clip by clip in Python", loops_on_host=True, slack=SLACK
    )
    note = "product in the tensors' dtype, no accuracy: judged by its relative error in norm, within 0.05"
    bmm = Provider("compiled bmm", _compiled(operator_baselines.bmm_loss), note, judge=near)
    return (loop, bmm) if setting.with_compiled else (loop,)


def attention_cases(setting: Setting) -> Iterator[Case]:
    """Attention of all tokens, through every backend that runs here."""
    shapes = [(B, H) for B in (64, 256) for H in (12, 3)] if setting.production else [(2, 3)]
    if setting.batch:
        shapes = [(setting.batch, H) for H in sorted({H for _, H in shapes}, reverse=True)]
    N = PREFIX + P
    names = attention_backends(setting)
    for B, H in shapes:

        def make_inputs(seed: int, B: int = B, H: int = H) -> dict[str, torch.Tensor]:
            generator = setting.generator(seed)
            return {name: setting.draw(generator, B, H, N, HEAD_DIM) for name in "qkv"}

        def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            # all clips' float64 scores at once would be gigabytes
            parts = zip(q.split(16), k.split(16), v.split(16), strict=True)
            return torch.cat([((a @ b.transpose(2, 3)) / HEAD_DIM**0.5).softmax(dim=3) @ c for a, b, c in parts])

        yield Case(
            operator="attention",
            shape=f"B={B} H={H} N={N} d={HEAD_DIM}",
            dtype=_name(setting.dtype),
            make_inputs=make_inputs,
            exact=exact,
            needs=formulas.attention(B, H, N, HEAD_DIM, setting.dtype.itemsize),
            providers=tuple(Provider(name, functools.partial(attention, backend=name)) for name in names),
            learned=("q", "k", "v"),
        )


def attention_backends(setting: Setting) -> list[str]:
    """The reference first."""
    try:
        from ssast.kernels.attention import available_attention
    except ImportError:  # a tree of before there was a choice
        return ["torch"]
    names = available_attention(setting.device, setting.dtype, HEAD_DIM)
    triton = ["triton"] if setting.with_triton else []
    return ["torch", *(name for name in names if name not in ("torch", "triton")), *triton]


def ceiling_cases(setting: Setting) -> Iterator[Case]:
    """What the machine itself can do: the largest copy and matrix product that make sense, through PyTorch."""
    on_gpu = setting.device.type == "cuda"
    size, n = (4 << 30, 8192) if on_gpu else (256 << 20, 1024)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    if on_gpu:
        size = min(size, torch.cuda.mem_get_info(setting.device)[0] // 8)

    def make_bytes(seed: int) -> dict[str, torch.Tensor]:
        source = torch.randint(
            256, (size,), generator=setting.generator(seed), dtype=torch.uint8, device=setting.device
        )
        return {"source": source, "copy": torch.empty_like(source)}

    def make_matrices(seed: int) -> dict[str, torch.Tensor]:
        generator = setting.generator(seed)
        draw = functools.partial(torch.randn, n, n, generator=generator, device=setting.device)
        return {
            "a": draw().to(dtype),
            "b": draw().to(dtype),
            "out": torch.empty(n, n, dtype=dtype, device=setting.device),
        }

    def copy(source: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
        return copy.copy_(source)

    def matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return torch.matmul(a, b, out=out)

    yield Case(
        CEILING, f"{COPY} {size >> 20} MiB", "uint8", make_bytes, None, formulas.copy(size), (Provider("torch", copy),)
    )
    needs = formulas.matmul(n, dtype.itemsize)
    yield Case(CEILING, f"{MATMUL} {n}^3", _name(dtype), make_matrices, None, needs, (Provider("torch", matmul),))


@dataclass(frozen=True)
class Operator:
    """A kernel's public function and its cases."""

    function: Callable[..., Any]  # of ssast.kernels
    cases: Callable[[Setting], Iterator[Case]]


OPERATORS: dict[str, Operator] = {
    "fbank": Operator(fbank, fbank_cases),
    "mask": Operator(sample_patch_mask, mask_cases),
    "embed": Operator(embed_patches, embed_cases),
    "embed_visible": Operator(embed_visible_patches, visible_embed_cases),
    "mask_tokens": Operator(insert_mask_tokens, mask_token_cases),
    "loss": Operator(mspm_loss, loss_cases),
    "attention": Operator(attention, attention_cases),
}
