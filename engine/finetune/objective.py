"""The objective of fine-tuning: classes of clips, with what is done to a batch before the model sees it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional

from ssast.engine.data.loader import Batch
from ssast.engine.distributed.ranks import Ranks
from ssast.engine.model.front_end import FrontEnd
from ssast.engine.model.ssast import SSAST
from ssast.engine.random_streams import Stream, key_of
from ssast.engine.spans import span
from ssast.engine.training.objective import ModelEngine

from .augment import mixup, noise_and_roll, spec_augment
from .config import FinetuneConfig
from .dataset import TaskData
from .metrics import class_metrics

HEAD = ("classifier", "layer_weights")


class FineTuning:
    """Cross-entropy over the classes, or a binary one for each."""

    metrics = ("loss",)

    def __init__(self, config: FinetuneConfig, data: TaskData, ranks: Ranks) -> None:
        self.config, self.data, self.device, self.ranks = config, data, ranks.device, ranks
        self.all_used = not config.model.layer_weights  # which pass by the final norm
        frames, bins = config.model.input_frames, config.model.num_mel_bins
        self.front_end = FrontEnd(config.data.sample_rate, bins, frames, data.mean, data.std)
        self._targets = torch.from_numpy(data.train_targets).to(ranks.device)  # bool [N, C]

    def losses(self, engine: ModelEngine, batch: Batch) -> Sequence[torch.Tensor]:
        """The loss of a micro-batch, augmented by its position in the sample order."""
        augment, seed, offset = self.config.augment, self.config.run.seed, batch.position
        with span("copy"):
            tensors = (batch.waveform, batch.lengths, batch.clips)
            waveform, lengths, clips = (each.to(self.device, non_blocking=True) for each in tensors)
            targets = self._targets[clips].float()  # [B, C]
        with span("fbank"):
            if augment.mixup:
                waveform, lengths, targets = mixup(
                    waveform, lengths, targets, augment.mixup, key_of(seed, Stream.MIXUP), offset
                )
            features = self.features(waveform, lengths)
            if augment.freq_mask or augment.time_mask:
                silence = -self.data.mean / (2 * self.data.std)  # the official loader masks with 0 before it normalises
                features = spec_augment(
                    features,
                    augment.freq_mask,
                    augment.time_mask,
                    key_of(seed, Stream.SPEC_AUGMENT),
                    offset,
                    value=silence,
                )
            if augment.noise:
                features = noise_and_roll(features, seed=key_of(seed, Stream.NOISE), offset=offset)
        logits = self.logits(engine, features)
        with span("heads + loss"):
            return (classification_loss(logits, targets, self.config.loss),)

    def features(self, waveform: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """[B, S] -> [B, T, F], normalised."""
        in_bf16 = self.config.bf16 and not self.config.uses_autocast
        return self.front_end.features(waveform, lengths, dtype=torch.bfloat16 if in_bf16 else torch.float32)

    def logits(self, engine: ModelEngine, features: torch.Tensor) -> torch.Tensor:
        """float32 [B, C] of normalised features [B, T, F]."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.uses_autocast):
            return engine(lambda model: model.classify(features)).float()

    @torch.no_grad()
    def scores(
        self, model: ModelEngine, batches: Iterable[tuple[Batch, int]], count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities float32 [N, C] of clips 0 ... count - 1, put together from all ranks, and [N] the clip that
        each row is of: another one, if a clip could not be read.
        """
        scores = torch.zeros(count, len(self.data.labels), device=self.device)
        read = torch.full((count,), -1, dtype=torch.int64, device=self.device)
        for batch, clips in batches:
            features = self.features(batch.waveform.to(self.device), batch.lengths.to(self.device))
            logits = self.logits(model, features)
            rows = slice(batch.position, batch.position + clips)
            scores[rows] = (logits.sigmoid() if self.config.task.multi_label else logits.softmax(dim=1))[:clips]
            read[rows] = batch.clips.to(self.device)[:clips]
        dist.all_reduce(scores)
        dist.all_reduce(read, op=dist.ReduceOp.MAX)
        return scores.cpu().numpy(), read.cpu().numpy()

    def validate(self, engine: ModelEngine, batches: Iterable[tuple[Batch, int]]) -> dict[str, float]:
        """The metrics of all validation clips, on every rank."""
        scores, read = self.scores(engine, batches, len(self.data.valid))
        return class_metrics(scores, self.data.valid_targets[read], self.data.labels, self.config.task.multi_label)

    def judge(self, metrics: dict[str, float]) -> tuple[str, float]:
        """By `task.metric`, or the one that goes with the kind of labels."""
        return self.config.metric, metrics[self.config.metric]

    def chance(self, metrics: dict[str, float]) -> str | None:
        """The most frequent class alone, or an AUC of one half where clips may have several labels."""
        if self.config.task.multi_label:
            return f"AUC {metrics['AUC']:.3f}, guessing 0.5" if metrics["AUC"] <= 0.505 else None
        majority = float(self.data.valid_targets.mean(axis=0).max())
        if metrics["accuracy"] > majority:
            return None
        return f"accuracy {metrics['accuracy']:.3f}, that of always answering the most frequent class {majority:.3f}"

    def validation_row(self, metrics: dict[str, float]) -> dict[str, Any]:
        """All metrics."""
        return metrics

    def keep_epoch(self, step: int) -> int | None:
        """With `task.select=average`, of every epoch from `task.average_from` on."""
        task, per_epoch = self.config.task, self.config.train.steps_per_epoch
        if task.select != "average" or per_epoch is None:
            return None
        epoch, rest = divmod(step, per_epoch)
        return epoch if not rest and epoch >= task.average_from else None

    def parameter_groups(self, model: SSAST) -> list[dict[str, Any]]:
        """The body, and the fresh head with a learning rate of its own; a group without parameters is left out."""
        head: list[torch.nn.Parameter] = []
        body: list[torch.nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                (head if name.startswith(HEAD) else body).append(parameter)
        groups = [{"params": body, "lr_scale": 1.0}, {"params": head, "lr_scale": self.config.train.head_lr_scale}]
        return [group for group in groups if group["params"]]


def classification_loss(logits: torch.Tensor, targets: torch.Tensor, kind: str) -> torch.Tensor:
    """Mean over clips (and classes, for "bce") of [B, C] logits against targets [B, C] in [0, 1], which mixup makes
    fractions.
    """
    if kind == "bce":
        return functional.binary_cross_entropy_with_logits(logits, targets)
    return functional.cross_entropy(logits, targets)


def freeze_encoder(model: SSAST) -> None:
    """Leave only the classifier to be trained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(HEAD))
