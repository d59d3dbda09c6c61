"""What the trainer asks of DeepSpeed's engine, done by plain PyTorch: no ZeRO, the same weights and optimizer state on
every rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ssast.engine.model.ssast import SSAST

_FILE = "plain_engine.pt"


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
        self._parallel.require_backward_grad_sync = self.is_gradient_accumulation_boundary()
        return self._parallel(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.accumulation).backward()

    def step(self) -> None:
        """At the last micro-batch of a step: clip, update, clear."""
        is_boundary = self.is_gradient_accumulation_boundary()
        self._micro_steps += 1
        if not is_boundary:
            return
        gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        self._norm = torch.nn.utils.get_total_norm(gradients)
        if self.clipping:
            torch.nn.utils.clip_grads_with_norm_(self.module.parameters(), self.clipping, self._norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self._parallel is None)  # bucket views stay where they are

    def is_gradient_accumulation_boundary(self) -> bool:
        return (self._micro_steps + 1) % self.accumulation == 0

    def get_global_grad_norm(self) -> torch.Tensor | None:
        """Of the last step, before clipping."""
        return self._norm

    def train(self, mode: bool = True) -> None:
        self.module.train(mode)

    def eval(self) -> None:
        self.module.eval()

    def save_checkpoint(self, folder: str, tag: str, client_state: dict[str, Any], save_latest: bool = False) -> None:
        """On rank 0, as all ranks hold the same. The arguments are DeepSpeed's."""
        if dist.get_rank() == 0:
            path = Path(folder) / tag
            path.mkdir(parents=True, exist_ok=True)
            torch.save({"model": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}, path / _FILE)

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str | None, dict[str, Any]]:
        """Weights and optimizer state; the path that was read, None if this engine has not written it."""
        path = Path(folder) / tag / _FILE
        if not path.is_file():
            return None, {}
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        return str(path), {}
