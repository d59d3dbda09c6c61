"""From clips to batches: crops, ranks, and files that break after they were checked."""

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from ssast.engine.data.check import check_clips
from ssast.engine.data.decode import AudioDecoder
from ssast.engine.data.loader import ClipReader, Prefetcher, Shard
from ssast.engine.data.order import MixedOrder, SampleOrder
from ssast.engine.data.record import Record
from ssast.engine.errors import UserError

WINDOW = 4000


def write_clips(folder: Path, count: int = 8, rate: int = 16000) -> list[Path]:
    """Noise of different lengths, some shorter than the window, WAV and FLAC in turn."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        path = folder / f"clip {number}.{'wav' if number % 2 else 'flac'}"
        soundfile.write(path, rng.integers(-9000, 9000, 1500 + 1000 * number, dtype=np.int16), rate)
        paths.append(path)
    return paths


def open_decoder(paths: list[Path], cache: Path, window: int = WINDOW) -> AudioDecoder:
    clips, skipped = check_clips([Record(str(path)) for path in paths], cache_dir=cache, progress=False)
    assert not skipped
    return AudioDecoder(clips, num_samples=window, sample_rate=16000, batch_size=8, num_threads=2)


def samples(path: Path) -> np.ndarray:
    return soundfile.read(path, dtype="int16")[0]


def padded(values: np.ndarray) -> np.ndarray:
    return np.pad(values[:WINDOW], (0, max(0, WINDOW - len(values))))


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "deleted":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "emptied":
        path.write_bytes(b"")
    else:  # of the same size, so only decoding can tell
        path.write_bytes(
            os.urandom(len(content)) if how == "garbage" else content[:200] + os.urandom(len(content) - 200)
        )


@pytest.mark.parametrize("how", ["deleted", "truncated", "emptied", "garbage", "bit rot"])
@pytest.mark.parametrize("which", [2, 3])  # FLAC, WAV
def test_a_file_that_breaks_later_costs_only_itself(tmp_path, how, which):
    paths = write_clips(tmp_path)
    decoder = open_decoder(paths, tmp_path / "cache")
    damage(paths[which], how)
    found = []
    batch = ClipReader(decoder, None, on_bad=found.append).read(0, 8)
    if how == "bit rot" and which == 3:  # noise in a WAV is a WAV of noise: nothing can tell
        assert not found
        for row, path in enumerate(paths):
            assert np.array_equal(batch.waveform[row].numpy(), padded(samples(path)))
        return
    assert [bad.path for bad in found] == [str(paths[which])]
    for row, path in enumerate(paths):
        instead = paths[which + 1] if row == which else path  # the next one, the same for every rank and batch
        assert np.array_equal(batch.waveform[row].numpy(), padded(samples(instead)))
    again = ClipReader(decoder, None).read(which, 1)
    assert np.array_equal(again.waveform[0].numpy(), padded(samples(paths[which + 1])))


def test_too_many_broken_files_stop_the_run(tmp_path):
    paths = write_clips(tmp_path)
    decoder = open_decoder(paths, tmp_path / "cache")
    for path in paths[:3]:
        path.unlink()
    with pytest.raises(UserError, match=r"clips have become unreadable .*clip \d"):
        ClipReader(decoder, None, max_bad_fraction=0.25).read(0, 8)
    for path in paths[3:]:
        path.unlink()
    with pytest.raises(UserError, match="8 of 8"):
        ClipReader(decoder, None).read(0, 8)


def read_steps(
    decoder: AudioDecoder,
    order: SampleOrder,
    world_size: int,
    micro_batch: int,
    accumulation: int,
    first_step: int,
    last_step: int,
) -> list[set[tuple[int, bytes]]]:
    """What `world_size` ranks read in each optimizer step, through prefetchers that begin at `first_step`: positions
    and windows.
    """
    steps = [set() for _ in range(first_step, last_step)]
    for rank in range(world_size):
        reader = ClipReader(decoder, order, random_crop=True)
        shard = Shard(rank, world_size, micro_batch)
        loader = Prefetcher(reader, shard, first_step * accumulation, torch.device("cpu"), depth=2)
        for step in steps:
            for _ in range(accumulation):
                batch = next(loader)
                step |= {(batch.position + row, window.numpy().tobytes()) for row, window in enumerate(batch.waveform)}
        loader._stopped.set()
        loader._thread.join()
    return steps


@pytest.mark.parametrize(
    "order", [SampleOrder(8, seed=1), MixedOrder((5, 3), (0.4, 0.6), seed=1)], ids=["all once", "mixed"]
)
def test_any_ranks_read_the_same_steps_and_go_on_anywhere(tmp_path, order):
    """Four epochs of 8 clips, 12 a step: steps end within epochs. A run that goes on at step 1, on other ranks, reads
    what was left.
    """
    decoder = open_decoder(write_clips(tmp_path), tmp_path / "cache")
    whole = read_steps(decoder, order, 1, 12, 1, 0, 3)
    assert [sorted(position for position, _ in step) for step in whole] == [
        list(range(12 * n, 12 * n + 12)) for n in range(3)
    ]
    assert len({window for step in whole for _, window in step}) > 8  # other crops in other epochs
    for world_size, micro_batch, accumulation in [(1, 4, 3), (2, 6, 1), (2, 2, 3), (3, 4, 1), (3, 2, 2)]:
        assert read_steps(decoder, order, world_size, micro_batch, accumulation, 0, 3) == whole
        assert read_steps(decoder, order, world_size, micro_batch, accumulation, 1, 3) == whole[1:]
    decoder.close()


def test_broken_clips_are_replaced_alike_for_any_ranks(tmp_path):
    """Two neighbours break while batches are read ahead; who reads them first makes no difference."""
    paths = write_clips(tmp_path)
    decoder, order = open_decoder(paths, tmp_path / "cache"), SampleOrder(8, seed=1)
    before = read_steps(decoder, order, 1, 4, 1, 0, 6)
    for number in (2, 3):
        paths[number].unlink()
    one = read_steps(decoder, order, 1, 4, 1, 0, 6)
    assert read_steps(decoder, order, 2, 2, 1, 0, 6) == one and read_steps(decoder, order, 1, 2, 2, 0, 6) == one
    changed = [len(old - new) for old, new in zip(before, one, strict=True)]
    assert sum(changed) == 2 * 3, "in each of three epochs the two, and no other"


def test_batches_stay_what_they_are_while_others_are_read(tmp_path):
    paths = write_clips(tmp_path)
    decoder, other = (open_decoder(paths, tmp_path / "cache") for _ in range(2))
    loader = Prefetcher(ClipReader(decoder, SampleOrder(8, 0)), Shard(0, 1, 4), 0, torch.device("cpu"), depth=2)
    batches = [next(loader) for _ in range(12)]
    again = ClipReader(other, SampleOrder(8, 0))
    for batch in batches:
        assert torch.equal(batch.waveform, again.read(batch.position, 4).waveform)
    loader.close()


def test_prefetcher_hands_errors_to_the_step(tmp_path):
    paths = write_clips(tmp_path)
    decoder = open_decoder(paths, tmp_path / "cache")
    for path in paths:
        path.unlink()
    loader = Prefetcher(ClipReader(decoder, SampleOrder(8, 0)), Shard(0, 1, 4), 0, torch.device("cpu"), depth=2)
    with pytest.raises(UserError, match="unreadable"):
        next(loader)
    loader.close()
