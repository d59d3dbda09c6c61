"""Ways of reading clips. Each is an endless stream of batches of B clips, waveform int16 [B, S]; the official way's are
features instead.

All take the clips in one order, a permutation for each epoch, but webdataset, which goes through its shards from end to
end: it is spared the shuffle buffer that it would need.
"""

from __future__ import annotations

import functools
import importlib.metadata
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import soundfile
import torch
from torch.utils.data import DataLoader, Dataset

from ssast.benchmarks.operator_baselines import official_fbank
from ssast.engine.data.decode import AudioDecoder
from ssast.engine.data.loader import ClipReader, Prefetcher, Shard
from ssast.engine.data.order import SampleOrder

from .aims import ALONE, OURS
from .corpus import IN_SHARDS, SAMPLE_RATE, Corpus

FRAMES, MEAN, STD = 1024, -4.2677393, 4.5689974  # of the official recipe
PREFETCH = 3  # as data.prefetch


@dataclass(frozen=True)
class Case:
    """What is read: clips of one codec from one source, in batches, by so many workers."""

    corpus: Corpus
    codec: str
    source: str
    batch: int
    workers: int


@dataclass(frozen=True)
class Contestant:
    """`ahead`: up to so many batches may be ready before they are asked for, by number of workers. `note` says what
    there is to say of how it runs here; it raises ImportError, OSError or RuntimeError where it cannot run.
    """

    name: str
    sources: tuple[str, ...]
    stream: Callable[[Case], Iterator[torch.Tensor]]
    ahead: Callable[[int], int]
    note: Callable[[], str]
    most_workers: int | None = None

    def enters(self, codec: str, source: str, workers: int) -> bool:
        """Whether it can read this codec from this source with so many workers."""
        can = source in self.sources and (source == "files" or codec in IN_SHARDS)
        return can and (self.most_workers is None or workers <= self.most_workers)


# ---- this engine -----------------------------------------------------------------------------------------------------


def engine_stream(case: Case) -> Iterator[torch.Tensor]:
    """As the trainer reads."""
    clips = case.corpus.clips(case.codec, case.source)
    loader = prefetcher(clips, case.corpus.num_samples, case.batch, case.workers)
    try:
        for batch in loader:
            yield batch.waveform
    finally:
        loader.close()


def prefetcher(clips: Any, num_samples: int, batch: int, threads: int, *, random_crop: bool = False) -> Prefetcher:
    """This engine's loader, as the trainer builds it."""
    decoder = AudioDecoder(
        clips, num_samples=num_samples, sample_rate=SAMPLE_RATE, batch_size=batch, num_threads=threads
    )
    reader = ClipReader(decoder, SampleOrder(len(clips), 0), random_crop=random_crop)
    return Prefetcher(reader, Shard(0, 1, batch), 0, torch.device("cpu"), PREFETCH)


# ---- libsndfile alone ------------------------------------------------------------------------------------------------


def alone_stream(case: Case) -> Iterator[torch.Tensor]:
    """Into memory that is there already, one clip after the other."""
    files, window = case.corpus.files(case.codec), np.empty((case.batch, case.corpus.num_samples), dtype=np.int16)
    for numbers in _Batches(len(files), case.batch):
        for row, number in zip(window, numbers, strict=True):
            with soundfile.SoundFile(files[number]) as sound:
                sound.read(dtype="int16", out=row)
        yield torch.from_numpy(window)


# ---- torch DataLoader ------------------------------------------------------------------------------------------------


class _Batches:
    """Numbers of the clips of each batch, for ever."""

    def __init__(self, clips: int, batch: int) -> None:
        self.order, self.batch = SampleOrder(clips, 0), batch

    def __iter__(self) -> Iterator[list[int]]:
        position = 0
        while True:
            yield self.order.clips_at(position, self.batch)[0].tolist()
            position += self.batch


class _Files(Dataset):
    def __init__(self, files: list[str], read: Callable[[str], torch.Tensor]) -> None:
        self.files, self.read = files, read

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.read(self.files[number])


def _over_files(read: Callable[[str, int], torch.Tensor]) -> Callable[[Case], Iterator[torch.Tensor]]:
    def stream(case: Case) -> Iterator[torch.Tensor]:
        files, num_samples = case.corpus.files(case.codec), case.corpus.num_samples
        data = _Files(files, lambda path: read(path, num_samples))
        return _loaded(data, case, batch_sampler=_Batches(len(files), case.batch))

    return stream


def _loaded(data: Any, case: Case, **options: Any) -> Iterator[torch.Tensor]:
    return iter(DataLoader(data, num_workers=case.workers, multiprocessing_context="fork", **options))


def _fit(samples: torch.Tensor, num_samples: int) -> torch.Tensor:
    return torch.nn.functional.pad(samples[:num_samples], (0, num_samples - min(len(samples), num_samples)))


def read_soundfile(path: Any, num_samples: int) -> torch.Tensor:
    """int16 [num_samples]: one clip, cut or padded with zeros."""
    return _fit(torch.from_numpy(soundfile.read(path, dtype="int16", frames=num_samples)[0]), num_samples)


def read_torchcodec(path: str, num_samples: int) -> torch.Tensor:
    """int16 [num_samples]: one clip, cut or padded with zeros."""
    from torchcodec.decoders import AudioDecoder as TorchCodec

    samples = TorchCodec(path, sample_rate=SAMPLE_RATE, num_channels=1).get_all_samples().data[0]
    return _fit((samples * 32768).round_().clamp_(-32768, 32767).to(torch.int16), num_samples)


def read_official(path: str, num_samples: int) -> torch.Tensor:
    """float32 [T, F]: one clip loaded, its mean subtracted, Kaldi's filter bank, padded, normalised."""
    samples = read_soundfile(path, num_samples)
    kaldi, _ = _kaldi()
    if kaldi is None:
        return official_fbank(samples[None], num_frames=FRAMES, mean=MEAN, std=STD, dtype=torch.float32)[0]
    wave = samples[None].float() / 32768.0
    features = kaldi.fbank(
        wave - wave.mean(),
        htk_compat=True,
        sample_frequency=SAMPLE_RATE,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=128,
        dither=0.0,
        frame_shift=10,
    )
    features = torch.nn.functional.pad(features, (0, 0, 0, FRAMES - len(features)))[:FRAMES]
    return (features - MEAN) / (2 * STD)


@functools.cache
def _kaldi() -> tuple[types.ModuleType | None, str]:
    """torchaudio.compliance.kaldi, or None where it cannot be imported, and what is used."""
    try:
        from torchaudio.compliance import kaldi
    except (ImportError, OSError, RuntimeError) as error:  # its native library may be built for another torch
        why = "is not installed" if isinstance(error, ModuleNotFoundError) else "cannot be imported"
        return None, f"fbank as torchaudio computes it, written anew: torchaudio {why}"
    return kaldi, f"fbank of torchaudio {importlib.metadata.version('torchaudio')}"


# ---- webdataset ------------------------------------------------------------------------------------------------------


def webdataset_stream(case: Case) -> Iterator[torch.Tensor]:
    """Shards by webdataset in a DataLoader."""
    import io

    import webdataset

    shards = sorted(map(str, (case.corpus.shards(case.codec) / "shards").glob("*.tar")))

    def read(sample: tuple[bytes]) -> torch.Tensor:
        return read_soundfile(io.BytesIO(sample[0]), case.corpus.num_samples)

    data = webdataset.WebDataset(shards, shardshuffle=False, select_files=lambda name: not name.endswith(".json"))
    # Batched by DataLoader: webdataset's own batches end with an epoch, and what is left over would be read in vain.
    return _loaded(data.to_tuple(case.codec).map(read).repeat(), case, batch_size=case.batch)


# ---- all of them -----------------------------------------------------------------------------------------------------


def _of(package: str, module: str | None = None) -> Callable[[], str]:
    """Imports it; its name and version."""

    def note() -> str:
        importlib.import_module(module or package)
        return f"{package} {importlib.metadata.version(package)}"

    return note


def _twice(workers: int) -> int:
    return 2 * workers  # DataLoader's prefetch_factor


BOTH = ("shards", "files")
_ENGINE = Contestant(OURS, BOTH, engine_stream, lambda _: PREFETCH + 3, _of("nvidia-dali-cuda130", "nvidia.dali"))
_ALONE = Contestant(
    ALONE,
    ("files",),
    alone_stream,
    lambda _: 0,
    lambda: f"{_of('soundfile')()}, libsndfile {soundfile.__libsndfile_version__}",
    most_workers=1,
)
CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        _ENGINE,
        _ALONE,
        Contestant("soundfile, DataLoader", ("files",), _over_files(read_soundfile), _twice, _of("soundfile")),
        Contestant("webdataset, DataLoader", ("shards",), webdataset_stream, _twice, _of("webdataset")),
        Contestant(
            "torchcodec, DataLoader",
            ("files",),
            _over_files(read_torchcodec),
            _twice,
            _of("torchcodec", "torchcodec.decoders"),
        ),
        Contestant("official way", ("files",), _over_files(read_official), _twice, lambda: _kaldi()[1]),
    )
}
