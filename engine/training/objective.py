"""What a batch is trained for. The trainer knows the loop, an objective knows the losses; pretraining is one,
fine-tuning another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from ssast.engine.data.loader import Batch

if TYPE_CHECKING:
    from ssast.engine.model.ssast import SSAST


T = TypeVar("T")


class ModelEngine(Protocol):
    """What wraps the model for training, DeepSpeed's engine or DistributedDataParallel, and is called in its place: the
    computation is handed in, so that gradients are exchanged and weights gathered around it.
    """

    def __call__(self, compute: Callable[[SSAST], T], /) -> T:
        """What `compute` returns of the model."""
        ...


class Objective(Protocol):
    """Losses of a training batch, and what a validation comes to."""

    @property
    def metrics(self) -> Sequence[str]:
        """Names of what `losses` returns."""

    @property
    def all_used(self) -> bool:
        """Every trained parameter takes part in every loss."""

    def losses(self, engine: ModelEngine, batch: Batch) -> Sequence[torch.Tensor]:
        """Scalars of one micro-batch, the loss to be minimised first. `engine` wraps the model and is called in its
        place.
        """

    def validate(self, engine: ModelEngine, batches: Iterable[tuple[Batch, int]]) -> dict[str, float]:
        """Metrics over all ranks. `batches` are this rank's, each with the number of its clips that count; every rank
        has as many.
        """

    def judge(self, metrics: dict[str, float]) -> tuple[str, float]:
        """(name of the metric that picks the best weights, what is higher when it is better)."""

    def chance(self, metrics: dict[str, float]) -> str | None:
        """Why a validation is no better than knowing nothing; None if it is better, or no such level is known."""

    def validation_row(self, metrics: dict[str, float]) -> dict[str, Any]:
        """What is logged of a validation."""

    def keep_epoch(self, step: int) -> int | None:
        """Number of the epoch that ends with this step, if its weights are to be kept for an average."""

    def parameter_groups(self, model: SSAST) -> list[dict[str, Any]]:
        """What is trained, in groups for an optimizer; `lr_scale` multiplies the schedule's learning rate."""
