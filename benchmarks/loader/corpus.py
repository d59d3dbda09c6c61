"""What is read: the same clips as files and as shards, in every codec."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from ssast.engine.data.check import check_clips
from ssast.engine.data.clips import Clips
from ssast.engine.data.prepare import Settings, prepare
from ssast.engine.data.record import Record
from ssast.engine.data.shards import NOTED, Index, load_index, open_shards
from ssast.engine.data.synth import CLASSES, synthesize
from ssast.engine.data.texts import Texts
from ssast.engine.errors import UserError

SAMPLE_RATE = 16_000
FORMATS = {"wav": ("WAV", "PCM_16"), "flac": ("FLAC", "PCM_16"), "opus": ("OGG", "OPUS")}
IN_SHARDS = ("wav", "flac")  # what `ssast prepare` writes
SHARDS = 32  # or more: every worker of webdataset needs some of its own
PIECE_S, SHORT_FROM = 0.25, 20  # length of the short clips that memory is watched on; of how many clips they are cut
_SOUNDS_A_CLASS = 12


@dataclass(frozen=True)
class Corpus:
    """A folder with `files/CODEC/`, `shards/CODEC/` and a cache of checked files; all clips are `num_samples` long."""

    folder: Path
    num_samples: int

    def files(self, codec: str) -> list[str]:
        """In the order of the shards."""
        return sorted(str(path) for path in (self.folder / "files" / codec).iterdir())

    def shards(self, codec: str) -> Path:
        """The folder that `ssast prepare` wrote for a codec."""
        return self.folder / "shards" / codec

    def short(self, codec: str) -> Path:
        """Shards of clips of PIECE_S, or less."""
        return self.folder / "short" / codec

    def clips(self, codec: str, source: str) -> Clips:
        """As training opens them.

        Raises:
            UserError: a file would not be read as it is.
        """
        if source == "shards":
            return open_shards(self.shards(codec))
        entries = [Record(path) for path in self.files(codec)]
        clips, skipped = check_clips(entries, cache_dir=self.folder / "cache", progress=False)
        if skipped or clips.converted.any():
            raise UserError(
                f"{self.folder}: {len(skipped)} {codec} files would be skipped, {clips.converted.sum()} converted"
            )
        return clips

    def bytes_a_clip(self, codec: str) -> int:
        """The mean size of a codec's files."""
        files = self.files(codec)
        return sum(os.path.getsize(path) for path in files) // len(files)


def make_corpus(
    folder: Path, codecs: list[str], *, clips: int, seconds: float, audio: Path | None, workers: int
) -> Corpus:
    """Writes the same clips in every codec, Opus a quarter as loud: pieces of the recordings in `audio`, or of
    synthetic sound events.

    Raises UserError if `audio` has not one piece of that length.
    """
    corpus = Corpus(folder, round(seconds * SAMPLE_RATE))
    sounds = (
        _synthetic(clips, corpus.num_samples) if audio is None else _recorded(audio, folder, clips, seconds, workers)
    )
    for codec in codecs:
        (folder / "files" / codec).mkdir(parents=True)
        paths = [folder / "files" / codec / f"{number:06}.{codec}" for number in range(len(sounds))]
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(_write, paths, sounds, [codec] * len(sounds)))
        corpus.clips(codec, "files")  # checked once, before anything is timed
    for codec in (codec for codec in codecs if codec in IN_SHARDS):
        source = str(folder / "files" / codec)
        size = sum(map(os.path.getsize, corpus.files(codec)))
        shard_size = max(size // max(SHARDS, 2 * workers), 1)
        _prepare(
            Settings([source], codec=codec, max_length=2 * seconds, shard_size=shard_size),
            corpus.shards(codec),
            workers,
        )
        piece = min(PIECE_S, seconds)
        pieces = Settings(
            [source], codec=codec, segment=piece, hop=piece, min_length=piece, max_length=2 * seconds, shard_size=size
        )
        _prepare(pieces, corpus.short(codec), workers)
    return corpus


def _write(path: Path, samples: np.ndarray, codec: str) -> None:
    container, subtype = FORMATS[codec]
    if codec == "opus":
        samples = samples // 4  # a decoder may overshoot, and what exceeds full scale is read from a converted copy
    soundfile.write(path, samples, SAMPLE_RATE, subtype=subtype, format=container)


def _prepare(settings: Settings, out: Path, workers: int) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    prepare(settings, out, workers=workers, progress=False)


def _synthetic(count: int, num_samples: int) -> list[np.ndarray]:
    """Windows of one long stretch of sound events of every class, from random places on."""
    made = [
        (32768 * synthesize(label, 0, number)).astype(np.int16)
        for number in range(_SOUNDS_A_CLASS)
        for label in CLASSES
    ]
    stream = np.concatenate(made * (1 + num_samples // sum(map(len, made))))
    starts = np.random.default_rng(0).integers(0, len(stream), count)
    around = np.concatenate([stream, stream[:num_samples]])
    return [around[start : start + num_samples] for start in starts.tolist()]


def _recorded(audio: Path, folder: Path, count: int, seconds: float, workers: int) -> list[np.ndarray]:
    out = folder / "recorded"
    settings = Settings(
        [os.path.abspath(audio)], segment=seconds, hop=seconds, min_length=seconds, max_length=172_800.0
    )
    _prepare(settings, out, workers)
    clips, sounds = open_shards(out), []
    for path, offset, size in zip(
        clips.paths[:count], clips.offsets[:count].tolist(), clips.sizes[:count].tolist(), strict=True
    ):
        with open(path, "rb") as file:
            file.seek(offset + 44)
            sounds.append(np.frombuffer(file.read(size - 44), dtype="<i2"))
    return sounds


def repeat_index(prepared: Path, out: Path, entries: int) -> None:
    """A prepared folder of `entries` clips: those of another one again and again, in the same shards."""
    described = json.loads((prepared / "dataset.json").read_bytes())
    numbers, texts = load_index(prepared)
    rows = np.arange(entries) % len(numbers["shard"])
    out.mkdir()
    (out / "shards").symlink_to(prepared.resolve() / "shards")
    words = {name: list(Texts([block])) for name, block in texts.items()}
    index = Index(out / "index")
    for part in np.array_split(rows, max(1, entries // 100_000)):
        first = index.rows
        repeated = {name: [words[name][row] for row in part] for name in NOTED}
        repeated |= {name: [f"{first + i:09d}/{text}" for i, text in enumerate(repeated[name])] for name in ("source",)}
        keys = [f"{first + i:09d}" for i in range(len(part))]
        index.append({name: column[part].tolist() for name, column in numbers.items()}, {**repeated, "key": keys})
    index.close()
    counts = np.bincount(np.asarray(numbers["shard"])[rows], minlength=len(described["shards"])).tolist()
    shards = [shard | {"clips": count} for shard, count in zip(described["shards"], counts, strict=True)]
    (out / "dataset.json").write_text(json.dumps(described | {"clips": entries, "shards": shards}))
