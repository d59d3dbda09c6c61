"""The settings of fine-tuning: those of every run (`ssast.engine.config`), and what a task adds."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ssast.engine.config import DataSection, Paths, PathText, RunConfig, Section, TrainSection
from ssast.engine.errors import UserError
from ssast.engine.model.config import HEAD_DIM, WIDTHS, ModelConfig

SCRATCH = "none"
MAIN = {False: "accuracy", True: "mAP"}  # the metric of a task, by whether a clip may have several labels


Weights = Annotated[PathText | None, BeforeValidator(lambda value: None if value in ("", SCRATCH) else value)]


class FinetuneModelSection(Section):
    """The encoder to fine-tune, what it starts from, and how its tokens are pooled."""

    init_from: Weights = None
    """Weights to start from: a run folder, a `.safetensors` or an official `.pth`. null or none: from scratch."""
    size: Literal["tiny", "small", "base"] = "base"
    depth: int = Field(12, ge=1)
    """Of a model from scratch. Weights bring their own, and models from scratch that are compared with them are of the
    same size."""
    patch_shape: tuple[int, int] | None = None
    """Mel bins x frames, (16, 16) or (128, 2). null: as the weights have it; if given, they must agree."""
    stride: tuple[int, int] | None = None
    """Of the patches; below their shape they overlap. null: as the weights have it, from scratch no overlap."""
    input_frames: int = Field(ge=1)
    """10 ms each; longer clips are cut to it, shorter ones padded."""
    num_mel_bins: int = Field(128, ge=1)
    position_resize: Literal["exact", "official"] = "exact"
    """How position embeddings are fitted to another grid; official: as the authors' code does, where it works."""
    pool: Literal["mean", "cls"] = "mean"
    """mean of the patch tokens, as in the paper, or of the cls and the dist token."""
    train: Literal["all", "head"] = "all"
    """head: the encoder is frozen (linear probe)."""
    layer_weights: bool = False
    """Classify a learned weighted sum of all layers, as SUPERB does with train: head."""

    @property
    def architecture(self) -> ModelConfig:
        """Without weights to start from; classes are not known yet.

        Raises:
            ValueError: shapes that do not fit each other.
        """
        return _architecture(self)


@functools.cache
def _architecture(section: FinetuneModelSection) -> ModelConfig:
    width = WIDTHS[section.size]
    patch_shape = section.patch_shape or (16, 16)
    return ModelConfig(
        width=width,
        depth=section.depth,
        heads=width // HEAD_DIM,
        num_mel_bins=section.num_mel_bins,
        input_frames=section.input_frames,
        patch_shape=patch_shape,
        stride=section.stride or patch_shape,
        pretraining_heads=False,
    )


class TaskSection(Section):
    """Classes, splits and the metric."""

    labels: PathText | list[str] | None = None
    """The classes in order: a list, a text file, or AudioSet's class_labels_indices.csv. null: those that the clips
    have."""
    multi_label: bool = False
    """A clip may have several labels; measured by mAP instead of accuracy."""
    loss: Literal["ce", "bce"] | None = None
    """Cross-entropy, or a binary one for each class; null: bce if multi_label, else ce. The paper's Speech Commands
    takes bce."""
    layout: str = "auto"
    """Of data folders, as in `ssast prepare`; speech_commands_12 makes the ten words, others and silence of version
    1."""
    folds: int | None = Field(None, ge=2)
    """Cross-validation with so many folds: those the data have, or made, grouped by `group` and alike in their
    classes."""
    fold: Annotated[str | None, BeforeValidator(lambda value: str(value) if type(value) is int else value)] = None
    """Only this fold is tested on; null: each in turn."""
    valid_fold: bool = False
    """Validate on the fold after the tested one; otherwise on nothing, or on the held-out fraction
    `data.valid_fraction`."""
    group: Literal["recording", "speaker"] | None = "recording"
    """What is never both trained and tested on where splits are made here."""
    unseen: Literal["error", "drop"] = "error"
    """What to do with labels that training never sees."""
    per_class: int | None = Field(None, ge=1)
    """Train on so many clips of each class only."""
    select: Literal["best", "last", "average"] = "best"
    """Which weights are tested: of the best validation, of the last step, or the average over epochs `average_from`
    on."""
    average_from: int = Field(1, ge=1)
    metric: str | None = None
    """That picks the best weights and is compared; null: accuracy, or mAP if multi_label."""


class AugmentSection(Section):
    """What is changed in training clips, in the batch."""

    mixup: float = Field(0.0, ge=0, le=1)
    """Share of clips that are mixed with another one of the micro-batch."""
    freq_mask: int = Field(0, ge=0)
    """SpecAugment: widest band of mel bins that is blanked."""
    time_mask: int = Field(0, ge=0)
    """Longest stretch of frames that is blanked."""
    noise: bool = False
    """Add noise to the features and roll them by up to 10 frames."""


class FinetuneDataSection(DataSection):
    """As in pretraining, with labels and clips to test on."""

    test: Paths = Field(default_factory=list)
    """Empty: the clips that are marked for test, or the fold."""
    valid_fraction: float = Field(0.1, ge=0, lt=1)
    """Held out of the training clips for validation where nothing else is said; 0: validate on the test clips, and say
    so."""
    balanced: bool = False
    """Draw clips so that each class comes about as often."""
    mean: float | Literal["auto"] = "auto"
    std: float | Literal["auto"] = "auto"
    """Of the log-mel features. "auto": those that the weights to start from were trained with; from scratch, measured
    on the clips."""


class FinetuneTrainSection(TrainSection):
    """As in pretraining, counted in steps or epochs."""

    steps: int | None = Field(None, ge=1)
    """Optimizer steps, or else `epochs`."""
    epochs: int | None = Field(None, ge=1)
    minutes: None = None
    """Of pretraining: fine-tuning counts steps or epochs."""
    schedule: Literal["cosine", "constant", "decay"] = "cosine"
    """Of the learning rate after warm-up. decay: multiplied by `decay` after `decay_from` epochs and then every
    `decay_every`."""
    warmup_steps: int = Field(0, ge=0)
    decay: float = Field(0.5, gt=0, lt=1)
    decay_from: int = Field(5, ge=1)
    decay_every: int = Field(1, ge=1)
    head_lr_scale: float = Field(1.0, gt=0)
    """The classifier's learning rate as a multiple of the encoder's."""
    valid_every: int | None = Field(None, ge=1)
    """Steps between validations; null: an epoch."""
    checkpoint_every: int | None = Field(None, ge=1)
    """Steps between checkpoints; null: an epoch."""
    keep_last: int = Field(1, ge=1)
    steps_per_epoch: int | None = Field(None, ge=1)
    """Set when the clips are known."""

    def step_decay(self, step: int) -> float:
        """As of torch.optim.lr_scheduler.MultiStepLR with a milestone every `decay_every` epochs."""
        assert self.steps_per_epoch is not None  # see `FinetuneConfig.timed`
        past = step // self.steps_per_epoch - self.decay_from
        return self.decay ** max(0, past // self.decay_every + 1)


class FinetuneConfig(RunConfig):
    """Of fine-tuning."""

    presets: ClassVar[str] = "finetune"

    model: FinetuneModelSection
    task: TaskSection = TaskSection()
    augment: AugmentSection = AugmentSection()
    data: FinetuneDataSection = FinetuneDataSection()
    train: FinetuneTrainSection
    paper: Annotated[dict[str, float], BeforeValidator(lambda value: value or {})] = Field(default_factory=dict)
    """What the paper reports for this task, by model: printed beside our results, never mixed with them. null:
    nothing."""

    @property
    def metric(self) -> str:
        """The metric that picks the best weights and is compared."""
        return self.task.metric or MAIN[self.task.multi_label]

    @property
    def loss(self) -> str:
        """The loss: ce (cross-entropy) or bce (binary cross-entropy of each class)."""
        return self.task.loss or ("bce" if self.task.multi_label else "ce")

    @property
    def architecture(self) -> ModelConfig:
        """Without weights to start from; classes are not known yet."""
        return self.model.architecture

    def timed(self, clips: int, world_size: int) -> Self:
        """With epochs turned into steps for so many training clips, and a warm-up that leaves steps at the full rate.

        Raises:
            UserError: no epoch of training ends with a validation, where the weights of epochs are averaged.
        """
        micro, accumulation = self.batch_sizes(world_size)
        per_epoch = -(-clips // (micro * accumulation * world_size))
        steps, changes = self.train.steps, {"steps_per_epoch": per_epoch}
        if steps is None:
            assert self.train.epochs is not None  # `_fits_the_task`: one of both says how long
            steps = self.train.epochs * per_epoch
            # of a small data set a usual warm-up would be all there is
            changes["warmup_steps"] = min(self.train.warmup_steps, steps // 10)
        changes["steps"] = steps
        changes["valid_every"] = self.train.valid_every or per_epoch
        changes["checkpoint_every"] = self.train.checkpoint_every or per_epoch
        if self.task.select == "average":
            self._check_average(steps, per_epoch, changes["valid_every"])
        return self.model_copy(update={"train": self.train.model_copy(update=changes)})

    def _check_average(self, steps: int, per_epoch: int, valid_every: int) -> None:
        """Weights are kept when an epoch ends, with its validation."""
        if per_epoch % valid_every:
            raise UserError(
                f"train.valid_every: {valid_every} does not divide an epoch of {per_epoch} steps, at whose end "
                "weights are kept for "
                "task.select=average; leave it out"
            )
        if steps // per_epoch < self.task.average_from:
            raise UserError(
                f"task.average_from: epoch {self.task.average_from} on, but {steps} steps are {steps // per_epoch} "
                "whole epochs of "
                f"{per_epoch}: there is none to average"
            )

    def named(self, *parts: str) -> Self:
        """The same run in a folder below."""
        folder = Path(self.run.folder, self.run.name, *parts)
        return self.model_copy(
            update={"run": self.run.model_copy(update={"folder": str(folder.parent), "name": folder.name})}
        )

    @model_validator(mode="after")
    def _fits_the_task(self) -> Self:
        is_resolved = self.train.steps_per_epoch is not None
        if not is_resolved and (self.train.steps is None) == (self.train.epochs is None):
            raise ValueError("train.steps, train.epochs: exactly one of them says how long to train")
        if self.data.weights is not None:
            raise ValueError("data.weights: is of pretraining; data.balanced draws the classes evenly here")
        if self.step.auto_batch:
            raise ValueError("step.auto_batch: is of pretraining; set deepspeed.train_micro_batch_size_per_gpu here")
        if self.task.multi_label and self.task.loss == "ce":
            raise ValueError("task.loss: bce where clips have several labels")
        if self.task.fold is not None and self.task.folds is None:
            raise ValueError("task.fold: belongs to task.folds, the number of folds")
        if (
            self.task.select == "average"
            and self.train.epochs is not None
            and self.task.average_from > self.train.epochs
        ):
            raise ValueError(
                f"task.average_from: epoch {self.task.average_from} of {self.train.epochs} leaves none to average"
            )
        if self.task.multi_label and self.metric not in ("mAP", "AUC"):
            raise ValueError(f"task.metric: mAP or AUC where clips have several labels, not {self.metric}")
        if not self.task.multi_label and self.metric not in ("accuracy", "balanced_accuracy", "macro_f1"):
            raise ValueError(f"task.metric: accuracy, balanced_accuracy or macro_f1, not {self.metric}")
        if self.train.steps is not None and self.train.warmup_steps >= self.train.steps and self.train.warmup_steps:
            raise ValueError(f"train.warmup_steps: {self.train.warmup_steps} of {self.train.steps} steps")
        try:
            architecture = self.architecture
        except ValueError as error:
            raise ValueError(f"model: {error}") from None
        if self.task.folds is not None and (self.data.valid or self.data.test):
            raise ValueError("task.folds, data.valid, data.test: either folds or named clips say what is tested on")
        for name, size in (("freq_mask", architecture.num_mel_bins), ("time_mask", architecture.input_frames)):
            if (mask := getattr(self.augment, name)) > size:
                raise ValueError(
                    f"augment.{name}: {mask} is wider than the features, which have {size}; set it to less"
                )
        return self
