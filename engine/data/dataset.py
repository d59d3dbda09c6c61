"""The clips of a run: manifests read, files checked once, training and validation told apart, feature statistics."""

from __future__ import annotations

import hashlib
import os
import platform
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
CONVERTED_RATE = 16000  # of the copies that probe.py makes
VALID_SPLITS, TEST_SPLITS = ("valid", "validation", "val", "dev"), ("test", "eval")


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
    clips, skipped = _checked(data.train, data)
    train, marked = _by_split(clips)
    if data.valid:
        valid, valid_skipped = _checked(data.valid, data)
        skipped += valid_skipped
        train = _without(train, valid)
    elif len(marked):
        valid = marked
    else:
        train, valid = _hold_out(train, data)
    if not len(train):
        raise UserError(
            f"{', '.join(data.train)}: all {len(clips)} clips are marked or named for validation or test, none for training"
        )
    if data.strict and skipped:
        raise UserError(f"{skipped[0].path}: {skipped[0].reason} (the first of {len(skipped)} unusable clips; data.strict is set)")
    valid = valid.subset(np.sort(_lowest_hashes(valid, data.valid_clips)))
    if data.sample_rate > CONVERTED_RATE and any(path != source for path, source in zip(train.paths, train.sources, strict=True)):
        raise UserError(
            f"data.sample_rate: {data.sample_rate}, but some files are in formats that are converted to {CONVERTED_RATE} Hz"
        )
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


def check_reachable(data: Dataset) -> None:
    """Raise UserError on a machine that does not see the files that the first one checked."""
    for clips in (data.train, data.valid):
        for path in (
            clips.paths[0],
            clips.paths[-1],
            *(path for path, own in zip(clips.paths, clips.sources, strict=True) if path != own),
        ):
            if not os.path.exists(path):
                raise UserError(
                    f"{path}: not on this machine ({platform.node()}); audio and data.cache_dir must be at the same place on every node",
                    every_rank=True,
                )


def _by_split(clips: Clips) -> tuple[Clips, Clips]:
    """(for training, marked as validation) by the manifest's split column; what it marks as test is in neither."""
    splits = np.array([split.strip().lower() for split in clips.splits])
    marked, test = np.isin(splits, VALID_SPLITS), np.isin(splits, TEST_SPLITS)
    return clips.subset(np.flatnonzero(~marked & ~test)), clips.subset(np.flatnonzero(marked))


def _without(clips: Clips, others: Clips) -> Clips:
    taken = set(others.sources)
    return clips.subset(np.array([row for row, source in enumerate(clips.sources) if source not in taken], dtype=np.int64))


def _hold_out(clips: Clips, data: DataSection) -> tuple[Clips, Clips]:
    """Training and validation: those clips whose path hashes lowest are held out, so that the choice survives added files."""
    if len(clips) < 2:
        raise UserError(
            f"{', '.join(data.train)}: one clip alone cannot be both trained and validated on; name data.valid or add clips"
        )
    held = _lowest_hashes(clips, min(max(1, round(data.valid_fraction * len(clips))), data.valid_clips))
    return clips.subset(np.setdiff1d(np.arange(len(clips)), held)), clips.subset(np.sort(held))


def _lowest_hashes(clips: Clips, count: int) -> np.ndarray:
    hashes = [hashlib.blake2b(os.fsencode(path), digest_size=8).digest() for path in clips.sources]
    return np.array(sorted(range(len(clips)), key=hashes.__getitem__)[:count], dtype=np.int64)
