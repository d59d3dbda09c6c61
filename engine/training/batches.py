"""The batches that a run is fed with: training clips in the run's order, and every validation clip once."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from ssast.engine.config import RunConfig
from ssast.engine.data.clips import Clips
from ssast.engine.data.dataset import Dataset
from ssast.engine.data.decode import AudioDecoder
from ssast.engine.data.loader import BadClip, Batch, ClipReader, Prefetcher, Shard, batches_of_all
from ssast.engine.data.order import MixedOrder, SampleOrder, WeightedOrder
from ssast.engine.distributed.ranks import Ranks


class Batches:
    """One rank's part of the data, in micro-batches."""

    def __init__(self, config: RunConfig, data: Dataset, ranks: Ranks, micro_batch: int) -> None:
        self.config, self.data, self.ranks = config, data, ranks
        self.shard = Shard(ranks.rank, ranks.world_size, micro_batch)
        self.bad_clips: list[BadClip] = []
        """That broke after the check and are not in the log yet."""
        self._valid_reader = ClipReader(self._decoder(data.valid), None, on_bad=self._on_bad)

    def training(self, samples: int) -> Prefetcher:
        """Batches without end, from where `samples` clips have been read by all ranks together."""
        data = self.config.data
        reader = ClipReader(
            self._decoder(self.data.train),
            self._order(),
            random_crop=data.crop == "random",
            max_bad_fraction=data.max_bad_fraction,
            on_bad=self._on_bad,
        )
        first = samples // (self.shard.micro_batch * self.ranks.world_size)
        return Prefetcher(reader, self.shard, first, self.ranks.device, data.prefetch)

    def validation(self) -> Iterator[tuple[Batch, int]]:
        """Validation clips, and how many clips of each batch count."""
        return batches_of_all(self._valid_reader, len(self.data.valid), self.shard)

    def close(self) -> None:
        """Let go of the decoder."""
        self._valid_reader.decoder.close()

    def _order(self) -> SampleOrder:
        weights, seed = self.config.data.weights, self.config.run.seed
        if self.data.draw_weights is not None:
            return WeightedOrder(self.data.draw_weights, seed)
        if weights is None:
            return SampleOrder(len(self.data.train), seed)
        return MixedOrder(self.data.train_sizes, weights, seed)

    def _decoder(self, clips: Clips) -> AudioDecoder:
        data = self.config.data
        return AudioDecoder(
            clips,
            num_samples=self.config.num_samples,
            sample_rate=data.sample_rate,
            batch_size=self.shard.micro_batch,
            num_threads=data.num_threads,
            pin_memory=self.ranks.device.type == "cuda",
        )

    def _on_bad(self, bad: BadClip) -> None:
        """Recorded by the rank that met it: a line in skipped.csv, which every rank can append to."""
        self.bad_clips.append(bad)
        append_skipped(self.config.run_dir / "skipped.csv", bad)


def append_skipped(path: Path, bad: BadClip) -> None:
    """Add a line to skipped.csv."""
    with open(path, "a", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        csv.writer(stream).writerow([bad.path, bad.reason])
