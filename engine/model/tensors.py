"""Named tensors out of files that anyone may have written: what a file is, which of its dictionaries is the model, and
whether its tensors are those that a model needs. Nothing in a file is ever run.
"""

from __future__ import annotations

import argparse
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssast.engine.errors import UserError, first_line

MARKS = ("v.pos_embed", "embedding.position")
"""One tensor of every model: the official code's name of it, and ours."""

WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What torch.compile, FSDP and activation checkpointing put into the names of what they wrap, at any level."""

_FOREIGN = re.compile(r"(?:GLOBAL|class) `?([a-zA-Z_][\w.]*)")  # as torch names what it would not run
# Matrices that no training makes all zeros, as official files and ours name them; biases begin as zeros.
_NEVER_ZERO = re.compile(r"(embedding|v\.patch_embed\.proj|(v\.|decoder\.)?blocks\.\d+\..+)\.weight")
DEEPEST = 8  # dictionaries within dictionaries

# How files begin that people take for checkpoints, in lower case, and what they are and what to do about it.
_BEGINNINGS = (
    (b"<!doctype", "a web page, not a checkpoint: download the file itself (a 'raw' or 'resolve' address, dl=1)"),
    (b"<html", "a web page, not a checkpoint: download the file itself (a 'raw' or 'resolve' address, dl=1)"),
    (b"<?xml", "an XML text, as servers send with an error: download the file again"),
    (b"version https://git-lfs", "a git-lfs pointer, in place of the file: fetch it with `git lfs pull`"),
    (b"\x1f\x8b", "compressed by gzip: unpack it first"),
    (b"bzh", "compressed by bzip2: unpack it first"),
    (b"\xfd7zxz", "compressed by xz: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it first"),
    (b"\x89hdf", "an HDF5 file, which is no checkpoint of PyTorch"),
    (b"gguf", "a GGUF file, which is no checkpoint of PyTorch"),
    (b"{", "a JSON text, not a checkpoint: name the file with the weights"),
)


def read_state_dict(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of the one model in a file of `torch.save`, on the CPU, by the names that they have in the model.

    The dictionary may lie within others (`model`, `state_dict`, `params` ...), and its names may carry the prefixes of
    whatever wrapped the model (`module.`, `_orig_mod.` ...).

    Raises:
        UserError: something else than a checkpoint (it says what), one with objects that would have to run code, or one
            that holds no SSAST model or several.
    """
    strange = _what_it_is(file)
    if strange:
        raise UserError(f"{file}: is {strange}")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_harmless()):
            warnings.simplefilter("ignore")  # of pickles of another protocol
            with open(file, "rb") as stream:  # of a path, torch.load looks at the suffix
                content = torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # of damaged files, torch's reader raises all kinds
        with open(file, "rb") as stream:
            is_pickle = stream.read(1) == b"\x80"
        raise UserError(f"{file}: {_why_not(error, is_pickle=is_pickle)}") from None
    models = list(_models(content, file))
    if not models:
        names = list(content)[:5] if isinstance(content, Mapping) else type(content).__name__
        raise UserError(f"{file}: not an official SSAST checkpoint (no {MARKS[0]} in it; it holds {names})")
    if len(models) > 1:
        where = ", ".join(repr(place) for place, _ in models)
        raise UserError(f"{file}: holds several models ({where}): save the one you mean in a file of its own")
    return models[0][1]


def plain_name(name: str) -> str:
    """A tensor's name without what wrappers put into it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def unwrapped_names(names: Iterable[str]) -> dict[str, str]:
    """The name in the model of each tensor of a file: without what wrappers put into it, and without the prefix that
    all have in common (`module.`, `model.` ...), which the name of the position embedding tells.
    """
    plain = {name: plain_name(name) for name in names}
    mark = MARKS[1]
    prefixes = [name.removesuffix(mark) for name in plain.values() if name == mark or name.endswith(f".{mark}")]
    prefix = min(prefixes, key=len, default="")
    if not all(name.startswith(prefix) for name in plain.values()):
        prefix = ""
    return {name: short.removeprefix(prefix) for name, short in plain.items()}


def check_weights(weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], where: Path) -> None:
    """Check that tensors are what a model needs.

    Args:
        weights: the tensors of the file, by name.
        expected: the tensors of the model, by name; only their shapes are compared.
        where: named in the error.

    Raises:
        UserError: it names every tensor that is missing, left over or of another shape; or the first with values that
            are not finite, or that is not dense; or the first weight matrix of zeros alone, as of a file whose space
            was allocated before it was downloaded.
    """
    problems = [f"missing {key}" for key in expected if key not in weights]
    problems += [f"unexpected {key}" for key in weights if key not in expected]
    for key, value in weights.items():
        if key in expected and value.shape != expected[key].shape:
            problems.append(f"{key} is {list(value.shape)}, the model needs {list(expected[key].shape)}")
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise UserError(f"{where}: does not fit the model: {shown}")
    for key, value in weights.items():
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            kind = "quantized" if value.is_quantized else "without values" if value.is_meta else "sparse"
            raise UserError(f"{where}: {key} is {kind}: save the model with dense floating-point tensors")
        if not torch.isfinite(value).all():
            count = int((~torch.isfinite(value)).sum())
            raise UserError(
                f"{where}: {key} holds {count} of {value.numel()} values that are NaN or infinite: the training that "
                "wrote it had diverged; take an earlier checkpoint"
            )
        if value.dim() > 1 and _NEVER_ZERO.fullmatch(key) and not value.any():
            raise UserError(f"{where}: {key} is nothing but zeros: the file looks half-downloaded; fetch it again")


def _what_it_is(file: Path) -> str | None:
    """What a file is that is not a checkpoint, and what to do; None where it may be one."""
    with open(file, "rb") as stream:
        start = stream.read(1024)
        if not start:
            return "empty: the copy or download did not finish; fetch it again"
        if not start.strip(b"\0") and not any(block.strip(b"\0") for block in iter(lambda: stream.read(1 << 20), b"")):
            return "nothing but zeros: the copy or download did not finish; fetch it again"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for beginning, meaning in _BEGINNINGS:
        if text.startswith(beginning):
            return meaning
    if start.startswith(b"PK"):
        try:
            with zipfile.ZipFile(file) as archive:
                names = archive.namelist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
            return "cut off or damaged: the copy or download did not finish; fetch it again"
        if not any(name.endswith("data.pkl") for name in names):
            return f"a zip archive of {', '.join(names[:3]) or 'nothing'}, not a checkpoint: unpack it first"
    elif re.fullmatch(rb"[\t\n\r\x20-\x7e]+", start):
        return "a text file, not a checkpoint"
    return None


def _why_not(error: Exception, *, is_pickle: bool) -> str:
    """Why torch would not load a file, and what to do."""
    text = str(error)
    if foreign := _FOREIGN.search(text):
        return (
            f"holds objects that would have to run code ({foreign[1]}), so it is not loaded; if you trust it, save the "
            "model's state_dict() alone, with torch.save"
        )
    if "TorchScript" in text:
        return "is a TorchScript program: save the state_dict() of the model that it was made of"
    if is_pickle and "Unsupported operand" in text:
        return (
            "is a pickle of another kind than torch.save writes, which could run code, so it is not loaded; if you "
            "trust it, save the model's state_dict() alone, with torch.save"
        )
    # the first line of the safe reader's message would have people load it unsafely
    detail = re.search(r"WeightsUnpickler error:\s*(.+)", text)
    reason = detail[1] if detail else first_line(error)
    return f"is damaged, or no checkpoint of PyTorch ({reason[:120]}): fetch it again"


def _harmless() -> list[Any]:
    """What people's checkpoints hold beside tensors, whose making runs nothing: NumPy's scalars and arrays, and the
    arguments of a script.
    """
    from numpy._core import multiarray

    kinds = [getattr(np.dtypes, name) for name in np.dtypes.__all__]
    makers = [multiarray.scalar, multiarray._reconstruct]
    of_older_numpy = [(maker, f"numpy.core.multiarray.{maker.__name__}") for maker in makers]
    return [np.dtype, np.ndarray, argparse.Namespace, *makers, *of_older_numpy, *kinds]


def _models(
    content: object, file: Path, place: str = "", depth: int = 0
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Each model in nested dictionaries: where it lies, and its tensors by their plain names."""
    if not isinstance(content, Mapping) or depth > DEEPEST:
        return
    tensors: dict[str, torch.Tensor] = {}
    for name, value in content.items():
        if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "fiu":  # as converters write them
            value = torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))
        if isinstance(value, torch.Tensor) and isinstance(name, str):
            if plain_name(name) in tensors:
                raise UserError(f"{file}: holds {plain_name(name)} twice, wrapped and plain")
            tensors[plain_name(name)] = value
    for mark in MARKS:
        for name in tensors:
            if name == mark or name.endswith(f".{mark}"):
                prefix = name.removesuffix(mark)
                yield place + prefix or "the file itself", {key.removeprefix(prefix): tensors[key] for key in tensors}
    for name, value in content.items():
        yield from _models(value, file, f"{place}{name}.", depth + 1)
