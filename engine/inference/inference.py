"""A trained model on sound of any length: windows cut, encoded and put together again.

A window is what the model was built for: `input_frames` rows of features. A shorter clip is padded, as in training; a
longer one is cut into windows that overlap, the last of which ends with the clip. Where windows overlap, what they say
of the same stretch is averaged, so that no sound counts more than other sound.

Words: a frame is a row of features, 10 ms apart; a step is a column of patches, `stride[1]` frames apart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import soxr
import torch
from tqdm import tqdm

from ssast.engine.data.layouts import Recording
from ssast.engine.data.resample import QUALITY
from ssast.engine.data.sound import read_recordings
from ssast.engine.model.ssast import SSAST
from ssast.kernels import NUM_PREFIX, patchify
from ssast.kernels.fbank import LOWEST_RATE, count_frames, frame_geometry, samples_of

MAX_PEAK = 1000.0  # where full scale is 1: beyond it samples are integers that were never divided
MOST_CHANNELS = 64
BATCH_SIZE = 16

Waveform = torch.Tensor | np.ndarray
Encoder = Callable[[torch.Tensor], torch.Tensor]


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


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of B clips: `probabilities` [B, C], the mean over windows, of the classes `labels` [C].

    `windows[b]` [W, C] are those of each window of clip b, which covers the seconds `times[b]` [W, 2] from and to. All
    float32.
    """

    probabilities: torch.Tensor
    labels: tuple[str, ...]
    windows: list[torch.Tensor]
    times: list[torch.Tensor]

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """For each clip the k most probable classes, the first one first."""
        values, classes = self.probabilities.topk(min(k, len(self.labels)))
        rows = zip(values.tolist(), classes.tolist(), strict=True)
        return [[(self.labels[c], value) for value, c in zip(*row, strict=True)] for row in rows]


@dataclass(frozen=True)
class Windows:
    """How a model's windows lie on a recording: `frames` long, every `hop` frames, the last moved back to a multiple of
    `align`.
    """

    sample_rate: int
    frames: int
    hop: int
    align: int

    @staticmethod
    def of(model: SSAST, hop: float | None, align: int, most: int) -> Windows:
        """`hop` in seconds, rounded down to a multiple of `align` frames, and `most` frames at most; None: half a
        window.

        Raises:
            ValueError: no such hop.
        """
        rate = model.card.sample_rate
        shift = frame_geometry(rate)[1]
        hop_frames = most / 2 if hop is None else hop * rate / shift
        if not 0 < hop_frames <= most:
            raise ValueError(f"hop must be more than 0 and at most a window of {most * shift / rate:g} s, not {hop:g}")
        return Windows(rate, model.config.input_frames, max(int(hop_frames / align + 1e-6), 1) * align, align)

    @property
    def shift(self) -> int:
        """Samples from frame to frame."""
        return frame_geometry(self.sample_rate)[1]

    @property
    def samples(self) -> int:
        return samples_of(self.frames, self.sample_rate)

    def seconds(self, frame: int) -> float:
        """Where a frame begins."""
        return frame * self.shift / self.sample_rate

    def cut(self, blocks: Iterable[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
        """A recording that comes in blocks [n] as (first frame, samples [S]); holds little more than a window and a
        block of it.

        Raises:
            ValueError: at the end, if there was not one whole frame.
        """
        # `held` begins at the frame `origin`, the next window at `start`
        held, origin, start = (
            np.zeros(0, dtype=np.int16),
            0,
            0,
        )
        for block in blocks:
            held = np.concatenate((held, block)) if len(held) else block.copy()
            while len(held) >= (start - origin) * self.shift + self.samples:
                held = held[(start - origin) * self.shift :]
                yield start, held[: self.samples]
                origin, start = start, start + self.hop
        whole = count_frames(len(held), self.sample_rate)
        if not whole:
            raise ValueError(
                f"too short: {len(held)} samples at {self.sample_rate} Hz, one frame of 25 ms needs "
                f"{frame_geometry(self.sample_rate)[0]}"
            )
        if start == 0:
            yield 0, held
        elif whole > self.frames:
            moved = -(-(origin + whole - self.frames) // self.align) * self.align
            yield moved, held[(moved - origin) * self.shift :][: self.samples]


@dataclass(frozen=True)
class Window:
    """A window of the recording `clip`; `frames` of its rows are sound."""

    clip: int
    start: int  # in frames
    frames: int
    samples: np.ndarray


@dataclass(frozen=True)
class End:
    """All windows of `clip`, which has so many `samples`, have come. `error`: why there are no more, "" if it ended as
    it should.
    """

    clip: int
    samples: int
    error: str = ""


def read_windows(clip: int, blocks: Iterable[np.ndarray], windows: Windows) -> Iterator[Window | End]:
    """A recording's windows, and its end. What makes it unusable, a ValueError of `blocks` or of cutting them, becomes
    the end's error.
    """
    samples = 0

    def counted() -> Iterator[np.ndarray]:
        nonlocal samples
        for block in blocks:
            samples += len(block)
            yield block

    try:
        for start, part in windows.cut(counted()):
            yield Window(clip, start, count_frames(len(part), windows.sample_rate), part)
    except ValueError as error:
        yield End(clip, samples, str(error))
    else:
        yield End(clip, samples)


@torch.no_grad()
def encode_windows(
    model: SSAST, events: Iterable[Window | End], encode: Encoder, batch_size: int
) -> Iterator[tuple[Window | End, torch.Tensor | None]]:
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


def _encoded(
    model: SSAST, events: list[Window | End], encode: Encoder
) -> Iterator[tuple[Window | End, torch.Tensor | None]]:
    found = [event for event in events if isinstance(event, Window)]
    rows = iter(encode(features_of(model, [window.samples for window in found])).float() if found else ())
    for event in events:
        yield event, next(rows) if isinstance(event, Window) else None


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
    x = model.embedding(patchify(features, model.config.patch_shape, model.config.stride))
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


@dataclass
class Steps:
    """Puts together the tokens of one recording's windows: each step once, as the mean of the windows that hold it.

    `padding` keeps steps that hold nothing but padding, which are left out otherwise.
    """

    model: SSAST
    pool: str
    padding: bool = False
    count: int = 0  # steps that are done
    _sum: torch.Tensor | float = 0.0
    _prefix: torch.Tensor | float = 0.0
    _prefix_weight: int = 0
    _held: torch.Tensor | None = None  # [k, f, D] sums of the steps from `count` on, which windows to come may hold too
    _shares: torch.Tensor = field(default_factory=lambda: torch.zeros(0))  # [k] of how many windows

    def add(self, window: Window, tokens: torch.Tensor) -> torch.Tensor:
        """The next window's tokens [2 + P, D]; the steps [k, f, D] that no later window can hold."""
        stride, (rows, columns) = self.model.config.stride[1], self.model.config.grid
        steps = columns if self.padding else min(columns, -(-window.frames // stride))
        values = tokens[NUM_PREFIX:].unflatten(0, (rows, columns)).transpose(0, 1)[:steps]  # [k, f, D]
        self._prefix = self._prefix + steps * tokens[:NUM_PREFIX].mean(dim=0)
        self._prefix_weight += steps
        done = self._take(window.start // stride - self.count)
        overlap = 0 if self._held is None else len(self._held)
        held, shares = values.new_zeros(max(overlap, steps), *values.shape[1:]), values.new_zeros(max(overlap, steps))
        if self._held is not None:
            held[:overlap], shares[:overlap] = self._held, self._shares
        held[:steps] += values
        shares[:steps] += 1
        self._held, self._shares = held, shares
        return values[:0] if done is None else done

    def finish(self) -> torch.Tensor:
        """The steps [k, f, D] that are left."""
        return self._take(len(self._held))

    def clip(self) -> torch.Tensor:
        """[D] of the whole recording, after `finish`: the mean of all patches, or with `pool` "cls" of the cls and dist
        tokens.
        """
        return self._prefix / self._prefix_weight if self.pool == "cls" else self._sum.mean(dim=0) / self.count

    def _take(self, count: int) -> torch.Tensor | None:
        if self._held is None:
            return None
        done = self._held[:count] / self._shares[:count, None, None]
        self._held, self._shares = self._held[count:], self._shares[count:]
        self.count += count
        self._sum = self._sum + done.sum(dim=0)
        return done


def embedding_windows(model: SSAST, hop: float | None) -> Windows:
    """Windows whose steps fall on one another."""
    stride = model.config.stride[1]
    return Windows.of(model, hop, align=stride, most=model.config.grid[1] * stride)


def prediction_windows(model: SSAST, hop: float | None) -> Windows:
    return Windows.of(model, hop, align=1, most=model.config.input_frames)


def seconds_per_step(model: SSAST) -> float:
    rate = model.card.sample_rate
    return model.config.stride[1] * frame_geometry(rate)[1] / rate


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
            it is a batch of two. Integers of their type's full scale, or float of full scale 1.
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
    _require_batch_size(batch_size)
    states = [Steps(model, pool, padding) for _ in clips]
    parts: list[list[torch.Tensor]] = [[] for _ in clips]
    for event, row in encode_windows(model, _events(clips, windows), encode, batch_size):
        done = states[event.clip].finish() if isinstance(event, End) else states[event.clip].add(event, row)
        parts[event.clip].append(done if tokens else done.mean(dim=1))
    found = torch.nn.utils.rnn.pad_sequence([torch.cat(part) for part in parts], batch_first=True)  # [B, G, (f,) D]
    return Embedding(
        clip=torch.stack([state.clip() for state in states]),
        frames=found.mean(dim=2) if tokens else found,
        num_frames=torch.tensor([state.count for state in states], device=found.device),
        seconds_per_frame=seconds_per_step(model),
        tokens=found if tokens else None,
    )


def predict(
    model: SSAST,
    waveform: Waveform | Sequence[Waveform],
    sample_rate: int,
    *,
    hop: float | None = None,
    batch_size: int = BATCH_SIZE,
) -> Prediction:
    """Probabilities of the classes for clips of any length, pooled as the classifier was trained: over all tokens,
    padding too.

    Args:
        waveform, sample_rate: as `embed` takes them.
        hop: seconds from window to window in a clip longer than the model's input; None: half a window.
        batch_size: windows at a time.

    Raises:
        ValueError: a model without classifier, or what `embed` raises it for.
    """
    encode = class_encoder(model)
    clips = as_clips(waveform, sample_rate, model.card.sample_rate)
    windows = prediction_windows(model, hop)
    _require_batch_size(batch_size)
    rows: list[list[torch.Tensor]] = [[] for _ in clips]
    times: list[list[tuple[float, float]]] = [[] for _ in clips]
    for event, row in encode_windows(model, _events(clips, windows), encode, batch_size):
        if isinstance(event, Window):
            rows[event.clip].append(row)
            times[event.clip].append((windows.seconds(event.start), windows.seconds(event.start + event.frames)))
    stacked = [torch.stack(part) for part in rows]
    mean = torch.stack([part.mean(dim=0) for part in stacked])
    return Prediction(mean, class_names(model), stacked, [torch.tensor(part) for part in times])


def class_encoder(model: SSAST) -> Encoder:
    """[B, T, F] -> [B, C] probabilities.

    Raises:
        ValueError: a model without classifier.
    """
    if model.config.num_classes is None:
        raise ValueError("this model was pretrained, but has no classifier: fine-tune it first (ssast finetune)")

    def encode(features: torch.Tensor) -> torch.Tensor:
        logits = model.classify(features).float()
        return logits.sigmoid() if model.card.multi_label else logits.softmax(dim=1)

    return encode


def class_names(model: SSAST) -> tuple[str, ...]:
    """The model's labels; where they are not known, the numbers of its classes."""
    return model.card.labels or tuple(f"class {number}" for number in range(model.config.num_classes or 0))


def known_pool(model: SSAST, pool: str | None) -> str:
    """Raises ValueError for an unknown one."""
    pool = model.card.pool if pool is None else pool
    if pool not in ("mean", "cls"):
        raise ValueError(f"pool must be 'mean' or 'cls', not {pool!r}")
    return pool


def _require_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")


def _events(clips: Sequence[np.ndarray], windows: Windows) -> Iterator[Window | End]:
    for number, clip in enumerate(clips):
        for event in read_windows(number, [clip], windows):
            if isinstance(event, End) and event.error:
                raise ValueError(f"clip {number}: {event.error}")
            yield event


# Recordings on disk


def encode_recordings(
    model: SSAST, recordings: Sequence[Recording], windows: Windows, encode: Encoder, *, batch_size: int, workers: int
) -> Iterator[tuple[Window | End, torch.Tensor | None]]:
    """As `encode_windows`, of recordings in files, read as they are needed; `clip` is the number in `recordings`.

    Raises:
        UserError, RuntimeError: as `ssast.engine.data.sound.read_recordings`.
    """
    with contextlib.closing(read_recordings(recordings, windows.sample_rate, workers=workers)) as streams:
        progress = tqdm(streams, total=len(recordings), desc="recordings", unit="file", smoothing=0.05, disable=None)
        events = (event for clip, blocks in enumerate(progress) for event in read_windows(clip, blocks, windows))
        yield from encode_windows(model, events, encode, batch_size)


def embed_recordings(
    model: SSAST,
    recordings: Sequence[Recording],
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
    for event, row in events:
        if isinstance(event, Window):
            on_steps(steps.add(event, row))
            continue
        if event.error:
            yield event, None
        else:
            on_steps(steps.finish())
            yield event, steps.clip()
        steps = Steps(model, pool, padding)


# Waveforms as people have them


def as_clips(waveform: Waveform | Sequence[Waveform], sample_rate: int, wanted_rate: int) -> list[np.ndarray]:
    """Clips float32 [S] at `wanted_rate` Hz, of what `embed` takes.

    Raises:
        ValueError: as `embed` does.
    """
    if not LOWEST_RATE <= sample_rate < float("inf"):
        raise ValueError(f"sample_rate must be at least {LOWEST_RATE} Hz, not {sample_rate}")
    if isinstance(waveform, torch.Tensor | np.ndarray):
        if not 1 <= waveform.ndim <= 3:
            raise ValueError(f"a waveform must be [S], [B, S] or [B, C, S], not of shape {tuple(waveform.shape)}")
        if waveform.ndim > 1 and waveform.shape[-1] <= MOST_CHANNELS < waveform.shape[-2]:
            raise ValueError(f"samples come last, [B, S] or [B, C, S]: this is of shape {tuple(waveform.shape)}")
        clips = [waveform] if waveform.ndim == 1 else list(waveform)
    else:
        clips = list(waveform)
    if not clips:
        raise ValueError("no clips were given")
    return [_as_clip(clip, number, sample_rate, wanted_rate) for number, clip in enumerate(clips)]


def _as_clip(clip: Waveform, number: int, sample_rate: int, wanted_rate: int) -> np.ndarray:
    samples = (
        clip.detach().cpu().float().numpy()
        if _is_float(clip)
        else np.asarray(clip.cpu() if torch.is_tensor(clip) else clip)
    )
    if samples.ndim not in (1, 2):
        raise ValueError(f"clip {number} must be [S] or [C, S], not of shape {samples.shape}")
    if samples.ndim == 2 and not 1 <= len(samples) <= MOST_CHANNELS:
        raise ValueError(f"clip {number} of shape {samples.shape} has {len(samples)} channels: they come first, [C, S]")
    if samples.dtype.kind == "i":
        samples = samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    elif samples.dtype.kind != "f":
        raise ValueError(f"clip {number}: samples must be float or signed integers, not {samples.dtype}")
    mono = samples.astype(np.float32) if samples.ndim == 1 else samples.mean(axis=0, dtype=np.float32)
    peak = float(np.abs(mono).max(initial=0.0))
    if not np.isfinite(peak):
        raise ValueError(f"clip {number}: NaN or infinite samples ({np.count_nonzero(~np.isfinite(mono))})")
    if peak > MAX_PEAK:
        raise ValueError(
            f"clip {number}: peak {peak:.3g}, where float samples have a full scale of 1 (int16 ones are divided by "
            "32768)"
        )
    if sample_rate == wanted_rate or not len(mono):
        return mono
    return soxr.resample(mono, sample_rate, wanted_rate, quality=QUALITY)


def _is_float(clip: Waveform) -> bool:
    """Whether it is a floating tensor, of which some types are unknown to NumPy."""
    return torch.is_tensor(clip) and clip.is_floating_point()
