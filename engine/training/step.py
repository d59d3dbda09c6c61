"""How a step is computed: which engine, compilation, attention, optimizer and layer norms. Nothing of it changes what
is learned, beyond rounding.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ssast.engine.config import Config, RunConfig
from ssast.engine.data.loader import Batch
from ssast.engine.distributed.ranks import Ranks
from ssast.engine.errors import UserError, first_line
from ssast.engine.model.cost import main_attention
from ssast.engine.model.ssast import SSAST
from ssast.engine.spans import span
from ssast.kernels import AttentionChoice, choose_attention, fp8_obstacle

from .backends import Backend
from .checkpoint import ResumePoint
from .compilation import Compilation, choose_compile
from .meters import Clock
from .objective import Objective


class TrainingStep:
    """One optimizer step, from batches to updated weights, on the ranks that there are.

    Building it joins the model to the engine and settles what the config leaves to the device, the same on every rank.
    """

    def __init__(
        self,
        config: RunConfig,
        model: SSAST,
        ranks: Ranks,
        objective: Objective,
        backend: Backend,
        resume_from: ResumePoint | None = None,
    ) -> None:
        """`resume_from`: the checkpoint that will be loaded into the engine."""
        self.config, self.ranks, self.objective, self.backend = config, ranks, objective, backend
        self.micro_batch, self.accumulation = config.batch_sizes(ranks.world_size)
        self.clips = self.micro_batch * self.accumulation * ranks.world_size
        model.to(ranks.device)
        regions, reason = choose_compile(
            config.step.compile, device=ranks.device, zero_stage=config.zero_stage, world_size=ranks.world_size
        )
        if regions == "encoder" and model.config.layer_weights:
            regions, reason = "blocks", "layer weights take what every block gives"
        self.norm = use_norms(model, config.step.norm, device=ranks.device, compiled=regions != "off")
        model.checkpoint_activations(config.step.activation_checkpointing)
        if config.step.fp8_mlp:
            if ranks.device.type == "cuda" and (obstacle := fp8_obstacle(ranks.device)):
                raise UserError(f"step.fp8_mlp: FP8 {obstacle}")
            model.use_fp8()
        groups = objective.parameter_groups(model)
        self._lr_scales = [group["lr_scale"] for group in groups]
        section = config.deepspeed["optimizer"]
        optimizer, self.optimizer = build_optimizer(groups, section, config.step.optimizer, ranks.device)
        self.compilation = Compilation(model, regions, config.step.compile_mode)
        if self.compilation.replays_graphs and self.accumulation > 1:
            raise UserError(
                f"step.compile_mode: {config.step.compile_mode} replays CUDA graphs, whose gradients the next "
                f"micro-batch overwrites; take a batch without gradient accumulation (here {self.accumulation}), or "
                "another mode"
            )
        mode = "" if regions == "off" else f", {config.step.compile_mode}"
        self._compiled = f"{regions}{mode} ({reason})"
        self.engine = backend.build(
            model,
            optimizer,
            config,
            accumulation=self.accumulation,
            all_used=objective.all_used,
            is_converted=resume_from is not None and resume_from.is_converted,
        )
        self.attention, self.attention_note = self._choose_attention(resume_from)

    def run(self, batches: Iterator[Batch], clock: Clock, lr: float) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(means over this rank's clips [len(objective.metrics)], norm of the gradients before clipping)."""
        for group, scale in zip(self.engine.optimizer.param_groups, self._lr_scales, strict=True):
            group["lr"] = lr * scale
        total = torch.zeros(len(self.objective.metrics), device=self.ranks.device)
        grad_norm = None
        for _ in range(self.accumulation):
            with span("data wait"), clock.waiting():
                batch = next(batches)
            with self.compilation.micro_batch():
                losses = self.objective.losses(self.engine, batch)
            with span("backward"):
                self.engine.backward(losses[0])
            with span("optimizer"):
                grad_norm = self.engine.step()
            total += torch.stack([value.detach().float() for value in losses])
        clock.tick()
        self.compilation.step_done()
        return total / self.accumulation, grad_norm

    def describe(self) -> dict[str, str]:
        """For the log: engine, precision, and what stands for each "auto"."""
        config, mlp = self.config, "as precision"
        if config.step.fp8_mlp:
            mlp = "fp8" if self.ranks.device.type == "cuda" else "fp8, emulated"
        return {
            "engine": self.backend.describe(config),
            "precision": "bf16" if config.bf16 else "fp32",
            "compile": self._compiled,
            "attention": self.attention,
            "optimizer": self.optimizer,
            "norm": self.norm,
            "activation_checkpointing": config.step.activation_checkpointing,
            "mlp": mlp,
        }

    def _choose_attention(self, resume_from: ResumePoint | None) -> tuple[str, str]:
        """Give the model a backend of attention; its name, and what to log of the choice."""
        config, model = self.config, self.engine.module
        name: str | None = config.step.attention
        if name == "auto" and resume_from is not None:
            name = resume_from.state.get("attention")
        if name in (None, "auto"):
            name = "torch" if config.run.deterministic else None
        num_masked = config.mask.num_masked if isinstance(config, Config) else 0
        heads, tokens = main_attention(model.config, num_masked)  # a decoder's heads are as wide as the encoder's
        shape = (self.micro_batch, heads, tokens, model.config.width // model.config.heads)

        def choose() -> AttentionChoice:
            try:
                dtype = torch.bfloat16 if config.bf16 else torch.float32
                compiled = self.compilation.regions != "off"
                return choose_attention(shape, dtype, self.ranks.device, name=name, compiled=compiled)
            except (ValueError, RuntimeError) as error:
                raise UserError(f"step.attention: {error}") from None

        choice = self.ranks.once(choose)
        model.use_attention(choice.name)
        measured = ", ".join(f"{each} {ms:.3f} ms" for each, ms in choice.milliseconds.items())
        note = f" (forward and backward at {list(shape)}: {measured})" if measured else ""
        return choice.name, choice.name + note


def build_optimizer(
    groups: list[dict[str, Any]], section: dict[str, Any], backend: str, device: torch.device
) -> tuple[torch.optim.Optimizer, str]:
    """The paper's Adam (weight decay added to the gradient) or AdamW, from DeepSpeed's `optimizer` section, and the
    backend's name.

    Args:
        groups: of parameters.
        backend: as in `StepSection.optimizer`.

    Raises:
        UserError: a backend that is not installed, or cannot be built here.
    """
    name = choose_optimizer(backend, device)
    params: dict[str, Any] = {
        key: tuple(value) if key == "betas" else value for key, value in section["params"].items()
    }
    decoupled = section["type"] == "AdamW"
    if name in ("torch", "torch-fused"):
        kind = torch.optim.AdamW if decoupled else torch.optim.Adam
        return kind(groups, fused=name == "torch-fused" or None, **params), name
    if name == "apex":
        fused_adam = _feature("apex.optimizers", "FusedAdam", "step.optimizer")
    else:
        fused_adam = _feature("deepspeed.ops.adam", "FusedAdam", "step.optimizer")
    try:
        return fused_adam(groups, adam_w_mode=decoupled, **params), name
    except Exception as error:  # both build or load an extension here
        raise UserError(f"step.optimizer: {name} cannot be used: {first_line(error)}") from None


def choose_optimizer(backend: str, device: torch.device) -> str:
    """What `step.optimizer=auto` stands for on this device; any other name as it is."""
    if backend != "auto":
        return backend
    if device.type != "cuda":
        return "torch-fused"
    return "apex" if _find("apex.optimizers", "FusedAdam") else "torch-fused"


def use_norms(model: SSAST, backend: str, *, device: torch.device, compiled: bool) -> str:
    """Give the model's layer norms to a backend, as in `StepSection.norm`; its name. Parameters keep their names and
    values.

    Raises:
        UserError: apex is asked for and is not installed, or is another project of that name.
    """
    if backend == "auto":
        fits = device.type == "cuda" and not compiled
        backend = "apex" if fits and _find("apex.normalization", "FusedLayerNorm") else "torch"
    if backend == "apex":
        fused_norm = _feature("apex.normalization", "FusedLayerNorm", "step.norm")
        for parent in list(model.modules()):
            for name, norm in list(parent.named_children()):
                if type(norm) is nn.LayerNorm:
                    fused = fused_norm(norm.normalized_shape, eps=norm.eps)
                    fused.weight, fused.bias = norm.weight, norm.bias
                    setattr(parent, name, fused)
    return backend


def _find(module: str, feature: str) -> Any | None:
    """The feature, judged by itself: the `apex` of PyPI is another project."""
    try:
        return getattr(importlib.import_module(module), feature, None)
    except Exception:  # a broken build may raise anything
        return None


def _feature(module: str, feature: str, key: str) -> Any:
    value = _find(module, feature)
    if value is None:
        raise UserError(f"{key}: there is no {module}.{feature}; `ssast doctor` says which optional parts are there")
    return value
