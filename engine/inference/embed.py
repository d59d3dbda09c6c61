"""Embeddings of sound of any length: `embed` of waveforms, and the command `ssast embed`, of recordings.

Windows of a long clip overlap. Where they do, what they say of the same stretch is averaged, so that no sound counts
more than other sound. The command reads, encodes and writes a recording window by window; what cannot be read is listed
beside its file, in NAME.rejected.csv. docs/use.md describes the files.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ssast.engine.data.record import Record
from ssast.engine.data.sound import find_recordings
from ssast.engine.errors import UserError
from ssast.engine.files import path_argument
from ssast.engine.model.ssast import SSAST
from ssast.kernels import NUM_PREFIX

from .embedding_files import NpzWriter, ParquetWriter
from .inference import BATCH_SIZE, clip_events, encode_recordings, encode_windows, layer_encoder, require_batch_size
from .options import (
    add_embedding_options,
    add_inputs,
    add_run_options,
    embedding_options,
    open_model,
    require_new,
    require_some,
    to_stderr,
    write_rejected,
    writing,
)
from .waveforms import Waveform, as_clips
from .windows import End, Window, embedding_windows, seconds_per_step


@dataclass(frozen=True)
class Embedding:
    """Embeddings of B clips of up to G steps: float32, on the model's device.

    `clip` [B, D]; `frames` [B, G, D], the mean over frequency of each step's patches; `tokens` [B, G, f, D] the patches
    themselves, low frequencies first, if they were asked for. Clip b has `num_frames[b]` steps, rows past them are
    zero. Step g begins at g * `seconds_per_frame`.
    """

    clip: torch.Tensor
    frames: torch.Tensor
    num_frames: torch.Tensor
    seconds_per_frame: float
    tokens: torch.Tensor | None


def embed(
    model: SSAST,
    waveform: Waveform | Sequence[Waveform],
    sample_rate: int,
    *,
    layer: int | None = None,
    pool: str | None = None,
    hop: float | None = None,
    padding: bool = False,
    tokens: bool = False,
    batch_size: int = BATCH_SIZE,
) -> Embedding:
    """Embeddings of clips of any length.

    Args:
        waveform: [S] one clip; [B, S] a batch of mono clips; [B, C, S] a batch of clips of C channels; or a list of
            clips [S] or [C, S], of any lengths. One stereo clip [2, S] must therefore be given as `[clip]`: by itself
            it is a batch of two. Float of full scale 1, int8 or
            int16; wider integers only where they are plainly of 32 bits: those of 16 or 24 bits are refused.
        sample_rate: of `waveform`, in Hz; resampled to the model's, channels averaged.
        layer: None: after the final norm; 0: the embedded patches; 1 to depth: after that block; negative: from the
            last block back.
        pool: what the clip's embedding is the mean of: "mean": patches; "cls": the cls and dist tokens, over windows;
            None: what the model's classifier was trained with, "mean" for pretrained ones.
        hop: seconds from window to window in a clip longer than the model's input, rounded down to whole steps; None:
            half a window.
        padding: count the patches of padding of a clip shorter than the model's input, as the official code does.
        tokens: return them as well; they take f times the memory of frames.
        batch_size: windows at a time.

    Raises:
        ValueError: no clips, a clip shorter than one frame of 25 ms, samples that are not finite or beyond any full
            scale, a shape or type that is no sound, a sample rate below 1000 Hz, or no such layer, pool or hop.
    """
    clips = as_clips(waveform, sample_rate, model.card.sample_rate)
    pool = known_pool(model, pool)
    windows, encode = embedding_windows(model, hop), layer_encoder(model, layer)
    require_batch_size(batch_size)
    states = [Steps(model, pool, padding) for _ in clips]
    parts: list[list[torch.Tensor]] = [[] for _ in clips]
    for event in encode_windows(model, clip_events(clips, windows), encode, batch_size):
        clip = event.clip if isinstance(event, End) else event.window.clip
        done = states[clip].finish() if isinstance(event, End) else states[clip].add(*event)
        parts[clip].append(done if tokens else done.mean(dim=1))
    frames = torch.nn.utils.rnn.pad_sequence([torch.cat(part) for part in parts], batch_first=True)  # [B, G, (f,) D]
    return Embedding(
        clip=torch.stack([state.clip() for state in states]),
        frames=frames.mean(dim=2) if tokens else frames,
        num_frames=torch.tensor([state.count for state in states], device=frames.device),
        seconds_per_frame=seconds_per_step(model),
        tokens=frames if tokens else None,
    )


def embed_recordings(
    model: SSAST,
    recordings: Sequence[Record],
    *,
    layer: int | None = None,
    pool: str | None = None,
    hop: float | None = None,
    padding: bool = False,
    batch_size: int = BATCH_SIZE,
    workers: int = 1,
    on_steps: Callable[[torch.Tensor], None] = lambda steps: None,
) -> Iterator[tuple[End, torch.Tensor | None]]:
    """Each recording's end and embedding [D], in order; None where the end has an error. Of a long one, little is held
    at a time.

    `on_steps` is given its steps [k, f, D] as they are done, before its end comes; those of one with an error are to be
    forgotten.

    Raises:
        ValueError: no such layer, pool or hop.
        UserError, RuntimeError: as `ssast.engine.data.sound.read_recordings`.
    """
    pool, encode, windows = known_pool(model, pool), layer_encoder(model, layer), embedding_windows(model, hop)
    steps = Steps(model, pool, padding)
    events = encode_recordings(model, recordings, windows, encode, batch_size=batch_size, workers=workers)
    for event in events:
        if not isinstance(event, End):
            on_steps(steps.add(*event))
            continue
        if event.error:
            yield event, None
        else:
            on_steps(steps.finish())
            yield event, steps.clip()
        steps = Steps(model, pool, padding)


def known_pool(model: SSAST, pool: str | None) -> str:
    """The way of pooling, if there is such a one.

    Raises:
        ValueError: there is not.
    """
    pool = model.card.pool if pool is None else pool
    if pool not in ("mean", "cls"):
        raise ValueError(f"pool must be 'mean' or 'cls', not {pool!r}")
    return pool


@dataclass
class Steps:
    """Puts together the tokens of one recording's windows: each step once, as the mean of the windows that hold it.

    `padding` keeps steps that hold nothing but padding, which are left out otherwise.
    """

    model: SSAST
    pool: str
    padding: bool = False
    count: int = 0  # of the steps that are complete
    _sum: torch.Tensor | float = 0.0
    _prefix: torch.Tensor | float = 0.0
    _prefix_weight: int = 0
    _sums: torch.Tensor | None = None  # [k, f, D] sums of the steps from `count` on, which windows to come may hold too
    _counts: torch.Tensor = field(default_factory=lambda: torch.zeros(0))  # [k] number of windows in each sum

    def add(self, window: Window, tokens: torch.Tensor) -> torch.Tensor:
        """The next window's tokens [2 + P, D]; the steps [k, f, D] that no later window can hold."""
        stride, (rows, columns) = self.model.config.stride[1], self.model.config.grid
        steps = columns if self.padding else min(columns, -(-window.frames // stride))
        values = tokens[NUM_PREFIX:].unflatten(0, (rows, columns)).transpose(0, 1)[:steps]  # [k, f, D]
        self._prefix = self._prefix + steps * tokens[:NUM_PREFIX].mean(dim=0)
        self._prefix_weight += steps
        complete = values[:0] if self._sums is None else self._take(window.start // stride - self.count)
        overlap = 0 if self._sums is None else len(self._sums)
        sums, counts = values.new_zeros(max(overlap, steps), *values.shape[1:]), values.new_zeros(max(overlap, steps))
        if self._sums is not None:
            sums[:overlap], counts[:overlap] = self._sums, self._counts
        sums[:steps] += values
        counts[:steps] += 1
        self._sums, self._counts = sums, counts
        return complete

    def finish(self) -> torch.Tensor:
        """The steps [k, f, D] that are left, after at least one window."""
        assert self._sums is not None
        return self._take(len(self._sums))

    def clip(self) -> torch.Tensor:
        """[D] of the whole recording, after `finish`: the mean of all patches, or with `pool` "cls" of the cls and dist
        tokens.
        """
        total, count = (self._prefix, self._prefix_weight) if self.pool == "cls" else (self._sum, self.count)
        assert isinstance(total, torch.Tensor)
        return total / count if self.pool == "cls" else total.mean(dim=0) / count

    def _take(self, count: int) -> torch.Tensor:
        assert self._sums is not None
        steps = self._sums[:count] / self._counts[:count, None, None]
        self._sums, self._counts = self._sums[count:], self._counts[count:]
        self.count += count
        self._sum = self._sum + steps.sum(dim=0)
        return steps


# The command

WRITERS: dict[str, type[NpzWriter] | type[ParquetWriter]] = {".npz": NpzWriter, ".parquet": ParquetWriter}


def main(argv: list[str] | None = None) -> int:
    """Embeddings of recordings, as .npz or .parquet."""
    parser = argparse.ArgumentParser(
        prog="ssast embed",
        description="Embeddings of recordings of any kind and length. What cannot be read is listed in "
        "NAME.rejected.csv.",
    )
    add_inputs(parser, "a checkpoint")
    parser.add_argument("--out", required=True, type=path_argument, metavar="FILE", help="NAME.npz or NAME.parquet")
    parser.add_argument("--frames", action="store_true", help="embeddings of each time step, too")
    parser.add_argument("--tokens", action="store_true", help="embeddings of each patch, too")
    add_embedding_options(parser)
    add_run_options(parser)
    options = parser.parse_args(argv)
    writer_type = WRITERS.get(options.out.suffix.lower())
    if writer_type is None:
        raise UserError(f"--out {options.out}: expected a name that ends in .npz or .parquet")
    require_new(options.out)
    recordings = find_recordings(options.audio, to_stderr)
    model = open_model(options.model, options.device, options.window)
    about = {"model": str(options.model), "layer": "final" if options.layer is None else str(options.layer)}
    rejected: list[tuple[str, str]] = []
    seconds = 0.0
    try:
        with (
            writing(options.out),
            contextlib.closing(writer_type(options.out, model, about, options.frames, options.tokens)) as writer,
        ):
            for end, clip in embed_recordings(
                model, recordings, **embedding_options(options), on_steps=writer.add_steps
            ):
                recording = recordings[end.clip]
                if clip is None:
                    rejected.append((recording.source, end.error))
                    writer.forget()
                else:
                    seconds += end.samples / model.card.sample_rate
                    writer.finish(recording, end.samples / model.card.sample_rate, clip.cpu().numpy())
            listed = write_rejected(options.out, rejected)
            require_some(len(recordings), rejected, listed)
            writer.write()
    except ValueError as error:
        raise UserError(str(error)) from None
    print(
        f"{options.out}: {len(recordings) - len(rejected)} recordings, {seconds / 60:.1f} minutes, "
        f"{model.config.width} values each"
    )
    if rejected:
        print(f"{len(rejected)} recordings rejected: {listed}")
    return 1 if rejected and options.strict else 0


if __name__ == "__main__":
    sys.exit(main())
