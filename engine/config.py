"""What a run is made of: YAML plus dotted overrides, validated. Every key is here, with its default and its reason."""

from __future__ import annotations

import difflib
import importlib.resources
import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ssast.kernels.fbank import samples_of

from .data.order import block_shares
from .environment import computes_in_bf16
from .errors import UserError
from .model.config import HEAD_DIM, PAPER_MEAN, PAPER_STD, WIDTHS, ModelConfig

# The share of patches that validation always masks: the paper's 400 of 512, whatever number training masks.
VALID_MASKED_SHARE = 400 / 512

# Top-level keys that DeepSpeed reads. DeepSpeed itself passes over an unknown one in silence.
_DEEPSPEED_KEYS = """
activation_checkpointing aio amp autotuning bf16 checkpoint comms_logger communication_data_type compile
compression_training csv_monitor curriculum_learning data_efficiency data_types dataloader_drop_last disable_allgather
dump_state elasticity eigenvalue flops_profiler fp16 fp32_allreduce gradient_accumulation_steps gradient_clipping
gradient_predivide_factor memory_breakdown optimizer prescale_gradients progressive_layer_drop
seq_parallel_communication_data_type sparse_gradients steps_per_print tensorboard timers torch_autocast
train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism wall_clock_breakdown wandb
zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
"""
DEEPSPEED_KEYS = frozenset(_DEEPSPEED_KEYS.split())

_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

OPTIMIZER_PARAMS = ("lr", "betas", "eps", "weight_decay")

Compile = Annotated[
    Literal["auto", "off", "blocks", "encoder"],
    BeforeValidator(lambda value: "off" if value is False else value),  # YAML 1.1 reads off as false
]
Paths = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


C = TypeVar("C", bound="RunConfig")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class RunSection(Section):
    name: str = Field(min_length=1)
    """Of the run folder."""
    folder: str = "runs"
    """The run folder is `folder/name`."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Of initial weights, order, crops and masks."""
    deterministic: bool = False
    """On a GPU: only deterministic kernels, so that a resumed run repeats to the bit there, too; slower."""
    wandb: bool = False
    """Log to Weights & Biases too, where it is installed."""


class StepSection(Section):
    """How a step is computed. None of it changes what is learned, beyond rounding."""

    engine: Literal["deepspeed", "ddp"] = "deepspeed"
    """ddp: plain PyTorch, DistributedDataParallel where there are several ranks; of the deepspeed section only the
    batch sizes, the optimizer, bf16 and gradient_clipping are read. Needs no DeepSpeed installed."""
    precision: Literal["auto", "bf16", "fp32"] | None = None
    """Of the products. auto: bf16 on a device that computes in it, else fp32; a run keeps what it began with. null: as
    `deepspeed.bf16.enabled` says, fp32 without it; where that is given, it decides for auto as well."""
    compile: Compile = "auto"
    """torch.compile: of the encoder as one graph, or of one block, used for all, so that gradients of late blocks are
    exchanged while those of early ones are computed; heads and loss are a graph of their own. auto: encoder on one GPU,
    blocks on several, off on the CPU and under ZeRO 3, whose hooks break graphs."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    """torch.compile's. reduce-overhead and max-autotune replay CUDA graphs."""
    attention: Literal[
        "auto", "torch", "math", "flash", "cudnn", "flash-attn-2", "flash-attn-3", "flash-attn-4", "triton"
    ] = "auto"
    """Backend of `ssast.kernels.attention`. auto: the fastest at the run's shape, measured when a run begins on a GPU
    and kept when it resumes; PyTorch's own choice ("torch") on the CPU and in deterministic runs."""
    optimizer: Literal["auto", "torch", "torch-fused", "deepspeed-fused", "apex"] = "auto"
    """Implementation of Adam and AdamW. auto: on a GPU NVIDIA's apex where it is installed, else torch-fused; on the
    CPU torch."""
    norm: Literal["auto", "torch", "apex"] = "auto"
    """Layer norms. auto: torch, which torch.compile fuses with what stands around it; without torch.compile apex on a
    GPU that has it."""
    activation_checkpointing: Literal["none", "selective", "block"] = "none"
    """Memory for time: recompute in the backward pass all but the products and attention of each block (selective), or
    all (block)."""
    auto_batch: bool = False
    """Find the largest micro-batch that fits, and cut the batch into as few as possible; the batch itself stays.
    `--auto-batch`."""
    fp8_mlp: bool = False
    """The products of the MLPs in FP8 with one scale a tensor; Hopper or newer, emulated on a CPU. An experiment:
    docs/performance.md."""


class ModelSection(Section):
    size: Literal["tiny", "small", "base"]
    depth: int = Field(12, ge=1)
    """Blocks of the encoder; the published models have 12."""
    patch_shape: tuple[int, int] = (16, 16)
    """Mel bins x frames: (16, 16) the patch model, (128, 2) the frame model."""
    input_frames: int = Field(1024, ge=1)
    """10 ms each."""
    num_mel_bins: int = Field(128, ge=1)
    """Of the filter bank; all published models have 128."""
    init_from: str | None = None
    """Continue from these weights: an official `.pth`, a `.safetensors`, or a run folder."""


class MaskSection(Section):
    num_masked: int = Field(400, ge=1)
    """Patches hidden in training; the paper found 400 of 512 best for sounds, 250 as good for speakers."""
    cluster: tuple[int, ...] | None = (3, 4, 5)
    """Side lengths of the masked squares in patches; null masks single patches at random (the frame model)."""
    algorithm: Literal["centered", "official"] = "centered"
    """centered: as the paper says; official: as its code does (docs/fidelity.md)."""


class ObjectiveSection(Section):
    name: Literal["joint", "discriminative", "generative"] = "joint"
    """InfoNCE and reconstruction, or one of them alone."""
    softmax_over: Literal["predictions", "targets"] = "predictions"
    """predictions: as the official code and the published weights; targets: equation 1 of the paper."""
    recon_weight: float = Field(10.0, ge=0)
    """Lambda of the joint loss, the paper's 10."""
    masks: Literal["shared", "separate"] = "shared"
    """shared: one forward pass and one mask for both losses (the paper's algorithm 1); separate: a pass and a mask each
    (their code)."""


class DataSection(Section):
    train: Paths = []
    """Folders, prepared ones among them, official JSON, CSV/TSV or lists of paths."""
    weights: list[float] | None = None
    """Of each entry of `train`: the share of the clips read that come from it. null: every clip once an epoch."""
    valid: Paths = []
    """Empty: a share of the training clips is held out."""
    valid_fraction: float = Field(0.02, ge=0, lt=1)
    valid_clips: int = Field(4096, ge=1)
    """At most so many clips are validated on."""
    sample_rate: int = Field(16000, ge=1000)
    """In Hz; clips of other rates are resampled to it."""
    crop: Literal["random", "head"] = "random"
    """Where the window is cut from a longer clip."""
    mean: float | Literal["auto"] = PAPER_MEAN
    std: float | Literal["auto"] = PAPER_STD
    """Of the log-mel features; "auto" measures both on the training clips before the first step."""
    strict: bool = False
    """A clip that cannot be used is an error instead of a warning."""
    min_seconds: float = Field(0.025, ge=0.025)
    """Shorter clips are skipped; one frame of the filter bank is 25 ms."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """More clips than this share breaking after the check stops the run; each rank counts its own."""
    num_threads: int = Field(4, ge=1)
    """Decoding threads of each rank."""
    prefetch: int = Field(3, ge=1)
    """Batches decoded ahead."""
    cache_dir: str | None = None
    """Verdicts on checked files and converted copies; default `$XDG_CACHE_HOME/ssast` or `~/.cache/ssast`."""


class TrainSection(Section):
    steps: int | None = Field(None, ge=1)
    """Optimizer steps; this or `minutes` says how long to train."""
    minutes: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Of training, validations and checkpoints included: as many steps as fit. A resumed run uses what is left."""
    schedule: Literal["plateau", "cosine", "constant"] = "plateau"
    """Of the learning rate after warm-up; the paper's is plateau."""
    warmup_steps: int | None = Field(1000, ge=0)
    """Steps of linear warm-up; null under `minutes`: a twentieth of them."""
    plateau_factor: float = Field(0.5, gt=0, lt=1)
    plateau_patience: int = Field(2, ge=0)
    """Validations without improvement that are let pass before the learning rate is multiplied by `plateau_factor`."""
    min_lr_share: float = Field(0.0, ge=0, le=1)
    """Where the cosine ends, as a share of the learning rate."""
    valid_every: int | None = Field(4000, ge=1)
    """Steps between validations; the plateau rule counts validations. null under `minutes`: a tenth of them."""
    checkpoint_every: int | None = Field(1000, ge=1)
    """Steps between checkpoints: what a crash can cost. null under `minutes`: a tenth of them, ten at most."""
    keep_last: int = Field(2, ge=1)
    """Checkpoints kept, beside the best validation's weights."""
    log_every: int = Field(10, ge=1)
    """Steps between rows of metrics.jsonl."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_in_steps_or_in_time(cls, tree: Any) -> Any:
        """Intervals that are not given are fractions of `minutes` (null), or the default number of `steps`."""
        if not isinstance(tree, dict):
            return tree
        keys = ("warmup_steps", "valid_every", "checkpoint_every")
        if tree.get("minutes") is not None:
            return {**dict.fromkeys(keys), **tree}
        return {key: value for key, value in tree.items() if key not in keys or value is not None}


class RunConfig(Section):
    """What every kind of training has."""

    presets: ClassVar[str] = ""
    """Folder of `ssast.configs` with this kind's presets."""

    run: RunSection
    model: Any
    step: StepSection = StepSection()
    data: DataSection = DataSection()
    train: TrainSection
    deepspeed: dict[str, Any]
    """DeepSpeed's own configuration, in DeepSpeed's own keys (https://www.deepspeed.ai/docs/config-json/)."""

    @property
    def run_dir(self) -> Path:
        return Path(self.run.folder) / self.run.name

    def batch_sizes(self, world_size: int) -> tuple[int, int]:
        """(micro-batch of a rank, accumulation steps) by DeepSpeed's rule: batch = micro-batch x accumulation x ranks.

        Raises:
            UserError: sizes that do not multiply out.
        """
        batch, micro, steps = (self.deepspeed.get(key) for key in _BATCH_KEYS)
        if micro is None:
            micro = batch // (steps or 1) // world_size
        elif steps is None:
            steps = 1 if batch is None else batch // micro // world_size
        steps = steps or 1
        if micro < 1 or steps < 1 or (batch is not None and micro * steps * world_size != batch):
            given = ", ".join(f"{key} {self.deepspeed[key]}" for key in _BATCH_KEYS if key in self.deepspeed)
            raise UserError(
                f"deepspeed: {given} on {world_size} ranks do not fit: "
                "train_batch_size must be train_micro_batch_size_per_gpu x gradient_accumulation_steps x ranks"
            )
        return micro, steps

    @property
    def zero_stage(self) -> int:
        """0 without DeepSpeed, whatever its section says."""
        return self.deepspeed.get("zero_optimization", {}).get("stage", 0) if self.step.engine == "deepspeed" else 0

    @property
    def bf16(self) -> bool:
        """Whether products are computed in bf16; where that is left to the device, on the device of this process."""
        if self.step.precision in ("bf16", "fp32"):
            return self.step.precision == "bf16"
        enabled = self.deepspeed.get("bf16", {}).get("enabled")
        if enabled is not None:
            return bool(enabled)
        return self.step.precision == "auto" and computes_in_bf16()

    @property
    def uses_autocast(self) -> bool:
        """bf16 without ZeRO: DeepSpeed would accumulate gradients in bf16 there, so weights stay in fp32 and
        torch.autocast computes in bf16. With ZeRO the weights are bf16 and the optimizer holds fp32 masters.
        """
        return self.bf16 and self.zero_stage == 0

    @property
    def num_samples(self) -> int:
        """Samples of the window that fill `input_frames` frames of 25 ms each 10 ms; the paper's 10 s give 998 of
        1024.
        """
        return samples_of(self.model.input_frames, self.data.sample_rate)

    @model_validator(mode="after")
    def _no_contradictions(self) -> Self:
        if (self.data.mean == "auto") != (self.data.std == "auto"):
            raise ValueError("data.mean, data.std: 'auto' goes for both or neither")
        if not isinstance(self.data.std, str) and self.data.std <= 0:
            raise ValueError(f"data.std: must be positive, not {self.data.std}")
        if self.data.weights is not None:
            _check_weights(self.data.weights, self.data.train)
        if self.run.wandb and importlib.util.find_spec("wandb") is None:
            raise ValueError("run.wandb: Weights & Biases is not installed; pip install wandb, or leave it off")
        if "/" in self.run.name or self.run.name in (".", ".."):
            raise ValueError(f"run.name: {self.run.name!r} must be the name of one folder")
        _check_deepspeed(self.deepspeed)
        enabled = self.deepspeed.get("bf16", {}).get("enabled")
        if enabled is not None and self.step.precision in ("bf16", "fp32") and enabled != self.bf16:
            raise ValueError(
                f"step.precision: {self.step.precision}, but deepspeed.bf16.enabled: {str(enabled).lower()}; give one "
                "of them"
            )
        return self


class Config(RunConfig):
    """Of pretraining."""

    model: ModelSection
    mask: MaskSection = MaskSection()
    objective: ObjectiveSection = ObjectiveSection()

    @property
    def architecture(self) -> ModelConfig:
        width = WIDTHS[self.model.size]
        return ModelConfig(
            width=width,
            depth=self.model.depth,
            heads=width // HEAD_DIM,
            num_mel_bins=self.model.num_mel_bins,
            input_frames=self.model.input_frames,
            patch_shape=self.model.patch_shape,
            stride=self.model.patch_shape,
        )

    @property
    def valid_num_masked(self) -> int:
        patches = self.architecture.num_patches
        return max(1, min(round(patches * VALID_MASKED_SHARE), patches - 2))

    @model_validator(mode="after")
    def _fits_the_model(self) -> Config:
        model = self.architecture
        bins, frames = self.model.patch_shape
        if self.model.input_frames % frames:
            raise ValueError(
                f"model.input_frames: {self.model.input_frames} is not a multiple of the patch's {frames} frames"
            )
        if self.model.num_mel_bins % bins:
            raise ValueError(
                f"model.num_mel_bins: {self.model.num_mel_bins} is not a multiple of the patch's {bins} mel bins"
            )
        if self.mask.num_masked >= model.num_patches:
            raise ValueError(
                f"mask.num_masked: {self.mask.num_masked} of {model.num_patches} patches "
                f"({model.grid[0]}x{model.grid[1]}); at most {model.num_patches - 1} can be masked"
            )
        if self.mask.algorithm == "official" and self.mask.cluster and self.mask.num_masked > model.num_patches - 2:
            raise ValueError(
                f"mask.num_masked: the official algorithm masks at most {model.num_patches - 2} of {model.num_patches}"
            )
        if self.mask.cluster is not None and (not self.mask.cluster or min(self.mask.cluster) < 1):
            raise ValueError("mask.cluster: must be null or side lengths of at least 1")
        if self.objective.masks == "separate" and self.objective.name != "joint":
            raise ValueError(
                f"objective.masks: 'separate' belongs to the joint objective, not to {self.objective.name}"
            )
        if (self.train.steps is None) == (self.train.minutes is None):
            raise ValueError("train.steps, train.minutes: exactly one of them says how long to train (the other: null)")
        steps, warmup = self.train.steps, self.train.warmup_steps
        if steps is not None and warmup is not None and self.train.schedule != "constant" and warmup >= steps:
            raise ValueError(f"train.warmup_steps: {warmup} of {steps} steps leaves none to train at full rate")
        return self


def load_config(source: str | Path, overrides: Iterable[str] = (), kind: type[C] = Config) -> C:
    """Read a YAML file, or a preset by name, apply `key.sub=value` overrides, and validate.

    A file may start from another with `extends: NAME-OR-PATH`, relative to itself.

    Raises:
        UserError: no such file, not YAML, an unknown key (with the nearest known one), or settings that contradict each
            other.
    """
    path = _find(str(source), Path("."), kind)
    tree = _read(path, (), kind)
    for override in overrides:
        _apply(tree, override)
    return validated(tree, path, kind)


def validated(tree: dict[str, Any], path: Path, kind: type[C] = Config) -> C:
    """Raises UserError with what is wrong, key by key; `path`: where the settings come from."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: " + "; ".join(_explain(problem, kind) for problem in error.errors()[:5])) from None


def list_presets(kind: type[RunConfig] = Config) -> list[str]:
    folder = importlib.resources.files("ssast.configs") / kind.presets
    return sorted(Path(str(file)).stem for file in folder.iterdir() if file.name.endswith(".yaml"))


def dump_config(config: RunConfig) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) wherever two resolved configs differ."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append((prefix + key, before, after))
    return found


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as text, for want of a dot; here it is a number, as in YAML 1.2 and everywhere else."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _find(source: str, beside: Path, kind: type[RunConfig]) -> Path:
    path = beside / source
    if path.is_file():
        return path
    preset = (
        Path(str(importlib.resources.files("ssast.configs"))) / kind.presets / f"{source.removesuffix('.yaml')}.yaml"
    )
    if "/" not in source and preset.is_file():
        return preset
    raise UserError(f"{source}: no such config file, and no preset of that name ({', '.join(list_presets(kind))})")


def _read(path: Path, seen: tuple[Path, ...], kind: type[RunConfig]) -> dict[str, Any]:
    if path in seen:
        raise UserError(f"{path}: 'extends' goes round in a circle")
    try:
        tree = _parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a mapping of sections, this is {type(tree).__name__}")
    parent = tree.pop("extends", None)
    return tree if parent is None else _merge(_read(_find(str(parent), path.parent, kind), (*seen, path), kind), tree)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override}: an override is written key.sub=value")
    try:
        value = _parse_yaml(text) if text else None
    except yaml.YAMLError:
        value = text  # a path with a colon or a bracket, say
    if isinstance(value, str) or key in ("data.train", "data.valid", "data.test", "run.name", "model.init_from"):
        value = text if not text.startswith("[") else value
    *parents, leaf = key.split(".")
    for depth, parent in enumerate(parents, start=1):
        inner = tree.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise UserError(f"{override}: {'.'.join(parents[:depth])} is a value, not a section")
        tree = inner
    tree[leaf] = value


def _explain(problem: dict[str, Any], kind: type[RunConfig]) -> str:
    key = ".".join(str(part) for part in problem["loc"] if not str(part).startswith("function-"))
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, _known_keys(kind), n=1, cutoff=0.5)
        return f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else "")
    if problem["type"] == "missing":
        return f"{key} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {message}, not {problem['input']!r}" if key else message


def _known_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _check_weights(weights: list[float], sources: list[str]) -> None:
    try:
        block_shares(weights)
    except ValueError as error:
        raise ValueError(f"data.weights: {error}, not {weights}") from None
    if sources and len(weights) != len(sources):
        raise ValueError(
            f"data.weights: {len(weights)} weights for {len(sources)} entries of data.train; each needs one"
        )


def _check_deepspeed(section: dict[str, Any]) -> None:
    for key in section:
        if key not in DEEPSPEED_KEYS:
            near = difflib.get_close_matches(key, DEEPSPEED_KEYS, n=1, cutoff=0.5)
            raise ValueError(f"unknown key deepspeed.{key}" + (f"; did you mean deepspeed.{near[0]}?" if near else ""))
    if not {"train_micro_batch_size_per_gpu", "train_batch_size"} & section.keys():
        raise ValueError("deepspeed.train_micro_batch_size_per_gpu or deepspeed.train_batch_size is missing")
    for key in (*_BATCH_KEYS, "gradient_clipping"):
        value, is_count = section.get(key, 1), key in _BATCH_KEYS
        if isinstance(value, bool) or not isinstance(value, int if is_count else int | float) or value < is_count:
            raise ValueError(f"deepspeed.{key}: must be a positive number, not {value!r}")
    for key in ("optimizer", "zero_optimization", "bf16", "fp16", "data_types"):
        if not isinstance(section.get(key, {}), dict):
            raise ValueError(f"deepspeed.{key}: is a section of its own, not {section[key]!r}")
    optimizer = section.get("optimizer", {})
    if optimizer.get("type") not in ("Adam", "AdamW"):
        raise ValueError(
            "deepspeed.optimizer.type: must be Adam (L2 weight decay, the paper's) or AdamW, not "
            f"{optimizer.get('type')!r}"
        )
    params = optimizer.get("params") or {}
    if "lr" not in params:
        raise ValueError("deepspeed.optimizer.params.lr is missing")
    for name, value in params.items():
        if name == "betas":
            if not (
                isinstance(value, list)
                and len(value) == 2
                and all(isinstance(b, int | float) and 0 <= b < 1 for b in value)
            ):
                raise ValueError(
                    f"deepspeed.optimizer.params.betas: must be two numbers from 0 to below 1, not {value!r}"
                )
        elif not isinstance(value, int | float) or value < 0:
            raise ValueError(f"deepspeed.optimizer.params.{name}: must be a number of at least 0, not {value!r}")
    if unknown := sorted(params.keys() - set(OPTIMIZER_PARAMS)):
        raise ValueError(
            f"unknown key deepspeed.optimizer.params.{unknown[0]}; there are {', '.join(OPTIMIZER_PARAMS)}"
        )
    stage = section.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"deepspeed.zero_optimization.stage: must be 0, 1, 2 or 3, not {stage!r}")
    if section.get("fp16", {}).get("enabled"):
        raise ValueError("deepspeed.fp16: this engine trains in bf16 or fp32; set deepspeed.bf16.enabled instead")
