"""`ssast export`: a trained model in the formats of other programs.

    safetensors   the engine's own file, whole: weights, shape and card
    official      what the authors' code loads
    hf            a folder that Hugging Face transformers loads as an Audio Spectrogram Transformer, with its
                  feature extractor
    onnx          waveform to logits, for ONNX Runtime and other engines
    torch-export  waveform to logits, a `torch.export` program that needs PyTorch alone

docs/export.md says what is equal to what, and how closely.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ssast.engine.errors import UserError
from ssast.engine.files import expand_path, path_argument
from ssast.engine.model.config import ModelCard
from ssast.engine.model.ssast import SSAST
from ssast.engine.model.weights import is_write_error, load_model, save_model

from .graph import export_onnx, export_torch, input_samples
from .hf import export_hf, from_hf, is_hf_folder

__all__ = ["export_hf", "export_model", "export_onnx", "export_torch", "from_hf", "input_samples", "main"]

log = logging.getLogger("ssast")


def export_model(model: SSAST, out: str | os.PathLike[str], to: str | None = None, *, force: bool = False) -> str:
    """Write the model to `out`, whole or not at all.

    Args:
        out: a file, or for "hf" a folder.
        to: one of `FORMATS`. None: by the suffix of `out`, a folder where there is none.
        force: replace what is there. A folder is replaced only if it holds nothing but an earlier export.

    Returns:
        What was written, how closely it was found to compute what the model does, and which kind of pretraining its
        encoder had, for people.

    Raises:
        UserError: an unknown format, something there already, a model that the format cannot hold, a library that is
            not installed, a result that does not compute what the model does, or a path that cannot be written.
    """
    out, to = Path(out), to or _format_of(Path(out))
    if to not in FORMATS:
        raise UserError(f"format must be one of {', '.join(FORMATS)}, not {to!r}")
    if out.exists() and not force:
        raise UserError(f"{out}: is there already; --force (force=True) replaces it")
    if out.is_dir() and FORMATS[to].suffix:
        raise UserError(f"{out}: is a folder; {to} is one file")
    if out.is_file() and not FORMATS[to].suffix:
        raise UserError(f"{out}: is a file; {to} is a folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return f"{FORMATS[to].write(model, out)}; encoder_tokens: {model.config.encoder_tokens}"
    except Exception as error:
        if isinstance(error, UserError) or not is_write_error(error):
            raise
        raise UserError(f"{out}: could not be written: {error}") from None


def _format_of(out: Path) -> str:
    for name, each in FORMATS.items():
        if each.suffix == out.suffix:
            return name
    raise UserError(f"{out}: its suffix tells no format; give --to {{{','.join(FORMATS)}}}")


def _write_safetensors(model: SSAST, out: Path) -> str:
    save_model(model, out)
    return f"{out}: safetensors, all weights as they are"


def _write_official(model: SSAST, out: Path) -> str:
    if model.config.layer_weights:
        raise UserError("the official format knows no learned weights of layers; use safetensors, onnx or torch-export")
    save_model(model, out, format="official")
    if model.config.has_decoder:
        log.warning("%s: the official code knows no decoder; the file holds the encoder alone, for fine-tuning", out)
    lost = [name for name, default in vars(ModelCard()).items() if getattr(model.card, name) != default]
    if lost:
        log.warning("%s: the official format has no place for %s of the model card", out, ", ".join(lost))
    return f"{out}: official checkpoint, {'the encoder' if model.config.has_decoder else 'all'} weights as they are"


def _write_hf(model: SSAST, out: Path) -> str:
    deviation = export_hf(model, out)
    return f"{out}: Hugging Face folder; from the same waveforms its output differs by at most {deviation:.1e}"


def _write_onnx(model: SSAST, out: Path) -> str:
    deviation = export_onnx(model, out)
    checked = (
        "not checked (pip install onnxruntime)"
        if deviation is None
        else f"differs by at most {deviation:.1e} in onnxruntime"
    )
    return f"{out}: ONNX of {input_samples(model)} samples; {checked}"


def _write_torch(model: SSAST, out: Path) -> str:
    return f"{out}: torch.export of {input_samples(model)} samples; differs by at most {export_torch(model, out):.1e}"


@dataclass(frozen=True)
class Format:
    """How a model is written. `write` returns what was written, and how closely it computes what the model does."""

    suffix: str  # of the file, by which it is chosen; "": a folder
    write: Callable[[SSAST, Path], str]


FORMATS = {
    "safetensors": Format(".safetensors", _write_safetensors),
    "official": Format(".pth", _write_official),
    "hf": Format("", _write_hf),
    "onnx": Format(".onnx", _write_onnx),
    "torch-export": Format(".pt2", _write_torch),
}


def main(argv: list[str]) -> int:
    """`ssast export`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="ssast export", description="Write a model in another format.")
    parser.add_argument(
        "model", type=expand_path, help="checkpoint or run folder, an official .pth, or a Hugging Face AST folder"
    )
    parser.add_argument("--out", required=True, type=path_argument, help="file to write, or for hf a folder")
    parser.add_argument("--to", choices=FORMATS, help="default: by the suffix of --out; a folder without suffix is hf")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    parser.add_argument(
        "--input-frames", type=int, metavar="T", help="length of the window in frames of 10 ms; default: the model's"
    )
    parser.add_argument(
        "--stride", type=int, nargs=2, metavar=("BINS", "FRAMES"), help="that an official fine-tuned file was made with"
    )
    args = parser.parse_args(argv)
    logging.basicConfig(format="ssast: %(message)s")
    log.setLevel(logging.INFO)  # what was assumed of an official file
    model: SSAST
    if is_hf_folder(Path(args.model)):
        if args.input_frames or args.stride:
            raise UserError(
                f"{args.model}: a Hugging Face folder says its own input and stride; export it to safetensors first"
            )
        model = from_hf(args.model)
    else:
        stride = tuple(args.stride) if args.stride else None
        model = load_model(args.model, input_frames=args.input_frames, stride=stride)
    print(export_model(model, args.out, args.to, force=args.force))
    return 0
