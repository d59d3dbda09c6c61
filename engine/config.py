"""What a run is made of: YAML plus dotted overrides, validated. Every key is here, with its default and its reason."""

from __future__ import annotations

import functools
import importlib.resources
import importlib.util
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args, overload

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from ssast.kernels.fbank import samples_of

from .deepspeed_section import LARGEST_COUNT, check_section, micro_batch
from .environment import computes_in_bf16
from .errors import UserError, did_you_mean
from .files import expand_path
from .mixture import block_shares
from .model.config import HEAD_DIM, PAPER_MEAN, PAPER_STD, WIDTHS, ModelConfig
from .twins import missing_file

# The fraction of patches that validation always masks: the paper's 400 of 512, whatever number training masks.
VALID_MASKED_FRACTION = 400 / 512

Compile = Annotated[
    Literal["auto", "off", "blocks", "encoder"],
    BeforeValidator(lambda value: "off" if value is False else value),  # YAML 1.1 reads off as false
]


def _expanded(text: str) -> str:
    try:
        return expand_path(text)
    except UserError as error:
        raise ValueError(str(error)) from None


PathText = Annotated[str, AfterValidator(_expanded)]
"""A path, in which ~ and $VARIABLES stand for what they stand for in a shell."""
Paths = Annotated[list[PathText], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


C = TypeVar("C", bound="RunConfig")


def _types_of(annotation: Any) -> set[Any]:
    return {annotation}.union(*(_types_of(argument) for argument in get_args(annotation)))


class Section(BaseModel):
    """Part of a config: unknown keys, numbers that are not finite and later changes are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_switches_for_numbers(cls, values: Any) -> Any:
        """To Python, and so to pydantic, true is a 1."""
        for name, value in values.items() if isinstance(values, dict) else ():
            items = value if isinstance(value, list) else [value]
            if name in cls.model_fields and any(isinstance(item, bool) for item in items):
                types = _types_of(cls.model_fields[name].annotation)
                if types & {int, float} and bool not in types:
                    raise ValueError(f"{name}: must be a number, not {str(value).lower()}")
        return values

    @model_validator(mode="after")
    def _counts_that_can_be(self) -> Self:
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            has_limit = any(getattr(limit, "lt", None) is not None for limit in field.metadata)
            for item in value if isinstance(value, list | tuple) else [value]:
                if isinstance(item, int) and item > LARGEST_COUNT and not has_limit:
                    raise ValueError(f"{name}: must be at most {LARGEST_COUNT}, not {item}")
        return self


class RunSection(Section):
    """Which run this is, and where it is written."""

    name: str = Field(min_length=1)
    """Of the run folder."""
    folder: PathText = "runs"
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
    """Implementation of Adam and AdamW. auto: on a GPU NVIDIA's apex where it is installed, else torch-fused."""
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
    """The network to pretrain, and what it starts from."""

    size: Literal["tiny", "small", "base"]
    depth: int = Field(12, ge=1)
    """Blocks of the encoder; the published models have 12."""
    patch_shape: tuple[int, int] = (16, 16)
    """Mel bins x frames: (16, 16) the patch model, (128, 2) the frame model."""
    input_frames: int = Field(1024, ge=1)
    """10 ms each."""
    num_mel_bins: int = Field(128, ge=1)
    """Of the filter bank; all published models have 128."""
    encoder_tokens: Literal["all", "visible"] = "all"
    """all: the encoder reads mask tokens, too, as the paper's does. visible: it reads visible patches only, and a small
    decoder puts mask tokens in after it (MAE-AST): two to four times the clips a second (docs/training.md)."""
    decoder_depth: int = Field(2, ge=1)
    """Blocks of the decoder of `encoder_tokens: visible`."""
    decoder_width: int | None = Field(None, ge=HEAD_DIM, multiple_of=HEAD_DIM)
    """Its width; null: the encoder's."""
    init_from: PathText | None = None
    """Continue from these weights: an official `.pth`, a `.safetensors`, or a run folder."""

    @property
    def architecture(self) -> ModelConfig:
        """The network's shape; patches do not overlap in pretraining."""
        return _architecture(self)


@functools.cache
def _architecture(section: ModelSection) -> ModelConfig:
    width = WIDTHS[section.size]
    return ModelConfig(
        width=width,
        depth=section.depth,
        heads=width // HEAD_DIM,
        num_mel_bins=section.num_mel_bins,
        input_frames=section.input_frames,
        patch_shape=section.patch_shape,
        stride=section.patch_shape,
        encoder_tokens=section.encoder_tokens,
        decoder_depth=section.decoder_depth,
        decoder_width=section.decoder_width,
    )


class MaskSection(Section):
    """Which patches are hidden from the encoder."""

    num_masked: int = Field(400, ge=1)
    """Patches hidden in training; the paper found 400 of 512 best for sounds, 250 as good for speakers."""
    cluster: tuple[int, ...] | None = (3, 4, 5)
    """Side lengths of the masked squares in patches; null masks single patches at random (the frame model)."""
    algorithm: Literal["centered", "official"] = "centered"
    """centered: as the paper says; official: as its code does (docs/fidelity.md)."""


class ObjectiveSection(Section):
    """What the model learns from the masked patches."""

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
    """What is read, and how it is checked and decoded."""

    train: Paths = []
    """Folders, prepared ones among them, official JSON, CSV/TSV or lists of paths."""
    weights: list[float] | None = None
    """Of each entry of `train`: the fraction of the clips read that come from it. null: every clip once an epoch."""
    valid: Paths = []
    """Empty: a fraction of the training clips is held out."""
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
    """More clips than this fraction breaking after the check stops the run; each rank counts its own."""
    num_threads: int = Field(4, ge=1)
    """Decoding threads of each rank."""
    prefetch: int = Field(3, ge=1)
    """Batches decoded ahead."""
    cache_dir: PathText | None = None
    """Verdicts on checked files and converted copies; default `$XDG_CACHE_HOME/ssast` or `~/.cache/ssast`, and a folder
    under the temporary one where there is no home folder to write to."""


class TrainSection(Section):
    """How long training takes, its learning rate, and what is kept on the way."""

    steps: int | None = Field(None, ge=1)
    """Optimizer steps; this or `minutes` says how long to train."""
    minutes: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Of training, validations and checkpoints included: as many steps as fit. A resumed run uses what is left."""
    schedule: Literal["plateau", "cosine", "constant", "decay"] = "plateau"
    """Of the learning rate after warm-up."""
    warmup_steps: int | None = Field(1000, ge=0)
    """Steps of linear warm-up; null under `minutes`: a twentieth of them."""
    plateau_factor: float = Field(0.5, gt=0, lt=1)
    plateau_patience: int = Field(2, ge=0)
    """Validations without improvement that are let pass before the learning rate is multiplied by `plateau_factor`."""
    min_lr_share: float = Field(0.0, ge=0, le=1)
    """Where the cosine ends, as a fraction of the learning rate."""
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

    def step_decay(self, step: int) -> float:
        """Factor of the learning rate at a step of the schedule `decay`, which only fine-tuning has."""
        raise NotImplementedError


class PretrainTrainSection(TrainSection):
    """As of every training; epochs are not known."""

    schedule: Literal["plateau", "cosine", "constant"] = "plateau"
    """Of the learning rate after warm-up; the paper's is plateau."""


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
        """The run folder, `run.folder/run.name`."""
        return Path(self.run.folder) / self.run.name

    def batch_sizes(self, world_size: int) -> tuple[int, int]:
        """(micro-batch of a rank, accumulation steps) by DeepSpeed's rule: batch = micro-batch x accumulation x ranks.

        Raises:
            UserError: sizes that do not multiply out.
        """
        try:
            return micro_batch(self.deepspeed, world_size)
        except ValueError as error:
            raise UserError(str(error)) from None

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
        if self.run.name.startswith("~") or "$" in self.run.name:
            raise ValueError(
                f"run.name: {self.run.name!r} would be a folder of that very name, with no ~ or $ expanded; write it "
                "out, and where the folder lies to run.folder"
            )
        check_section(self.deepspeed)
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
    train: PretrainTrainSection
    mask: MaskSection = MaskSection()
    objective: ObjectiveSection = ObjectiveSection()

    @property
    def architecture(self) -> ModelConfig:
        """The network's shape."""
        return self.model.architecture

    @property
    def valid_num_masked(self) -> int:
        """Patches masked in validation, whatever number training masks; at least 1, at most all but two."""
        patches = self.architecture.num_patches
        return max(1, min(round(patches * VALID_MASKED_FRACTION), patches - 2))

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


@overload
def load_config(source: str | Path, overrides: Iterable[str] = ()) -> Config: ...


@overload
def load_config(source: str | Path, overrides: Iterable[str], kind: type[C]) -> C: ...


def load_config(source: str | Path, overrides: Iterable[str] = (), kind: type[RunConfig] = Config) -> RunConfig:
    """Read a YAML file, or a preset by name, apply `key.sub=value` overrides, and validate.

    A file may start from another with `extends: NAME-OR-PATH`, relative to itself.

    Raises:
        UserError: no such file, not YAML, an unknown key (with the nearest known one), or settings that contradict each
            other.
    """
    path = _find(str(source), Path("."), kind)
    tree = _read(path, (), kind)
    applied: list[str] = []
    for override in overrides:
        key = override.partition("=")[0]
        lost = [earlier for earlier in applied if earlier.startswith(f"{key}.")]
        if lost:
            raise UserError(f"{override}: replaces the whole section, and with it {lost[0]}; write that after it")
        _apply(tree, override)
        applied.append(override)
    return validated(tree, path, kind)


def validated(tree: dict[str, Any], path: Path, kind: type[C]) -> C:
    """The settings as a config; `path` says where they come from.

    Raises:
        UserError: what is wrong, key by key.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        problems = dict.fromkeys(_explain(problem, kind) for problem in _deepest(error.errors(), kind))
        raise UserError(f"{path}: " + "; ".join([*problems][:5])) from None


def list_presets(kind: type[RunConfig] = Config) -> list[str]:
    """Names of the presets that come with the package for this kind of config, in order."""
    folder = importlib.resources.files("ssast.configs") / kind.presets
    return sorted(Path(str(file)).stem for file in folder.iterdir() if file.name.endswith(".yaml"))


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML, which `load_config` reads back as the same."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) wherever two resolved configs differ."""
    changes: list[tuple[str, Any, Any]] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changes += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            changes.append((prefix + key, before, after))
    return changes


class _KeyFaultError(ValueError):
    """A key that comes twice in one mapping, of which YAML's readers take the last value and drop the others; or one
    that is no text.
    """


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as text, for want of a dot; here it is a number, as in YAML 1.2 and everywhere else."""

    def check_keys(self, node: yaml.Node, path: str = "", seen: frozenset[int] = frozenset()) -> None:
        """Raises _KeyFaultError if a key comes twice in any mapping below `node`, or is no text."""
        if id(node) in seen:  # an alias inside of what it stands for
            return
        seen |= {id(node)}
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                self.check_keys(item, path, seen)
        if not isinstance(node, yaml.MappingNode):
            return
        lines: dict[Any, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key, line = self.construct_object(key_node), key_node.start_mark.line + 1
            name = f"{path}.{key_node.value}".removeprefix(".")
            if not isinstance(key, str):
                kind = {bool: "true or false", type(None): "null"}.get(type(key), f"{type(key).__name__} {key}")
                raise _KeyFaultError(f"the key {name}, line {line}, is no text: YAML reads it as {kind}; quote it")
            if key in lines:
                lines_of_both = f"line {line}" if line == lines[key] else f"lines {lines[key]} and {line}"
                raise _KeyFaultError(f"the key {name} comes twice, {lines_of_both}")
            lines[key] = line
            self.check_keys(value_node, name, seen)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse_yaml(text: str) -> Any:
    """Raises yaml.YAMLError, or _KeyFaultError."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        loader.check_keys(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _find(source: str, beside: Path, kind: type[RunConfig]) -> Path:
    path = beside / source
    if not path.is_file():
        path = beside / expand_path(source)
    if path.is_file():
        return path
    preset = (
        Path(str(importlib.resources.files("ssast.configs"))) / kind.presets / f"{source.removesuffix('.yaml')}.yaml"
    )
    if "/" not in source and preset.is_file():
        return preset
    reason = missing_file(os.path.abspath(path), "no such config file")
    raise UserError(f"{source}: {reason}, and no preset of that name ({', '.join(list_presets(kind))})")


def _read(path: Path, seen: tuple[Path, ...], kind: type[RunConfig]) -> dict[str, Any]:
    if path in seen:
        raise UserError(f"{path}: 'extends' goes round in a circle")
    try:
        tree = _parse_yaml(path.read_text(encoding="utf-8"))
    except _KeyFaultError as error:
        raise UserError(f"{path}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
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
    except _KeyFaultError as error:
        raise UserError(f"{override}: {error}") from None
    except (yaml.YAMLError, RecursionError):
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


_UNION_TAGS = re.compile(r"(function-|literal\[|list\[|dict\[|tuple\[|constrained-|nullable|(str|int|float|bool)$)")


def _place(problem: ErrorDetails) -> tuple[str, ...]:
    """Where it is, without the names that pydantic gives to the members of a union."""
    return tuple(str(part) for part in problem["loc"] if not _UNION_TAGS.match(str(part)) and part != "[key]")


def _deepest(problems: Sequence[ErrorDetails], kind: type[RunConfig]) -> list[ErrorDetails]:
    """One problem for a place: where a value may be of several types, the one of the type that fits best."""
    kept: dict[tuple[str, ...], ErrorDetails] = {}
    for problem in problems:
        place = _place(problem)
        if place in kept and problem["type"] == "literal_error":
            kept[place] = {**kept[place], "msg": f"{kept[place]['msg']} or {problem['ctx']['expected']}"}
        if any(other[: len(place)] == place for other in kept):
            continue  # of another member of the union
        for other in [other for other in kept if place[: len(other)] == other]:
            del kept[other]
        kept[place] = problem
    return list(kept.values())


def _explain(problem: ErrorDetails, kind: type[RunConfig]) -> str:
    key = ".".join(_place(problem))
    if problem["type"] == "string_type" and isinstance(problem["input"], bool):
        key = ".".join(part for part in _place(problem) if not part.isdecimal())
        return f"{key}: quote yes, no, on, off and the like: without quotes YAML reads them as true or false"
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key}" + did_you_mean(key, _known_keys(kind))
    if problem["type"] == "missing":
        return f"{key} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if not key:
        return message
    if problem["type"] == "value_error" and isinstance(problem["input"], dict):
        return f"{key}.{message}"  # of a key in this section
    return f"{key}: {message}" + ("" if str(problem["input"]) in message else f", not {problem['input']!r}")


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
