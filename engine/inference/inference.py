"""A trained model on windows of sound: batches of windows encoded, of clips in memory and of recordings on disk.

What is made of the encoded windows is in embed.py and predict.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from ssast.engine.data.record import Record
from ssast.engine.data.sound import read_recordings
from ssast.engine.model.ssast import SSAST
from ssast.kernels import patchify

from .windows import End, Window, Windows, read_windows

BATCH_SIZE = 16

Encoder = Callable[[torch.Tensor], torch.Tensor]
"""[B, T, F] features to a row [B, ...] for each."""


class EncodedWindow(NamedTuple):
    """A window, and what an encoder made of it: float32, on the model's device."""

    window: Window
    row: torch.Tensor


@torch.no_grad()
def encode_windows(
    model: SSAST, events: Iterable[Window | End], encode: Encoder, batch_size: int
) -> Iterator[EncodedWindow | End]:
    """The events in their order, with each window what `encode` makes of its features: [B, T, F] -> a row of [B, ...]
    in float32.

    Windows of different recordings share batches. A window's samples may be gone by the time it comes back: they are
    not kept.
    """
    waiting: list[Window | End] = []
    count = 0
    for event in events:
        waiting.append(event)
        count += isinstance(event, Window)
        if count == batch_size:
            yield from _encoded(model, waiting, encode)
            waiting, count = [], 0
    yield from _encoded(model, waiting, encode)


def _encoded(model: SSAST, events: list[Window | End], encode: Encoder) -> Iterator[EncodedWindow | End]:
    windows = [event for event in events if isinstance(event, Window)]
    rows = iter(encode(features_of(model, [window.samples for window in windows])).float() if windows else ())
    for event in events:
        yield EncodedWindow(event, next(rows)) if isinstance(event, Window) else event


def features_of(model: SSAST, clips: Sequence[np.ndarray]) -> torch.Tensor:
    """[B, T, F] features as in training, padded, of clips [S] at the model's sample rate, int16 or float32 of full
    scale 1.
    """
    waveform = np.zeros((len(clips), max(map(len, clips))), dtype=np.float32)
    for row, clip in zip(waveform, clips, strict=True):
        row[: len(clip)] = clip / np.float32(32768) if clip.dtype == np.int16 else clip
    weight = model.embedding.weight
    lengths = torch.tensor([len(clip) for clip in clips], device=weight.device)
    return model.front_end.features(torch.from_numpy(waveform).to(weight.device), lengths, dtype=weight.dtype)


def hidden_states(model: SSAST, features: torch.Tensor) -> Iterator[torch.Tensor]:
    """[B, T, F] -> [B, 2 + P, D] for each layer: 0, the embedded patches; i from 1 to depth, what block i gives, before
    the final norm.
    """
    x, _ = model.embedding(patchify(features, model.config.patch_shape, model.config.stride))
    yield x
    for block in model.blocks:
        x = block(x)
        yield x


def layer_encoder(model: SSAST, layer: int | None) -> Encoder:
    """[B, T, F] -> [B, 2 + P, D] of a layer of `hidden_states`, -1 being the last; None: after the final norm.

    Raises:
        ValueError: no such layer.
    """
    if layer is None:
        return model.encode
    states = range(model.config.depth + 1)
    if not -len(states) <= layer < len(states):
        raise ValueError(
            f"layer must be None or from 0 (the embedded patches) to {states[-1]} (the last block), not {layer}"
        )
    return lambda features: next(islice(hidden_states(model, features), states[layer], None))


def require_batch_size(batch_size: int) -> None:
    """A batch holds at least one window.

    Raises:
        ValueError: it would hold none.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")


def clip_events(clips: Sequence[np.ndarray], windows: Windows) -> Iterator[Window | End]:
    """Windows and ends of clips [S] in memory.

    Raises:
        ValueError: a clip without a whole frame; it is numbered.
    """
    for number, clip in enumerate(clips):
        for event in read_windows(number, [clip], windows):
            if isinstance(event, End) and event.error:
                raise ValueError(f"clip {number}: {event.error}")
            yield event


def encode_recordings(
    model: SSAST, recordings: Sequence[Record], windows: Windows, encode: Encoder, *, batch_size: int, workers: int
) -> Iterator[EncodedWindow | End]:
    """As `encode_windows`, of recordings in files, read as they are needed; `clip` is the number in `recordings`.

    Raises:
        UserError, RuntimeError: as `ssast.engine.data.sound.read_recordings`.
    """
    with contextlib.closing(read_recordings(recordings, windows.sample_rate, workers=workers)) as streams:
        progress = tqdm(streams, total=len(recordings), desc="recordings", unit="file", smoothing=0.05, disable=None)
        events = (event for clip, blocks in enumerate(progress) for event in read_windows(clip, blocks, windows))
        yield from encode_windows(model, events, encode, batch_size)
