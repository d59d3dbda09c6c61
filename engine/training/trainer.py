"""The training loop: one engine, DeepSpeed's or plain PyTorch's, for any number of ranks, any ZeRO stage, bf16 or
fp32.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from pydantic import ValidationError

from ssast.engine.config import RunConfig
from ssast.engine.data.clips import Clips
from ssast.engine.data.dataset import Dataset
from ssast.engine.data.decode import AudioDecoder
from ssast.engine.data.loader import BadClip, Batch, ClipReader, Prefetcher, Shard, batches_of_all
from ssast.engine.data.order import MixedOrder, SampleOrder, WeightedOrder
from ssast.engine.deepspeed_section import BATCH_KEYS
from ssast.engine.distributed.interrupt import StopRequest
from ssast.engine.distributed.ranks import Ranks, import_deepspeed
from ssast.engine.errors import UserError
from ssast.engine.model.ssast import SSAST
from ssast.engine.spans import span
from ssast.kernels import AttentionChoice, choose_attention, fp8_obstacle, use_attention

from .backends.ddp import PlainEngine
from .backends.deepspeed import remove_waits
from .checkpoint import (
    checkpoint_steps,
    convert_for_other_ranks,
    load_checkpoint,
    read_state,
    remove_incomplete,
    save_best,
    save_checkpoint,
    save_epoch,
)
from .compilation import Compilation, choose_compile
from .objective import Objective
from .pretraining import Pretraining
from .runlog import RunLog
from .schedule import Schedule
from .step import build_optimizer, use_norms

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True)
class StepMetrics:
    """Means over all clips of one optimizer step, whether any rank was asked to stop during it, and what else its row
    will say.
    """

    step: int
    losses: dict[str, float]
    stop: bool
    row: dict[str, Any] | None


class Trainer:
    """One run: the engine, its place in the data, and what is logged and kept.

    Building it joins the model to the engine; `train` goes on from the last checkpoint of the run folder, if there is
    one.
    """

    def __init__(
        self, config: RunConfig, data: Dataset, model: SSAST, ranks: Ranks, objective: Objective | None = None
    ) -> None:
        """`objective`: pretraining, unless told otherwise."""
        self.objective = objective or Pretraining(config, data, ranks)
        self.config, self.data, self.ranks, self.run_dir = config, data, ranks, config.run_dir
        self.micro_batch, self.accumulation = config.batch_sizes(ranks.world_size)
        self.clips_per_step = self.micro_batch * self.accumulation * ranks.world_size
        self._resume_from = ranks.once(self._choose_checkpoint)
        model.to(ranks.device)
        regions, reason = choose_compile(
            config.step.compile, device=ranks.device, zero_stage=config.zero_stage, world_size=ranks.world_size
        )
        if regions == "encoder" and model.config.layer_weights:
            regions, reason = "blocks", "layer weights take what every block gives"
        self.attention = config.step.attention
        self.norm = use_norms(model, config.step.norm, device=ranks.device, compiled=regions != "off")
        model.checkpoint_activations(config.step.activation_checkpointing)
        if config.step.fp8_mlp:
            if ranks.device.type == "cuda" and (obstacle := fp8_obstacle(ranks.device)):
                raise UserError(f"step.fp8_mlp: FP8 {obstacle}")
            model.use_fp8()
        self.optimizer_section = config.deepspeed["optimizer"]
        groups = self.objective.parameter_groups(model)
        self._lr_scales = [group["lr_scale"] for group in groups]
        optimizer, self.optimizer = build_optimizer(groups, self.optimizer_section, config.step.optimizer, ranks.device)
        self.compilation = Compilation(model, regions, config.step.compile_mode)
        if self.compilation.replays_graphs and self.accumulation > 1:
            raise UserError(
                f"step.compile_mode: {config.step.compile_mode} replays CUDA graphs, whose gradients the next "
                "micro-batch overwrites; "
                f"take a batch without gradient accumulation (here {self.accumulation}), or another mode"
            )
        self.compiled = (
            f"{regions} ({reason})" if regions == "off" else f"{regions}, {config.step.compile_mode} ({reason})"
        )
        self.engine = self._build_engine(model, optimizer)
        self.schedule = Schedule(config.train, self.optimizer_section["params"]["lr"])
        self.step = 0
        self.samples = 0  # clips consumed: the whole state of the loader
        self._sent: tuple[int, torch.Tensor, Callable[[], object], dict[str, Any] | None] | None = None
        self._bad_clips: list[BadClip] = []
        self._valid_reader = ClipReader(self._decoder(data.valid), None, on_bad=self._on_bad)

    def _build_engine(self, model: SSAST, optimizer: torch.optim.Optimizer) -> DeepSpeedEngine | PlainEngine:
        config = self.config
        if config.step.engine == "ddp":
            clipping = config.deepspeed.get("gradient_clipping", 0.0)
            return PlainEngine(
                model, optimizer, accumulation=self.accumulation, clipping=clipping, all_used=self.objective.all_used
            )
        import deepspeed

        universal = self._resume_from is not None and self._resume_from.is_universal
        settings = deepspeed_config(config, universal=universal)
        remove_waits(keeps_check=settings.get("bf16", {}).get("check_grad_overflow", False))
        with contextlib.redirect_stdout(io.StringIO()):  # ZeRO prints a page of memory figures
            return deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)[0]

    def train(self, stop_request: StopRequest) -> bool:
        """Train to the last step; return False if asked to stop before it. In either case a checkpoint is left at the
        last step.
        """
        config = self.config
        resumed = self._resume()
        log = RunLog(config, self.run_dir, self.step) if self.ranks.is_first else None
        self._event(
            log,
            "resume" if resumed else "start",
            f"{self.clips_per_step} clips a step on {self.ranks.world_size} ranks",
        )
        self._event(log, "attention", self.choose_attention())
        described = ", ".join(f"{key}: {value}" for key, value in self.describe_step().items())
        self._event(log, "step", described)
        if log is not None:
            log.say(described)
        loader = self.train_loader()
        clock = Clock(self.clips_per_step, self.config.num_samples / self.config.data.sample_rate)
        stopping = False
        try:
            while self.step < config.train.steps and not stopping:
                previous = self.run_step(loader, clock, stop_request.asked)
                stopping = self._report(log, previous)

                is_last = self.step == config.train.steps
                if self.step % config.train.valid_every == 0 or is_last:
                    self._validate(log)
                if self.step % config.train.checkpoint_every == 0 or is_last or stopping:
                    stopping |= self._report(log, self._collect_metrics())  # a checkpoint leaves no row behind
                    self._save(log)
            finished = self.step >= config.train.steps
            self._event(log, "done" if finished else "stop", f"step {self.step} of {config.train.steps}")
            return finished
        finally:
            loader.close()
            if log is not None:
                log.close()

    def run_step(self, batches: Iterator[Batch], clock: Clock, stop: bool = False) -> StepMetrics | None:
        """One optimizer step; returns the metrics of the one before. `stop`: this rank was asked to."""
        with span("step"):
            learning_rate = self._set_learning_rate()
            total = torch.zeros(len(self.objective.metrics), device=self.ranks.device)
            for _ in range(self.accumulation):
                with span("data wait"), clock.waiting():
                    batch = next(batches)
                with self.compilation.micro_batch():
                    losses = self.objective.losses(self.engine, batch)
                with span("backward"):
                    self.engine.backward(losses[0])
                with span("optimizer"):
                    grad_norm = self._gradient_norm()
                    self.engine.step()
                total += torch.stack([value.detach().float() for value in losses])
            self.step += 1
            self.samples += self.clips_per_step
            clock.tick()
            self.compilation.step_done()
            row = self._row(learning_rate, grad_norm, clock)
            with span("communication"):
                return self._exchange_metrics(total / self.accumulation, stop, row)

    def describe_step(self) -> dict[str, str]:
        """How the step is computed here: engine, precision, and what stands for each "auto"."""
        config = self.config
        return {
            "engine": "plain PyTorch, DDP" if config.step.engine == "ddp" else f"DeepSpeed, ZeRO {config.zero_stage}",
            "precision": "bf16" if config.bf16 else "fp32",
            "compile": self.compiled,
            "attention": self.attention,
            "optimizer": self.optimizer,
            "norm": self.norm,
            "activation_checkpointing": config.step.activation_checkpointing,
            "mlp": ("fp8" if self.ranks.device.type == "cuda" else "fp8, emulated")
            if config.step.fp8_mlp
            else "as precision",
        }

    def choose_attention(self) -> str:
        """Settle the backend of attention, the same on every rank, before the first step; what to log of it."""
        config, model = self.config, self.engine.module.config
        name = (
            self._resume_from.state.get("attention")
            if self._resume_from and self.attention == "auto"
            else self.attention
        )
        if name in (None, "auto"):
            name = "torch" if config.run.deterministic else None
        shape = (self.micro_batch, model.heads, 2 + model.num_patches, model.width // model.heads)

        def choose() -> AttentionChoice:
            try:
                dtype = torch.bfloat16 if config.bf16 else torch.float32
                compiled = self.compilation.regions != "off"
                return choose_attention(shape, dtype, self.ranks.device, name=name, compiled=compiled)
            except (ValueError, RuntimeError) as error:
                raise UserError(f"step.attention: {error}") from None

        choice = self.ranks.once(choose)
        self.attention = choice.name
        use_attention(choice.name)
        measured = ", ".join(f"{each} {ms:.3f} ms" for each, ms in choice.milliseconds.items())
        return choice.name + (f" (forward and backward at {list(shape)}: {measured})" if measured else "")

    def _set_learning_rate(self) -> float:
        learning_rate = self.schedule.lr(self.step)
        for group, scale in zip(self.engine.optimizer.param_groups, self._lr_scales, strict=True):
            group["lr"] = learning_rate * scale
        return learning_rate

    def _gradient_norm(self) -> torch.Tensor | None:
        """Before clipping. DeepSpeed keeps the norm itself except in plain fp32 training."""
        engine = self.engine
        keeps_norm = isinstance(engine, PlainEngine) or engine.zero_optimization() or engine.bfloat16_enabled()
        if keeps_norm or not engine.is_gradient_accumulation_boundary():
            return None
        return torch.nn.utils.get_total_norm([p.grad for p in self.engine.module.parameters() if p.grad is not None])

    def release(self) -> None:
        """Let go of what the engine and the decoder hold; another trainer may follow in this process."""
        self._valid_reader.decoder.close()
        if not isinstance(self.engine, PlainEngine):
            self.engine.destroy()

    # --- metrics, read one step late so that the host never waits for the step that it has just launched --------------

    def _exchange_metrics(self, values: torch.Tensor, stop: bool, row: dict[str, Any] | None) -> StepMetrics | None:
        """Send this step's metrics round; return those of the step before."""
        previous = self._collect_metrics()
        # filled there: a copy would wait
        summed = torch.cat((values, torch.full((1,), float(stop), device=values.device)))
        work = dist.all_reduce(summed, async_op=True)
        arrived = work.wait
        if summed.is_cuda:
            work.wait()  # makes the stream wait, not the host
            if row is not None and isinstance(row["grad_norm"], torch.Tensor):
                # reading it by itself would wait
                summed = torch.cat((summed, row.pop("grad_norm").detach().float().reshape(1)))
            summed = torch.empty(summed.shape, pin_memory=True).copy_(summed, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            arrived = copied.synchronize
        self._sent = (self.step, summed, arrived, row)
        return previous

    def _collect_metrics(self) -> StepMetrics | None:
        if self._sent is None:
            return None
        step, summed, arrived, row = self._sent
        self._sent = None
        arrived()
        names = self.objective.metrics
        count = len(names) + 1
        *means, stops = (value / self.ranks.world_size for value in summed[:count].tolist())
        if len(summed) > count:
            row["grad_norm"] = summed[count]
        return StepMetrics(step, dict(zip(names, means, strict=True)), stops > 0, row)

    def _row(self, learning_rate: float, grad_norm: torch.Tensor | None, clock: Clock) -> dict[str, Any] | None:
        """What this step's row will say beside its metrics; None if it has none."""
        if not self.ranks.is_first or not (
            self.step % self.config.train.log_every == 0 or self.step == self.config.train.steps
        ):
            return None
        norm = grad_norm if grad_norm is not None else self.engine.get_global_grad_norm()
        epoch = round(self.samples / len(self.data.train), 4)
        return {"samples": self.samples, "epoch": epoch, "lr": learning_rate, "grad_norm": norm, **clock.rates()}

    def _report(self, log: RunLog | None, metrics: StepMetrics | None) -> bool:
        """Log a step if it has a row; return whether a rank was asked to stop during it.

        Raises:
            UserError: on every rank, a loss that is not finite.
        """
        if metrics is None:
            return False
        if not math.isfinite(metrics.losses["loss"]):
            raise UserError(
                f"the loss of step {metrics.step} is {metrics.losses['loss']}; checkpoints before it are whole. Try a "
                "lower learning "
                "rate, a longer train.warmup_steps, or deepspeed.gradient_clipping=1.0"
            )
        if log is not None and metrics.row is not None:
            norm = metrics.row["grad_norm"]
            row = {**metrics.losses, **metrics.row, "grad_norm": None if norm is None else float(norm)}
            log.row("train", metrics.step, **row)
            shown = {name: f"{value:.4f}" for name, value in metrics.losses.items() if value == value}
            log.progress(metrics.step, self.config.train.steps, **shown, clips_per_s=f"{row['clips_per_s']:.1f}")
        if log is not None:
            while self._bad_clips:
                bad = self._bad_clips.pop()
                log.row("event", metrics.step, event="bad clip", detail=f"{bad.path}: {bad.reason}")
        return metrics.stop

    def _event(self, log: RunLog | None, event: str, detail: str) -> None:
        if log is not None:
            log.row("event", self.step, event=event, detail=detail)

    # --- validation ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _validate(self, log: RunLog | None) -> None:
        self.engine.eval()
        metrics = self.objective.validate(self.engine, self._valid_batches())
        self.engine.train()
        name, value = self.objective.judge(metrics)
        if self.schedule.after_validation(value):
            save_best(self.engine, self.run_dir, self.step, name, metrics[name])
        epoch = self.objective.keep_epoch(self.step)
        if epoch is not None:
            save_epoch(self.engine, self.run_dir, epoch)
        if log is not None:
            row = self.objective.validation_row(metrics)
            log.row("valid", self.step, clips=len(self.data.valid), **row)
            shown = "  ".join(f"{key} {value:.4f}" for key, value in row.items() if isinstance(value, float))
            log.say(f"step {self.step}: validation {shown}")

    def _valid_batches(self) -> Iterator[tuple[Batch, int]]:
        """This rank's batches of validation clips, and how many clips of each count."""
        shard = Shard(self.ranks.rank, self.ranks.world_size, self.micro_batch)
        for batch, clips in batches_of_all(self._valid_reader, len(self.data.valid), shard):
            with self.compilation.left_out():
                yield batch, clips

    # --- data ---------------------------------------------------------------------------------------------------------

    def train_loader(self) -> Prefetcher:
        data = self.config.data
        reader = ClipReader(
            self._decoder(self.data.train),
            self._order(),
            random_crop=data.crop == "random",
            max_bad_fraction=data.max_bad_fraction,
            on_bad=self._on_bad,
        )
        shard = Shard(self.ranks.rank, self.ranks.world_size, self.micro_batch)
        first = self.samples // (self.micro_batch * self.ranks.world_size)
        return Prefetcher(reader, shard, first, self.ranks.device, data.prefetch)

    def _order(self) -> SampleOrder:
        weights, seed = self.config.data.weights, self.config.run.seed
        if self.data.draw_weights is not None:
            return WeightedOrder(self.data.draw_weights, seed)
        return (
            SampleOrder(len(self.data.train), seed)
            if weights is None
            else MixedOrder(self.data.train_sizes, weights, seed)
        )

    def _decoder(self, clips: Clips) -> AudioDecoder:
        data = self.config.data
        return AudioDecoder(
            clips,
            num_samples=self.config.num_samples,
            sample_rate=data.sample_rate,
            batch_size=self.micro_batch,
            num_threads=data.num_threads,
            pin_memory=self.ranks.device.type == "cuda",
        )

    def _on_bad(self, bad: BadClip) -> None:
        """Recorded by the rank that met it: a line in skipped.csv, which every rank can append to."""
        self._bad_clips.append(bad)
        append_skipped(self.run_dir / "skipped.csv", bad)

    # --- state --------------------------------------------------------------------------------------------------------

    def _save(self, log: RunLog | None) -> None:
        state = {
            "step": self.step,
            "samples": self.samples,
            "schedule": self.schedule.state_dict(),
            "world_size": self.ranks.world_size,
            "clips_per_step": self.clips_per_step,
            "attention": self.attention,
            "data": self.data.train.fingerprint,
        }
        save_checkpoint(self.engine, self.run_dir, self.step, state, self.config.train.keep_last)
        self._event(log, "checkpoint", f"step-{self.step}")

    def _choose_checkpoint(self) -> _ResumePoint | None:
        """The last one, converted first if DeepSpeed could not load it on this number of ranks; on rank 0."""
        steps = checkpoint_steps(self.run_dir)
        if not steps:
            return None
        state = read_state(self.run_dir, steps[-1])
        is_universal = self.config.zero_stage > 0 and state["world_size"] != self.ranks.world_size
        if is_universal:
            print(f"converting the checkpoint from {state['world_size']} ranks to {self.ranks.world_size}", flush=True)
        name = convert_for_other_ranks(self.run_dir, steps[-1]) if is_universal else f"step-{steps[-1]}"
        return _ResumePoint(name, state, is_universal)

    def _resume(self) -> bool:
        point = self._resume_from
        if point is None:
            return False
        load_checkpoint(self.engine, self.run_dir, point.name)
        if point.is_universal:
            self.ranks.once(lambda: remove_incomplete(self.run_dir))
        self.step, self.samples = point.state["step"], point.state["samples"]
        # another batch size begins at a whole batch
        self.samples -= self.samples % (self.micro_batch * self.ranks.world_size)
        self.schedule.load_state_dict(point.state["schedule"])
        if self.ranks.is_first:
            print(f"resuming from step {self.step} ({self.samples} clips)", flush=True)
            if point.state["data"] != self.data.train.fingerprint:
                print(
                    "warning: the training clips are not those the run began with; their order from here on is another",
                    flush=True,
                )
        return True


@dataclass(frozen=True)
class _ResumePoint:
    name: str
    """Of the folder in checkpoints/."""
    state: dict[str, Any]
    is_universal: bool


class Clock:
    """Rates since the row before: clips a second, seconds of audio a second, and the share of time spent waiting for
    data.
    """

    def __init__(self, clips_per_step: int, seconds_per_clip: float) -> None:
        self.clips_per_step, self.seconds_per_clip = clips_per_step, seconds_per_clip
        self.began = self.since = time.perf_counter()
        self.steps, self.waited = 0, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def tick(self) -> None:
        self.steps += 1

    def rates(self) -> dict[str, float]:
        now = time.perf_counter()
        elapsed = max(now - self.since, 1e-9)
        clips_per_s = self.steps * self.clips_per_step / elapsed
        rates = {
            "clips_per_s": round(clips_per_s, 3),
            "audio_s_per_s": round(clips_per_s * self.seconds_per_clip, 2),
            "data_stall": round(min(self.waited / elapsed, 1.0), 4),
            "seconds": round(now - self.began, 3),
        }
        self.since, self.steps, self.waited = now, 0, 0.0
        return rates


def deepspeed_config(config: RunConfig, *, universal: bool = False) -> dict[str, Any]:
    """The run's DeepSpeed section, less the optimizer that we build, with gradients accumulated in fp32 unless told
    otherwise; `universal`: to load a checkpoint that was converted for another number of ranks.
    """
    section = copy.deepcopy(config.deepspeed)
    if universal:
        section.setdefault("checkpoint", {})["load_universal"] = True
    section.pop("optimizer")
    section.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    if config.uses_autocast:
        section["bf16"] = {"enabled": False}
    elif config.bf16:
        # its own default has the host wait for the device in every step, to skip a step whose gradients are not finite;
        # the metrics and the weights to be saved tell of those anyway
        section["bf16"].setdefault("check_grad_overflow", False)
    section.setdefault("gradient_clipping", 0.0)  # DeepSpeed's own default clips at 1
    if config.zero_stage == 3:
        # its own linear layer adds up bias gradients in another order, so that stage 3 would drift from the others
        section["zero_optimization"].setdefault("memory_efficient_linear", False)
    section.setdefault("steps_per_print", 10**9)
    # it waits for the device twice in every micro-batch
    section.setdefault("timers", {"throughput": {"enabled": False}})
    section["zero_allow_untested_optimizer"] = True
    section.setdefault("zero_force_ds_cpu_optimizer", False)  # offloading with PyTorch's Adam: nothing to compile
    return section


def check_deepspeed_section(config: RunConfig) -> None:
    """Have DeepSpeed read its section before anything is opened, whether ranks have joined or not.

    Raises:
        UserError: what DeepSpeed says is wrong.
    """
    if config.step.engine != "deepspeed":
        return
    deepspeed = import_deepspeed()

    # batch sizes have been checked against the number of ranks, which DeepSpeed knows only once they have joined
    section = {key: value for key, value in deepspeed_config(config).items() if key not in BATCH_KEYS}
    try:
        deepspeed.DeepSpeedConfig(
            {**section, "bf16": config.deepspeed.get("bf16", {}), "train_micro_batch_size_per_gpu": 1}
        )
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise UserError(f"deepspeed: {error.title}: {key}: {problem['msg']}, not {problem['input']!r}") from None
    except Exception as error:  # assertions, ValueErrors: one for each way of being wrong
        raise UserError(f"deepspeed: {' '.join(str(error).split())[:400]}") from None


def append_skipped(path: Path, bad: BadClip) -> None:
    with open(path, "a", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        csv.writer(stream).writerow([bad.path, bad.reason])
