"""How exact the arithmetic of the filter banks is: `python -m ssast.benchmarks.precision [--save]`.

The kernel multiplies frames by cosines on matrix units instead of taking an FFT. What it could multiply in - one
product of a short type, or three of parts - is compared with a float32 FFT and with the kernel itself, all against
float64, on synthetic clips as the data path delivers them (int16, 16 kHz). Matrix units round the factors and sum in
float32; so do the emulations. The kernel runs on a GPU, or with TRITON_INTERPRET=1 in the environment on the CPU.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch

from ssast.engine.data.synth import CLASSES, synthesize
from ssast.kernels import fbank
from ssast.kernels.backend import INTERPRETED
from ssast.kernels.fbank import LOG_FLOOR, PRE_EMPHASIS, frame_geometry, mel_filters

from .machine import environment_columns
from .rows import RESULTS, append_row

CLIPS_PER_CLASS = 2
Parts = Callable[[torch.Tensor], list[torch.Tensor]]


def rounded(dtype: torch.dtype, count: int) -> Parts:
    """x as a sum of `count` values of a short dtype, each exact in float32."""

    def parts(x: torch.Tensor) -> list[torch.Tensor]:
        terms, rest = [], x
        for _ in range(count):
            terms.append(rest.to(dtype).float())
            rest = rest - terms[-1]
        return terms

    return parts


def tf32(x: torch.Tensor) -> list[torch.Tensor]:
    """float32 with ten bits of mantissa, rounded to nearest."""
    bits = (x.view(torch.int32) + 0x1000) & ~0x1FFF
    return [bits.view(torch.float32)]


ARITHMETIC: dict[str, Parts] = {
    "one bf16 product": rounded(torch.bfloat16, 1),
    "three bf16 products": rounded(torch.bfloat16, 2),
    "one float16 product": rounded(torch.float16, 1),
    "one tf32 product": tf32,
    "three float16 products": rounded(torch.float16, 2),
}


def emulate(waveform: torch.Tensor, parts: Parts) -> torch.Tensor:
    """[B, S] float32 in [-1, 1] -> [B, T, F]: the direct transform with the factors in parts, the smallest products
    left out.
    """
    window, shift, length = frame_geometry(16000)
    frames = waveform.unfold(1, window, shift)
    frames = frames - frames.mean(dim=2, keepdim=True)
    previous = torch.cat((frames[..., :1], frames[..., :-1]), dim=2)
    frames = (frames - PRE_EMPHASIS * previous) * torch.hann_window(window, periodic=False)
    scale = 2.0 ** -frames.abs().amax(dim=2, keepdim=True).clamp_min(1e-30).log2().ceil()  # a power of two: exact
    angle = 2 * math.pi / length * torch.arange(window)[:, None].double() * torch.arange(length // 2 + 1)[None, :]
    power = torch.zeros(())
    for basis in (angle.cos().float(), angle.sin().float()):
        left, right = parts(frames * scale), parts(basis)
        order = [(i, j) for i in range(len(left)) for j in range(len(right)) if i + j < len(left)]
        products = torch.stack([left[i] @ right[j] for i, j in reversed(order)])  # small ones first
        power = power + sum(products[1:], products[0]).square()
    mel = power / scale.square() @ mel_filters(128, length, 16000).float().T
    return mel.clamp_min(LOG_FLOOR).log()


def measure() -> list[dict[str, object]]:
    """Rows: arithmetic and its largest, 99.9th percentile and mean error in nats."""
    clips = [synthesize(label, 0, index) for label in CLASSES for index in range(CLIPS_PER_CLASS)]
    samples = min(len(clip) for clip in clips)
    waveform = torch.stack([(torch.from_numpy(clip[:samples]) * 32767).round().to(torch.int16) for clip in clips])
    exact = fbank(waveform.double() / 32768, dtype=torch.float64)
    results = {name: emulate(waveform.float() / 32768, parts) for name, parts in ARITHMETIC.items()}
    results["float32 FFT (the reference)"] = fbank(waveform, backend="torch")
    if INTERPRETED or torch.cuda.is_available():
        device = "cpu" if INTERPRETED else "cuda"
        results["the kernel"] = fbank(waveform.to(device), backend="triton").cpu()
    rows = []
    for name, features in results.items():
        errors = (features - exact).abs().flatten().sort().values
        figures = {"max": errors[-1], "p999": errors[int(0.999 * len(errors))], "mean": errors.mean()}
        rows.append(
            {"arithmetic": name, "clips": len(clips), **{key: f"{value:.2e}" for key, value in figures.items()}}
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    """The command; exit status 0."""
    parser = argparse.ArgumentParser(
        prog="python -m ssast.benchmarks.precision", description="errors of log-mel features in nats"
    )
    parser.add_argument("--save", action="store_true", help="replace benchmarks/results/precision.csv")
    options = parser.parse_args(argv)
    rows = measure()
    for row in rows:
        print(f"{row['arithmetic']:32} max {row['max']}  99.9% {row['p999']}  mean {row['mean']}")
    if options.save:
        file, environment = RESULTS / "precision.csv", environment_columns()
        file.unlink(missing_ok=True)
        for row in rows:
            append_row(file, {**row, **environment})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
