"""The clips of a run: manifests read, files checked once, shards opened, training and validation told apart, feature
statistics.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssast.engine.config import DataSection
from ssast.engine.errors import UserError
from ssast.engine.process import default_cache_folder

from .check import check_clips
from .clips import Clips, Skipped
from .decode import AudioDecoder
from .manifest import EXTENSIONS
from .record import Record
from .remarks import FLAT
from .shards import is_prepared, print_remarks
from .sources import Source, read_all
from .statistics import NUM_MEL_BINS, evenly_picked, feature_statistics
from .texts import Texts

STATISTICS_CLIPS = 512
CONVERTED_RATE = 16000  # Hz, the rate of the copies that probe.py makes
MIN_STD = 1e-3


@dataclass(frozen=True)
class Dataset:
    """The clips of a run, and the mean and standard deviation of their log-mel features."""

    train: Clips
    valid: Clips
    skipped: list[Skipped]
    mean: float
    std: float
    train_sizes: list[int]
    """Training clips of each entry of data.train, which follow one another in `train`."""
    draw_weights: np.ndarray | None = None
    """[N] of the training clips: they are drawn in proportion, not each once an epoch."""

    def parts(self) -> tuple[Clips, ...]:
        """All clips, as they are read."""
        return self.train, self.valid

    def summary(self) -> dict[str, int | float]:
        """What environment.json and the log say of the data."""
        return {
            "clips": len(self.train) + len(self.valid),
            "hours": round(self.train.hours + self.valid.hours, 4),
            "train_clips": len(self.train),
            "valid_clips": len(self.valid),
            "skipped": len(self.skipped),
            "mean": self.mean,
            "std": self.std,
        }


def open_dataset(
    data: DataSection, num_mel_bins: int, num_samples: int, measured: tuple[float, float] | None = None
) -> Dataset:
    """Read and check all clips that `data` names.

    Args:
        data: sources, their splits, and how clips are checked.
        num_mel_bins: of the features whose mean and standard deviation "auto" stands for.
        num_samples: of a window; of longer clips that much is measured.
        measured: the mean and standard deviation that "auto" stands for, if known already.

    Raises:
        UserError: nothing named, found or readable, too few clips to hold some out, or in strict mode any clip that is
            skipped.
    """
    if not data.train:
        raise UserError(
            "data.train is not set: name a folder, prepared or not, a JSON, CSV or TSV manifest, or a list of paths: "
            "data.train=/path"
        )
    clips, skipped = _checked(data.train, data)
    train, own_valid = _by_split(clips)
    if data.valid:
        valid, valid_skipped = _checked(data.valid, data)
        skipped += valid_skipped
        valid = valid.subset(~np.isin(valid.splits.hashes(), Texts.from_list(["test"]).hashes()))
        if not len(valid):
            raise UserError(f"{', '.join(data.valid)}: all clips are marked for test, none for validation")
        train = _without(train, valid)
    elif len(own_valid):
        valid = own_valid
    else:
        train, valid = _hold_out(train, data)
    if not len(train):
        raise UserError(
            f"{', '.join(data.train)}: all {len(clips)} clips are marked or named for validation or test, none for "
            "training"
        )
    if data.strict and skipped:
        raise UserError(
            f"{skipped[0].path}: {skipped[0].reason} (the first of {len(skipped)} unusable clips; data.strict is set)"
        )
    valid = valid.subset(_lowest_hashes(valid, data.valid_clips))
    if data.sample_rate > CONVERTED_RATE and train.converted.any():
        raise UserError(
            f"data.sample_rate: {data.sample_rate}, but some files are in formats that are converted to "
            f"{CONVERTED_RATE} Hz"
        )
    sizes = np.bincount(train.datasets, minlength=len(data.train)).tolist()
    if data.weights is not None and 0 in sizes:
        raise UserError(f"{data.train[sizes.index(0)]}: no clips to train on, but data.weights gives it a fraction")
    mean, std = data.mean, data.std
    if isinstance(mean, str) or isinstance(std, str):
        mean, std = (
            measured
            or _prepared_statistics(data, num_mel_bins)
            or clip_statistics(train, data.sample_rate, num_mel_bins, num_samples, data.num_threads, data.weights)
        )
    return Dataset(train, valid, skipped, mean, std, sizes)


def cache_folder(data: DataSection) -> Path:
    """Where verdicts on files and converted copies are kept."""
    if data.cache_dir is not None:
        return Path(data.cache_dir)
    return default_cache_folder()


def clip_statistics(
    clips: Clips,
    sample_rate: int,
    num_mel_bins: int,
    num_samples: int,
    num_threads: int,
    weights: Sequence[float] | None = None,
) -> tuple[float, float]:
    """Mean and standard deviation of the log-mel features over up to 512 clips, evenly picked, of each data set as many
    as its weight asks for; frames of padding do not count.
    """
    decoder = AudioDecoder(
        clips, num_samples=num_samples, sample_rate=sample_rate, batch_size=16, num_threads=num_threads
    )
    picked = _picked(clips.datasets, weights)

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for index in np.array_split(picked, -(-len(picked) // 16)):
            batch = decoder.decode(index, np.zeros(len(index), dtype=np.int64))
            yield batch.waveform, batch.lengths

    mean, std = feature_statistics(batches(), sample_rate, num_mel_bins)
    decoder.close()
    return mean, _usable(std)


def _usable(std: float) -> float:
    """A standard deviation to divide by; a warning where the data has none."""
    if std < MIN_STD:
        print(f"warning: {FLAT}", file=sys.stderr)
    return max(std, MIN_STD)


def _picked(datasets: np.ndarray, weights: Sequence[float] | None) -> np.ndarray:
    """Clips to measure on: evenly over all, or, where data sets are drawn by weight, that fraction of each.

    `datasets` int32 [N] is the data set of each clip, ascending. A small data set of a large weight gives the clips it
    has as often as it takes, as in training.
    """
    if weights is None:
        return evenly_picked(len(datasets), STATISTICS_CLIPS)
    edges = np.searchsorted(datasets, np.arange(len(weights) + 1))
    total = min(len(datasets), STATISTICS_CLIPS)
    parts = []
    for first, last, weight in zip(edges[:-1], edges[1:], weights, strict=True):
        count = max(1, round(total * weight / sum(weights)))
        parts.append(first + (np.linspace(0, last - first - 1, count)).astype(np.int64))
    return np.concatenate(parts)


def _prepared_statistics(data: DataSection, num_mel_bins: int) -> tuple[float, float] | None:
    """Mean and std as measured when the only data set was prepared, if they are of the features that this run
    computes.
    """
    folder = Path(data.train[0])
    if len(data.train) > 1 or not is_prepared(folder):
        return None
    path = folder / "stats.json"
    try:
        if json.loads((folder / "dataset.json").read_bytes())["sample_rate"] != data.sample_rate:
            return None
        stats = json.loads(path.read_bytes())
        if stats.get("num_mel_bins", NUM_MEL_BINS) != num_mel_bins:
            return None
        return float(stats["mean"]), _usable(float(stats["std"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{path}: no mean and std to be read ({problem}); run ssast prepare again, or set data.mean and data.std"
        ) from None


def _checked(sources: list[str], data: DataSection) -> tuple[Clips, list[Skipped]]:
    """The clips of all sources, numbered by source, and what cannot be used of them."""
    contents = {source: _read(source) for source in dict.fromkeys(sources)}
    for source in (name for name, content in contents.items() if content.clips is not None):
        print_remarks(Path(source))
    manifests = {source: content.rows for source, content in contents.items() if content.clips is None}
    entries = [entry for manifest in manifests.values() for entry in manifest]
    if entries:
        plain, skipped = check_clips(entries, cache_dir=cache_folder(data), min_seconds=data.min_seconds)
    else:
        plain, skipped = Clips([], [], [], [], *np.zeros((4, 0), dtype=np.int64)), []
    unusable = {item.path for item in skipped}
    of_source = np.repeat(np.arange(len(manifests)), [len(manifest) for manifest in manifests.values()])
    of_source = of_source[[entry.path not in unusable for entry in entries]]
    parts = {source: plain.subset(of_source == number) for number, source in enumerate(manifests)}
    for source, content in contents.items():
        if content.clips is not None:
            parts[source], short = _long_enough(content.clips, data.min_seconds)
            skipped += short
    clips = Clips.joined([parts[source] for source in sources])
    if not len(clips):
        example = f"; the first: {skipped[0].path}: {skipped[0].reason}" if skipped else ""
        count = len(entries) + sum(len(content.clips) for content in contents.values() if content.clips is not None)
        raise UserError(f"{', '.join(sources)}: none of {count} audio files can be used{example}")
    return clips, skipped


def _read(source: str) -> Source:
    """A source to train on without labels.

    Raises:
        UserError: as `read_all`; or clips that lie in tars, are parts of files, or are of no split that there is.
    """
    content = read_all(source)
    if content.kind in ("tar", "file"):
        raise UserError(
            f"{source}: is neither a folder nor a manifest ({', '.join(EXTENSIONS)}); make it a folder to train on by "
            "ssast prepare"
        )
    content.check_splits()
    require_whole_files(source, content.rows)
    for note in content.notes:
        print(f"{source}: {note}", file=sys.stderr)
    for remark in content.remarks:
        warnings.warn(f"{source}: {remark}", stacklevel=5)
    return content


def require_whole_files(source: str, records: Sequence[Record]) -> None:
    """Of clips to train on, none may be a part of a file.

    Raises:
        UserError: one is, which training does not cut.
    """
    part = next((record for record in records if record.is_segment), None)
    if part is not None:
        raise UserError(
            f"{source}: its columns start and end (or offset and duration) name parts of files, as of {part.path}; "
            f"training reads whole files: cut them by ssast prepare {source} --out FOLDER, and train on FOLDER"
        )


def _long_enough(clips: Clips, min_seconds: float) -> tuple[Clips, list[Skipped]]:
    """Clips of a prepared folder, less those that are shorter."""
    needed = np.ceil(min_seconds * clips.sample_rates - 1e-6).astype(np.int64)
    short = np.flatnonzero(clips.frames < needed)
    if not len(short):
        return clips, []
    skipped = [
        Skipped(clips.sources[row], f"too short: {clips.frames[row]} samples, one frame needs {needed[row]}")
        for row in short.tolist()
    ]
    return clips.subset(clips.frames >= needed), skipped


def check_reachable(data: Dataset) -> None:
    """Look for the files that the first machine checked, on another one.

    Raises:
        UserError: one is not there.
    """
    for clips in data.parts():
        plain = clips.subset(~clips.in_shards)
        shards = clips.subset(clips.in_shards).paths.used()
        for path in (*plain.paths[:1], *plain.paths[-1:], *plain.subset(plain.converted).paths, *shards):
            if not os.path.exists(path):
                raise UserError(
                    f"{path}: not on this machine ({platform.node()}); audio and data.cache_dir must be at the same "
                    "place on every node",
                    every_rank=True,
                )


def _by_split(clips: Clips) -> tuple[Clips, Clips]:
    """The clips for training and those for validation, by their splits; clips for test are in neither."""
    valid, test = Texts.from_list(["valid", "test"]).hashes()
    hashes = clips.splits.hashes()
    is_valid, is_test = hashes == valid, hashes == test
    if not is_valid.any() and not is_test.any():
        return clips, clips.subset(is_valid)
    return clips.subset(~is_valid & ~is_test), clips.subset(is_valid)


def _without(clips: Clips, others: Clips) -> Clips:
    return clips.subset(~np.isin(clips.sources.hashes(), others.sources.hashes()))


def _hold_out(clips: Clips, data: DataSection) -> tuple[Clips, Clips]:
    """Training and validation: those clips whose source hashes lowest are held out, so that the choice survives added
    files.
    """
    if len(clips) < 2:
        raise UserError(
            f"{', '.join(data.train)}: one clip alone cannot be both trained and validated on; name data.valid or add "
            "clips"
        )
    numbers = _lowest_hashes(clips, min(max(1, round(data.valid_fraction * len(clips))), data.valid_clips))
    is_valid = np.zeros(len(clips), dtype=bool)
    is_valid[numbers] = True
    return clips.subset(~is_valid), clips.subset(is_valid)


def _lowest_hashes(clips: Clips, count: int) -> np.ndarray:
    """Numbers of up to `count` clips, ascending. Pieces of one recording are taken together or, where others are taken,
    not at all.
    """
    if count >= len(clips):
        return np.arange(len(clips))
    hashes = np.where(clips.in_shards, clips.sources.hashes(), np.uint64(0))
    plain = np.flatnonzero(~clips.in_shards)
    digests = b"".join(
        hashlib.blake2b(source, digest_size=8).digest() for source in clips.subset(plain).sources.encoded()
    )
    hashes[plain] = np.frombuffer(digests, dtype=">u8")
    beyond = np.partition(hashes, count)[count]
    lower = np.flatnonzero(hashes < beyond)
    return lower if len(lower) else np.flatnonzero(hashes == beyond)[:count]
