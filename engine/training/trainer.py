"""The training loop, for any objective, engine and number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from ssast.engine.config import RunConfig
from ssast.engine.data.dataset import Dataset
from ssast.engine.data.loader import Batch, Prefetcher
from ssast.engine.distributed.interrupt import StopRequest
from ssast.engine.distributed.ranks import Ranks
from ssast.engine.errors import UserError
from ssast.engine.model.ssast import SSAST
from ssast.engine.spans import span

from .backends import choose_backend
from .batches import Batches
from .checkpoint import last_checkpoint, load_checkpoint, remove_incomplete, save_best, save_checkpoint, save_epoch
from .meters import ChanceWatch, Clock, MetricsExchange, StepMetrics
from .objective import Objective
from .runlog import RunLog
from .schedule import Progress, Schedule
from .step import TrainingStep


class Trainer:
    """One run: how its steps are computed, its place in the data, and what is logged and kept."""

    def __init__(self, config: RunConfig, data: Dataset, model: SSAST, ranks: Ranks, objective: Objective) -> None:
        self.config, self.data, self.ranks, self.objective = config, data, ranks, objective
        self.run_dir = config.run_dir
        backend = choose_backend(config.step.engine)
        self._resume_from = ranks.once(
            lambda: last_checkpoint(self.run_dir, backend, ranks=ranks.world_size, zero_stage=config.zero_stage)
        )
        self.training_step = TrainingStep(config, model, ranks, objective, backend, self._resume_from)
        self.engine = self.training_step.engine
        self.batches = Batches(config, data, ranks, self.training_step.micro_batch)
        self.schedule = Schedule(config.train, config.deepspeed["optimizer"]["params"]["lr"])
        self.progress = Progress(config.train)
        self.samples = 0  # clips consumed: the whole state of the loader
        self._chance = ChanceWatch()
        self._exchange = MetricsExchange(objective.metrics, ranks)

    def train(self, stop_request: StopRequest) -> bool:
        """Train to the end, from the last checkpoint of the run folder if there is one; return False if asked to stop
        before it. In either case a checkpoint is left at the last step.
        """
        resumed = self._resume()
        log = RunLog(self.config, self.run_dir, self.progress.step) if self.ranks.is_first else None
        self._log_start(log, resumed)
        loader, clock = self.train_loader(), self.new_clock()
        is_last, stopping = self.progress.is_done, False
        try:
            while not (is_last or stopping):
                previous = self.run_step(loader, clock, stop_request.asked)
                stopping = self._report(log, previous)
                is_last = self.progress.is_done
                if self.progress.is_validation_due():
                    self._validate(log, clock)
                if self.progress.is_checkpoint_due() or stopping:
                    stopping |= self._report(log, self._exchange.collect())  # a checkpoint leaves no row behind
                    self._save(log, clock)
            self._event(log, "done" if is_last else "stop", self.progress.at(self.progress.step))
            return is_last
        finally:
            loader.close()
            if log is not None:
                log.close()

    def run_step(self, batches: Iterator[Batch], clock: Clock, stop: bool = False) -> StepMetrics | None:
        """One optimizer step; returns the metrics of the one before. `stop`: this rank was asked to."""
        with span("step"):
            learning_rate = self.schedule.lr(self.progress.step, self.progress.fraction)
            losses, grad_norm = self.training_step.run(batches, clock, learning_rate)
            self.progress.step += 1
            self.samples += self.training_step.clips
            row = self._row(learning_rate, grad_norm, clock)
            with span("communication"):
                return self._exchange.send(self.progress.step, losses, stop=stop, elapsed=clock.elapsed(), row=row)

    def new_clock(self) -> Clock:
        """Begins now."""
        return Clock(self.training_step.clips, self.config.num_samples / self.config.data.sample_rate)

    def train_loader(self) -> Prefetcher:
        """Training batches from the run's place in the data on."""
        return self.batches.training(self.samples)

    def release(self) -> None:
        """Let go of what the engine and the decoder hold; another trainer may follow in this process."""
        self.batches.close()
        self.engine.release()

    # --- log ----------------------------------------------------------------------------------------------------------

    def _row(self, learning_rate: float, grad_norm: torch.Tensor | None, clock: Clock) -> dict[str, Any] | None:
        """What this step's row will say beside its metrics; None if it has none."""
        step, train = self.progress.step, self.config.train
        if not self.ranks.is_first or (step % train.log_every and step != train.steps):
            return None
        epoch = round(self.samples / len(self.data.train), 4)
        row = {"samples": self.samples, "epoch": epoch, "lr": learning_rate, "grad_norm": grad_norm}
        return {**row, **clock.rates()}

    def _report(self, log: RunLog | None, metrics: StepMetrics | None) -> bool:
        """Take in a step's metrics: its time, its row if it has one; return whether a rank was asked to stop during it.

        Raises:
            UserError: on every rank, a loss that is not finite.
        """
        if metrics is None:
            return False
        self.progress.note_time(metrics.elapsed)
        if not math.isfinite(metrics.losses["loss"]):
            raise UserError(
                f"the loss of step {metrics.step} is {metrics.losses['loss']}; checkpoints before it are whole. Try a "
                "lower learning rate, a longer train.warmup_steps, or deepspeed.gradient_clipping=1.0"
            )
        if log is not None and metrics.row is not None:
            norm = metrics.row["grad_norm"]
            row = {**metrics.losses, **metrics.row, "grad_norm": None if norm is None else float(norm)}
            log.row("train", metrics.step, **row)
            shown = {name: f"{value:.4f}" for name, value in metrics.losses.items() if value == value}
            shown["clips_per_s"] = f"{row['clips_per_s']:.1f}"
            log.progress(metrics.step, self.progress.at(metrics.step), is_last=self.progress.is_done, **shown)
        while log is not None and self.batches.bad_clips:
            bad = self.batches.bad_clips.pop()
            log.row("event", metrics.step, event="bad clip", detail=f"{bad.path}: {bad.reason}")
        return metrics.stop

    def _log_start(self, log: RunLog | None, resumed: bool) -> None:
        step = self.training_step
        detail = f"{step.clips} clips a step on {self.ranks.world_size} ranks"
        self._event(log, "resume" if resumed else "start", detail)
        self._event(log, "attention", step.attention_note)
        described = ", ".join(f"{key}: {value}" for key, value in step.describe().items())
        self._event(log, "step", described)
        if log is not None:
            log.say(described)

    def _event(self, log: RunLog | None, event: str, detail: str) -> None:
        if log is not None:
            log.row("event", self.progress.step, event=event, detail=detail)

    # --- validation ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _validate(self, log: RunLog | None, clock: Clock) -> None:
        began = self.progress.fraction
        self.engine.eval()
        metrics = self.objective.validate(self.engine, self._valid_batches())
        self.engine.train()
        name, value = self.objective.judge(metrics)
        step = self.progress.step
        if self.schedule.after_validation(value):
            save_best(self.engine, self.run_dir, step, name, metrics[name])
        epoch = self.objective.keep_epoch(step)
        if epoch is not None:
            save_epoch(self.engine, self.run_dir, epoch)
        why = self.objective.chance(metrics)
        is_at_chance = self._chance.after_validation(why is not None)
        if log is not None:
            row = self.objective.validation_row(metrics)
            log.row("valid", step, clips=len(self.data.valid), **row)
            shown = "  ".join(f"{key} {value:.4f}" for key, value in row.items() if isinstance(value, float))
            log.say(f"step {step}: validation {shown}")
            if is_at_chance:
                self._event(log, "chance", str(why))
                log.say(
                    f"warning: {self._chance.patience} validations and nothing learned yet ({why}): is the sound "
                    "silent, are its labels right, is the learning rate too high or too low?"
                )
        self._note_time(clock)
        self.progress.after_validation(began)

    def _valid_batches(self) -> Iterator[tuple[Batch, int]]:
        for batch in self.batches.validation():
            with self.training_step.compilation.left_out():
                yield batch

    # --- state --------------------------------------------------------------------------------------------------------

    def _save(self, log: RunLog | None, clock: Clock) -> None:
        began, step = self.progress.fraction, self.progress.step
        state = {
            "step": step,
            "samples": self.samples,
            "seconds": self.progress.seconds,
            "schedule": self.schedule.state_dict(),
            "at_chance": self._chance.count,
            "world_size": self.ranks.world_size,
            "clips_per_step": self.training_step.clips,
            "attention": self.training_step.attention,
            "data": self.data.train.fingerprint,
        }
        save_checkpoint(self.engine, self.run_dir, step, state, self.config.train.keep_last)
        self._event(log, "checkpoint", f"step-{step}")
        self._note_time(clock)
        self.progress.after_checkpoint(began)

    def _note_time(self, clock: Clock) -> None:
        """All ranks learn what a validation or checkpoint took, which they have waited for anyway."""
        if self.progress.is_timed:
            self.progress.note_time(self.ranks.once(clock.elapsed))

    def _resume(self) -> bool:
        """Take up the checkpoint that the run resumes from; whether there is one."""
        point = self._resume_from
        if point is None:
            return False
        load_checkpoint(self.engine, self.run_dir, point.name)
        if point.is_converted:
            self.ranks.once(lambda: remove_incomplete(self.run_dir))
        self.progress = Progress(self.config.train, point.state["step"], point.state.get("seconds", 0.0))
        # another batch size begins at a whole batch
        per_micro_step = self.training_step.micro_batch * self.ranks.world_size
        self.samples = point.state["samples"] // per_micro_step * per_micro_step
        self.schedule.load_state_dict(point.state["schedule"])
        self._chance.count = point.state.get("at_chance")
        if self.ranks.is_first:
            print(f"resuming from step {self.progress.step} ({self.samples} clips)", flush=True)
            if point.state["data"] != self.data.train.fingerprint:
                print(
                    "warning: the training clips are not those the run began with; their order from here on is another",
                    flush=True,
                )
        return True
