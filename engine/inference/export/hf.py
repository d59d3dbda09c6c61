"""Models as Hugging Face folders, and back: `transformers`' Audio Spectrogram Transformer with its feature extractor.

What has no equal there is refused. Its patches are square; it pools the two prefix tokens, so a model that was trained
on the mean of the patch tokens comes with a file of code that pools them (`hf_mean_pool.py`).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from ssast.engine.errors import UserError, first_line
from ssast.engine.files import atomic_write, expand_path, permit_as_usual
from ssast.engine.inference.model import AudioModel
from ssast.engine.model.config import ModelCard, ModelConfig
from ssast.engine.model.ssast import SSAST
from ssast.engine.model.tensors import check_weights
from ssast.engine.model.weights import hf_model_type

from .graph import FromWaveform, check_equal, example

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import ASTFeatureExtractor, PreTrainedModel

MODEL_TYPE, MEAN_POOL_TYPE = "audio-spectrogram-transformer", "ssast"
ENCODER_TOKENS = "pretraining_encoder_tokens"  # in config.json; transformers has no use for it, readers have
CODE_FILE = "hf_mean_pool.py"
FILES = {"config.json", "model.safetensors", "preprocessor_config.json", CODE_FILE}
EXTRACTOR_RATE = 16000  # Hz
NORM_EPS = 1e-6

_BLOCK_PARTS = {  # ours -> theirs
    "norm1": "layernorm_before",
    "attn.proj": "attention.o_proj",
    "norm2": "layernorm_after",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")


def export_hf(model: SSAST, out: Path) -> float:
    """Write the folder; returns the largest deviation of what transformers computes with it from what the model does,
    from the same waveforms, each through its own front end.

    A model with a classifier becomes an `ASTForAudioClassification`, or with `card.pool` "mean" an
    `SSASTForAudioClassification`, which is loaded with `trust_remote_code=True`; one without becomes an `ASTModel`.

    Raises:
        UserError: transformers is not installed, a model that has no equal there, a folder with other files in it, or a
            result that does not compute what the model does.
    """
    _require_transformers()
    _check_exportable(model)
    _check_replaceable(out)
    with atomic_write(out) as aside:
        with _quiet():
            theirs = _build(model)
            theirs.save_pretrained(aside)
            _extractor(model).save_pretrained(aside)
            for file in aside.iterdir():
                permit_as_usual(file)
            loaded, extractor = _load(aside)
            deviation = _check(model, loaded, extractor, out)
        if out.exists():
            shutil.rmtree(out)
    return deviation


def from_hf(folder: str | os.PathLike[str]) -> AudioModel:
    """A Hugging Face AST folder as a model of ours, without pretraining heads; runs no code from the folder.

    Its layer norms are computed with our epsilons (1e-6, classifier 1e-5) whatever the folder's config says.

    Raises:
        UserError: transformers is not installed, not such a folder, one that does not load whole, or a model that has
            no equal here.
    """
    _require_transformers()
    folder = Path(expand_path(os.fspath(folder)))
    if not is_hf_folder(folder):
        raise UserError(
            f"{folder}: not a Hugging Face AST folder (no config.json with model_type {MODEL_TYPE!r} in it)"
        )
    _check_labels(folder)
    try:
        with _quiet():
            theirs, extractor = _load(folder)
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder}: transformers cannot load it: {first_line(error)}") from None
    config: Any = theirs.config
    is_classifier = hasattr(theirs, "classifier")
    if (
        config.hidden_act != "gelu"
        or not isinstance(config.patch_size, int)
        or config.intermediate_size % config.hidden_size
    ):
        raise UserError(f"{folder}: has no equal here: activation {config.hidden_act}, patch size {config.patch_size}")
    labels = tuple(config.id2label[number] for number in range(config.num_labels)) if is_classifier else None
    try:
        shape = ModelConfig(
            width=config.hidden_size,
            depth=config.num_hidden_layers,
            heads=config.num_attention_heads,
            mlp_ratio=config.intermediate_size // config.hidden_size,
            num_mel_bins=config.num_mel_bins,
            input_frames=config.max_length,
            patch_shape=(config.patch_size, config.patch_size),
            stride=(config.frequency_stride, config.time_stride),
            num_classes=config.num_labels if is_classifier else None,
            pretraining_heads=False,
            encoder_tokens=getattr(config, ENCODER_TOKENS, "all"),
        )
        card = ModelCard(
            sample_rate=extractor.sampling_rate,
            mean=extractor.mean if extractor.do_normalize else 0.0,
            std=extractor.std if extractor.do_normalize else 0.5,
            labels=None if labels == _nameless(len(labels or ())) else labels,
            multi_label=config.problem_type == "multi_label_classification",
            pool="cls" if is_classifier and config.model_type == MODEL_TYPE else "mean",
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder}: has no equal here: {first_line(error)}") from None
    model = AudioModel(shape, card)
    weights = _to_ours(theirs.state_dict(), model.config)
    check_weights(weights, model.state_dict(), folder)
    model.load_state_dict(weights)
    return model.eval()


def is_hf_folder(folder: Path) -> bool:
    """Whether `from_hf` can be asked to read it."""
    return hf_model_type(folder) in (MODEL_TYPE, MEAN_POOL_TYPE)


def _check_labels(folder: Path) -> None:
    """Raises UserError for an `id2label` that leaves out a class, whose names would move to other classes."""
    names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("id2label")
    if names is None:
        return
    if not isinstance(names, dict) or not all(str(number).isdecimal() for number in names):
        raise UserError(f"{folder}/config.json: id2label must map the numbers of classes to their names")
    numbers = {int(number) for number in names}
    missing = sorted(set(range(max(numbers, default=-1) + 1)) - numbers) if len(numbers) < 1 << 20 else []
    if missing:
        raise UserError(
            f"{folder}/config.json: id2label names {len(numbers)} classes up to number {max(numbers)}, but not number "
            f"{', '.join(map(str, missing[:5]))}: number all classes from 0 without a gap"
        )


def _require_transformers() -> None:
    hide_namesake()
    try:
        from transformers import ASTFeatureExtractor  # noqa: F401
    except (
        ImportError,
        OSError,
        RuntimeError,
    ) as error:  # OSError: a torchaudio made for another torch, which transformers loads
        raise UserError(
            f"the Hugging Face format needs transformers ({first_line(error)}): pip install 'transformers>=5.23', and "
            "a torchaudio that "
            "fits the installed torch, or none"
        ) from None


def hide_namesake() -> None:
    """Where this repository is the working directory of `python -m`, `import kernels` finds its folder of that name.
    transformers takes it for a package of Hugging Face's, and every operator would be registered a second time.
    """
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        sys.modules.setdefault("kernels", None)  # type: ignore[arg-type] # documented: its import fails


def _check_exportable(model: SSAST) -> None:
    config, elsewhere = model.config, "export to onnx or torch-export instead"
    if config.patch_shape[0] != config.patch_shape[1]:
        bins, frames = config.patch_shape
        raise UserError(
            "a Hugging Face AST has square patches (ASTConfig.patch_size is one number), this model's are "
            f"{bins}x{frames}; {elsewhere}"
        )
    if config.layer_weights:
        raise UserError(f"a Hugging Face AST classifies its last layer, this model a weighted sum of all; {elsewhere}")
    if model.card.sample_rate != EXTRACTOR_RATE:
        raise UserError(
            f"transformers' AST feature extractor has frames for {EXTRACTOR_RATE} Hz, this model is for "
            f"{model.card.sample_rate} Hz; "
            f"{elsewhere}"
        )


def _check_replaceable(out: Path) -> None:
    others = sorted({path.name for path in out.iterdir()} - FILES) if out.exists() else []
    if others:
        raise UserError(f"{out}: holds more than an exported model ({', '.join(others[:3])}); choose another folder")


def _build(model: SSAST) -> PreTrainedModel:
    from transformers import ASTConfig, ASTForAudioClassification, ASTModel

    from .hf_mean_pool import SSASTConfig, SSASTForAudioClassification

    is_mean = model.config.num_classes is not None and model.card.pool == "mean"
    theirs: PreTrainedModel
    config = ASTConfig(**_config(model))
    if model.config.num_classes is None:
        theirs = ASTModel(config)
    elif is_mean:
        SSASTConfig.register_for_auto_class()
        SSASTForAudioClassification.register_for_auto_class("AutoModelForAudioClassification")
        theirs = SSASTForAudioClassification(SSASTConfig(**_config(model)))
    else:
        theirs = ASTForAudioClassification(config)
    theirs.load_state_dict(_to_theirs(model))
    return theirs.eval()


def _config(model: SSAST) -> dict[str, Any]:
    config, card = model.config, model.card
    options: dict[str, Any] = {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_ratio * config.width,
        "hidden_act": "gelu",
        "layer_norm_eps": NORM_EPS,
        "patch_size": config.patch_shape[0],
        "qkv_bias": True,
        "frequency_stride": config.stride[0],
        "time_stride": config.stride[1],
        "max_length": config.input_frames,
        "num_mel_bins": config.num_mel_bins,
        ENCODER_TOKENS: config.encoder_tokens,
    }
    if config.num_classes is not None:
        labels = card.labels or _nameless(config.num_classes)
        options["id2label"] = dict(enumerate(labels))
        options["label2id"] = {label: number for number, label in enumerate(labels)}
        options["problem_type"] = "multi_label_classification" if card.multi_label else "single_label_classification"
    return options


def _nameless(count: int) -> tuple[str, ...]:
    """What transformers calls classes without names."""
    return tuple(f"LABEL_{number}" for number in range(count))


def _extractor(model: SSAST) -> ASTFeatureExtractor:
    from transformers import ASTFeatureExtractor

    return ASTFeatureExtractor(
        sampling_rate=model.card.sample_rate,
        num_mel_bins=model.config.num_mel_bins,
        max_length=model.config.input_frames,
        mean=model.card.mean,
        std=model.card.std,
    )


def _load(folder: Path) -> tuple[PreTrainedModel, ASTFeatureExtractor]:
    """With our own classes, not with code from the folder."""
    from transformers import ASTFeatureExtractor, ASTForAudioClassification, ASTModel

    from .hf_mean_pool import SSASTForAudioClassification

    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind: Any = ASTModel
    if described["model_type"] == MEAN_POOL_TYPE:
        kind = SSASTForAudioClassification
    elif "ASTForAudioClassification" in (described.get("architectures") or ()):
        kind = ASTForAudioClassification
    model, report = kind.from_pretrained(folder, local_files_only=True, dtype=torch.float32, output_loading_info=True)
    wrong = [
        f"{problem}: {sorted(map(str, names))[:3]}"
        for problem, names in report.items()
        if names and problem.endswith("_keys")
    ]
    if wrong:
        raise UserError(f"{folder}: does not load whole: {'; '.join(wrong)}")
    return model.eval(), ASTFeatureExtractor.from_pretrained(folder, local_files_only=True)


@torch.no_grad()
def _check(model: SSAST, theirs: PreTrainedModel, extractor: ASTFeatureExtractor, out: Path) -> float:
    module = FromWaveform(model)
    waveform, lengths = example(model)
    waveform, lengths = waveform[:2], lengths[:2]  # the extractor fails on what is too short for a frame
    clips = [clip[:length].numpy() for clip, length in zip(waveform, lengths, strict=True)]
    values = torch.cat(
        [extractor(clip, sampling_rate=EXTRACTOR_RATE, return_tensors="pt")["input_values"] for clip in clips]
    )
    output, ours = theirs(values), module(waveform, lengths)
    if model.config.num_classes is not None:
        return check_equal(output.logits, ours, f"{out}: logits")
    return check_equal(output.last_hidden_state, ours[1], f"{out}: tokens")


def _to_theirs(model: SSAST) -> dict[str, torch.Tensor]:
    weights = {name: value.detach().cpu().float() for name, value in model.state_dict().items()}
    side = model.config.patch_shape[0]
    encoder = {
        "embeddings.cls_token": weights["embedding.prefix"][None, :1],
        "embeddings.distillation_token": weights["embedding.prefix"][None, 1:],
        "embeddings.position_embeddings": weights["embedding.position"][None],
        "embeddings.patch_embeddings.projection.weight": weights["embedding.weight"].view(-1, 1, side, side),
        "embeddings.patch_embeddings.projection.bias": weights["embedding.bias"],
    }
    for kind in ("weight", "bias"):
        encoder[f"layernorm.{kind}"] = weights[f"norm.{kind}"]
        for number in range(model.config.depth):
            thirds = weights[f"blocks.{number}.attn.qkv.{kind}"].chunk(3)
            encoder |= {f"layers.{number}.{name}.{kind}": third for name, third in zip(_QKV, thirds, strict=True)}
            encoder |= {
                f"layers.{number}.{name}.{kind}": weights[f"blocks.{number}.{ours}.{kind}"]
                for ours, name in _BLOCK_PARTS.items()
            }
    if model.config.num_classes is None:
        return encoder
    tensors = {f"audio_spectrogram_transformer.{name}": value for name, value in encoder.items()}
    for kind in ("weight", "bias"):
        tensors[f"classifier.layernorm.{kind}"] = weights[f"classifier.0.{kind}"]
        tensors[f"classifier.dense.{kind}"] = weights[f"classifier.1.{kind}"]
    return tensors


def _to_ours(tensors: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    tensors = {name.removeprefix("audio_spectrogram_transformer."): value for name, value in tensors.items()}
    weights = {
        "embedding.weight": tensors["embeddings.patch_embeddings.projection.weight"].flatten(1),
        "embedding.bias": tensors["embeddings.patch_embeddings.projection.bias"],
        "embedding.position": tensors["embeddings.position_embeddings"][0],
        "embedding.prefix": torch.cat(
            (tensors["embeddings.cls_token"], tensors["embeddings.distillation_token"]), dim=1
        )[0],
    }
    for kind in ("weight", "bias"):
        weights[f"norm.{kind}"] = tensors[f"layernorm.{kind}"]
        for number in range(config.depth):
            block, layer = f"blocks.{number}", f"layers.{number}"
            # qkv_bias=False: no bias
            thirds = [tensors.get(f"{layer}.{name}.{kind}", torch.zeros(config.width)) for name in _QKV]
            weights[f"{block}.attn.qkv.{kind}"] = torch.cat(thirds)
            weights |= {
                f"{block}.{ours}.{kind}": tensors[f"{layer}.{name}.{kind}"] for ours, name in _BLOCK_PARTS.items()
            }
        if config.num_classes is not None:
            weights[f"classifier.0.{kind}"] = tensors[f"classifier.layernorm.{kind}"]
            weights[f"classifier.1.{kind}"] = tensors[f"classifier.dense.{kind}"]
    return weights


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' advice and progress bars off, and its warning of mel filters that hold no FFT bin, as Kaldi's
    do.
    """
    from transformers.utils import logging

    level, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if had_bar:
            logging.enable_progress_bar()
