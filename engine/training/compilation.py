"""torch.compile of the model: what is compiled, and that nothing is compiled again once training is under way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ssast.engine.errors import UserError, first_line
from ssast.engine.model.ssast import SSAST

SETTLED_AFTER = 2  # steps; by then every graph exists


class Compilation:
    """The state of torch.compile in one process.

    Args:
        compile: as in `StepSection.compile`, its auto already settled by `choose_compile`.
        mode: as in `StepSection.compile_mode`.
        options: for `torch.compile`: `backend`, in tests.
    """

    def __init__(self, model: SSAST, compile: str, mode: str, **options: Any) -> None:
        self.regions = compile
        self.replays_graphs = compile != "off" and mode in ("reduce-overhead", "max-autotune")
        self._steps = 0
        if compile != "off":
            if not options:
                options["mode"] = mode
            torch._dynamo.config.optimize_ddp = False  # it would cut graphs at its buckets; blocks are cut already
            model.compile_regions(compile, fullgraph=True, dynamic=False, **options)

    @contextlib.contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Around a forward pass in training. From the third step on, having to compile is an error.

        Raises:
            UserError: a graph that exists did not fit and would have been compiled anew, as would every step from then
                on.
        """
        if self.regions == "off":
            yield
            return
        if self.replays_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        if self._steps < SETTLED_AFTER:
            yield
            return
        try:
            with torch.compiler.set_stance("fail_on_recompile"):
                yield
        except RuntimeError as error:
            if "fail_on_recompile" not in str(error):
                raise
            raise UserError(
                f"step.compile: the model would be compiled anew after {self._steps} steps, which should never happen; "
                f"step.compile=off trains without ({first_line(error)})"
            ) from error

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """Around validation: its last batch has another shape, and without gradients every graph would be another."""
        if self.regions == "off":
            yield
            return
        with torch.compiler.set_stance("force_eager"):
            yield

    def step_done(self) -> None:
        """Count a step."""
        self._steps += 1


def choose_compile(compile: str, *, device: torch.device, zero_stage: int, world_size: int) -> tuple[str, str]:
    """What `StepSection.compile` comes to, and the reason for the log.

    Raises:
        UserError: asked for under ZeRO 3.
    """
    if zero_stage == 3:
        if compile not in ("auto", "off"):
            raise UserError(
                f"step.compile: {compile} does not go with ZeRO 3, which gathers weights in hooks that break graphs; "
                "take deepspeed.zero_optimization.stage 0, 1 or 2, or step.compile=off"
            )
        return "off", "ZeRO 3 gathers weights in hooks, which break graphs"
    if compile != "auto":
        return compile, "as configured"
    if device.type != "cuda":
        return "off", "CPU"
    return (
        ("encoder", "one GPU")
        if world_size == 1
        else ("blocks", "several GPUs: gradients are exchanged block by block")
    )
