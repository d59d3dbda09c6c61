"""What computes a step: DeepSpeed's engine or plain PyTorch, behind one interface."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch

if TYPE_CHECKING:
    from ssast.engine.config import RunConfig
    from ssast.engine.model.ssast import SSAST

T = TypeVar("T")


class Engine(Protocol):
    """A model and its optimizer, joined over all ranks."""

    module: SSAST
    optimizer: torch.optim.Optimizer
    """Its `param_groups` hold the learning rates."""

    def __call__(self, compute: Callable[[SSAST], T], /) -> T:
        """What `compute` returns of the model, with weights gathered and gradients exchanged around it."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of one micro-batch's mean loss."""

    def step(self) -> torch.Tensor | None:
        """After each micro-batch. With the last one of a step: average over the ranks, clip and update. The norm of the
        last step's gradients before clipping.
        """

    def train(self, mode: bool = True) -> object:
        """Put the model into training mode."""

    def eval(self) -> object:
        """Put the model into evaluation mode."""

    def save(self, folder: Path, name: str, state: dict[str, Any]) -> None:
        """Write weights and optimizer state to `folder/name`; every rank calls it. `state` is the trainer's."""

    def load(self, folder: Path, name: str) -> bool:
        """Read what `save` wrote; False if this engine did not write it."""

    def full_weights(self) -> dict[str, torch.Tensor] | None:
        """Every parameter whole and in fp32, by name, on rank 0 (None elsewhere); every rank calls it."""

    def num_parameters(self) -> int:
        """Of the whole model, however it is divided among the ranks."""

    def release(self) -> None:
        """Let go of hooks and buffers; another engine may follow in this process."""


class Backend(Protocol):
    """A module of this package: what there is to know before there is an engine."""

    def describe(self, config: RunConfig) -> str:
        """For the log."""

    def check(self, config: RunConfig) -> None:
        """Have the backend read its settings before anything is opened; ranks must have joined.

        Raises:
            UserError: what it says is wrong.
        """

    def loadable(self, run_dir: Path, step: int, *, saved_ranks: int, ranks: int, zero_stage: int) -> str:
        """Name of a checkpoint folder of that step which `ranks` can load, converted first where that is needed; called
        on rank 0 alone.

        Raises:
            UserError: it could not be converted.
        """

    def build(
        self,
        model: SSAST,
        optimizer: torch.optim.Optimizer,
        config: RunConfig,
        *,
        accumulation: int,
        all_used: bool,
        is_converted: bool,
    ) -> Engine:
        """Join model and optimizer.

        Args:
            accumulation: micro-batches of a step.
            all_used: every parameter takes part in every loss, so that none needs looking for.
            is_converted: a checkpoint will be loaded that `loadable` has converted.
        """


def choose_backend(name: str) -> Backend:
    """By `step.engine`; DeepSpeed is imported only where it is asked for."""
    return cast(Backend, importlib.import_module(f"{__name__}.{name}"))
