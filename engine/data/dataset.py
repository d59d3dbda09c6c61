"""The clips of a run: manifests read, files checked once, training and validation told apart, feature statistics."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ssast.engine.config import Config, DataSection
from ssast.engine.errors import UserError
from ssast.kernels import fbank
from ssast.kernels.fbank import count_frames

from .check import Clips, Skipped, check_clips
from .decode import AudioDecoder
from .manifest import Entry, read_manifest

STATISTICS_CLIPS = 512


@dataclass(frozen=True)
class Dataset:
    train: Clips
    valid: Clips
    skipped: list[Skipped]
    mean: float
    std: float

    def summary(self) -> dict[str, int | float]:
        return {
            "clips": len(self.train) + len(self.valid),
            "hours": round(self.train.hours + self.valid.hours, 4),
            "train_clips": len(self.train),
            "valid_clips": len(self.valid),
            "skipped": len(self.skipped),
            "mean": self.mean,
            "std": self.std,
        }


def open_dataset(config: Config, measured: tuple[float, float] | None = None) -> Dataset:
    """Read and check all clips that the config names; `measured` is the mean and std that "auto" stands for, if known already.

    Raises:
        UserError: nothing named, found or readable, too few clips to hold some out, or in strict mode any clip that is skipped.
    """
    data = config.data
    if not data.train:
        raise UserError("data.train is not set: name a folder, a JSON, CSV or TSV manifest, or a list of paths: data.train=/path")
    train, train_skipped = _checked(data.train, data)
    if data.valid:
        valid, valid_skipped = _checked(data.valid, data)
    else:
        train, valid = _hold_out(train, data.valid_fraction)
        valid_skipped = []
    skipped = train_skipped + valid_skipped
    if data.strict and skipped:
        raise UserError(f"{skipped[0].path}: {skipped[0].reason} (the first of {len(skipped)} unusable clips; data.strict is set)")
    valid = valid.subset(np.arange(min(len(valid), data.valid_clips)))
    mean, std = data.mean, data.std
    if isinstance(mean, str) or isinstance(std, str):
        bins = config.model.num_mel_bins
        mean, std = measured or feature_statistics(train, data.sample_rate, bins, config.num_samples, data.num_threads)
    return Dataset(train, valid, skipped, mean, std)


def cache_folder(data: DataSection) -> Path:
    if data.cache_dir is not None:
        return Path(data.cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssast"


def feature_statistics(
    clips: Clips, sample_rate: int, num_mel_bins: int, num_samples: int, num_threads: int
) -> tuple[float, float]:
    """Mean and standard deviation of the log-mel features over up to 512 clips, evenly picked; frames of padding do not count."""
    picked = np.unique(np.linspace(0, len(clips) - 1, min(len(clips), STATISTICS_CLIPS)).astype(np.int64))
    decoder = AudioDecoder(clips, num_samples=num_samples, sample_rate=sample_rate, batch_size=16, num_threads=num_threads)
    count, total, squares = 0, 0.0, 0.0
    for index in np.array_split(picked, -(-len(picked) // 16)):
        batch = decoder.decode(index, np.zeros(len(index), dtype=np.int64))
        lengths = torch.from_numpy(batch.lengths)
        features = fbank(torch.from_numpy(batch.waveform), sample_rate=sample_rate, num_mel_bins=num_mel_bins, lengths=lengths)
        is_sound = torch.arange(features.shape[1])[None, :] < count_frames(lengths, sample_rate)[:, None]
        values = features[is_sound].double()
        count, total, squares = count + values.numel(), total + values.sum().item(), squares + values.square().sum().item()
    decoder.close()
    mean = total / count
    std = max(squares / count - mean**2, 0.0) ** 0.5
    return round(mean, 4), round(max(std, 1e-3), 4)


def _checked(sources: list[str], data: DataSection) -> tuple[Clips, list[Skipped]]:
    entries: list[Entry] = [entry for source in sources for entry in read_manifest(source)]
    clips, skipped = check_clips(entries, cache_dir=cache_folder(data), min_seconds=data.min_seconds)
    if not len(clips):
        example = f"; the first: {skipped[0].path}: {skipped[0].reason}" if skipped else ""
        raise UserError(f"{', '.join(sources)}: none of {len(entries)} audio files can be used{example}")
    return clips, skipped


def _hold_out(clips: Clips, fraction: float) -> tuple[Clips, Clips]:
    """Clips marked as validation in the manifest; where none is marked, those whose path hashes lowest, so that the choice survives
    added files."""
    marked = np.array([split in ("valid", "validation", "val", "dev") for split in clips.splits])
    if not marked.any():
        if len(clips) < 2:
            raise UserError(
                f"{clips.sources[0]}: one clip alone cannot be both trained and validated on; name data.valid or add clips"
            )
        hashes = [hashlib.blake2b(os.fsencode(path), digest_size=8).digest() for path in clips.sources]
        wanted = max(1, round(fraction * len(clips)))
        marked = np.zeros(len(clips), dtype=bool)
        marked[sorted(range(len(clips)), key=hashes.__getitem__)[:wanted]] = True
    is_test = np.array([split in ("test", "eval") for split in clips.splits])
    train = np.flatnonzero(~marked & ~is_test)
    if not len(train):
        raise UserError(
            f"{clips.sources[0]} and {len(clips) - 1} more: all clips are marked for validation or test, none for training"
        )
    return clips.subset(train), clips.subset(np.flatnonzero(marked))
