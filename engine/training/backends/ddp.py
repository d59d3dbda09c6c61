"""Plain PyTorch: no ZeRO, the same weights and optimizer state on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ssast.engine.config import RunConfig
from ssast.engine.model.ssast import SSAST

_FILE = "plain_engine.pt"


def describe(config: RunConfig) -> str:
    """For the log."""
    return "plain PyTorch, DDP"


def check(config: RunConfig) -> None:
    """Of the deepspeed section it reads nothing that the config has not checked."""


def loadable(run_dir: Path, step: int, *, saved_ranks: int, ranks: int, zero_stage: int) -> str:
    """A checkpoint as it is: all ranks hold the same."""
    return f"step-{step}"


def build(
    model: SSAST,
    optimizer: torch.optim.Optimizer,
    config: RunConfig,
    *,
    accumulation: int,
    all_used: bool,
    is_converted: bool,
) -> PlainEngine:
    """The engine, with `gradient_clipping` of the deepspeed section, the one key that it reads there."""
    clipping = config.deepspeed.get("gradient_clipping", 0.0)
    return PlainEngine(model, optimizer, accumulation=accumulation, clipping=clipping, all_used=all_used)


class PlainEngine:
    """fp32 weights, gradients and optimizer state; bf16 is `torch.autocast`'s, around the call. Gradients are averaged
    over the ranks with the last micro-batch of a step, by DistributedDataParallel where there are several.
    """

    def __init__(
        self, model: SSAST, optimizer: torch.optim.Optimizer, *, accumulation: int, clipping: float, all_used: bool
    ) -> None:
        """`all_used`: every parameter takes part in every loss, so that none needs looking for."""
        self.module = model
        self.optimizer, self.accumulation, self.clipping = optimizer, accumulation, clipping
        self._parallel: DistributedDataParallel | None = None
        if dist.get_world_size() > 1:
            # a bucket view saves a copy of every gradient
            self._parallel = DistributedDataParallel(
                model, gradient_as_bucket_view=True, find_unused_parameters=not all_used
            )
        self._micro_steps = 0
        self._norm: torch.Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._parallel is None or not self.module.training:
            return self.module(*args, **kwargs)
        self._parallel.require_backward_grad_sync = self._ends_step()
        return self._parallel(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Add one micro-batch's part to the gradients."""
        (loss / self.accumulation).backward()

    def step(self) -> torch.Tensor | None:
        """With the last micro-batch of a step: clip and update. The norm of the last step's gradients before that."""
        ends_step = self._ends_step()
        self._micro_steps += 1
        if not ends_step:
            return self._norm
        gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        self._norm = torch.nn.utils.get_total_norm(gradients)
        if self.clipping:
            torch.nn.utils.clip_grads_with_norm_(self.module.parameters(), self.clipping, self._norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self._parallel is None)  # bucket views stay where they are
        return self._norm

    def _ends_step(self) -> bool:
        return (self._micro_steps + 1) % self.accumulation == 0

    def train(self, mode: bool = True) -> None:
        """Put the model into training mode."""
        self.module.train(mode)

    def eval(self) -> None:
        """Put the model into evaluation mode."""
        self.module.eval()

    def save(self, folder: Path, name: str, state: dict[str, Any]) -> None:
        """On rank 0, as all ranks hold the same."""
        if dist.get_rank() == 0:
            path = folder / name
            path.mkdir(parents=True, exist_ok=True)
            torch.save({"model": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}, path / _FILE)

    def load(self, folder: Path, name: str) -> bool:
        """Read what `save` wrote, on every rank; False if there is none."""
        path = folder / name / _FILE
        if not path.is_file():
            return False
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        return True

    def full_weights(self) -> dict[str, torch.Tensor] | None:
        """Copies in fp32 on the CPU, on rank 0; None elsewhere."""
        if dist.get_rank() != 0:
            return None
        return {name: value.detach().float().cpu().clone() for name, value in self.module.named_parameters()}

    def num_parameters(self) -> int:
        """Of the whole model."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def release(self) -> None:
        """Nothing outlives it."""
