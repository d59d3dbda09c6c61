"""What a run ran on, and which optional parts are there."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .errors import first_line

PACKAGES = (
    "torch",
    "triton",
    "deepspeed",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "numpy",
    "flash-attn",
    "flash-attn-4",
    "apex",
)


def describe_environment(world_size: int = 1) -> dict[str, Any]:
    """Versions, devices, command line and git commit, as plain values for a JSON file."""
    return {
        "command": " ".join(sys.argv),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu_count": os.cpu_count(),
        "world_size": world_size,
        "devices": device_names(),
        "cuda": torch.version.cuda,
        "git_commit": (_own_git("rev-parse", "HEAD") or "").strip() or None,
        "git_dirty": bool(_own_git("status", "--porcelain")),
        **{package: version for package in PACKAGES if (version := _version(package))},
    }


def source_diff() -> str:
    """Uncommitted changes of the engine's own source, empty where it is not a git checkout."""
    return _own_git("diff", "HEAD") or ""


def device_names() -> list[str]:
    """Names of the GPUs that this process sees; `cpu` alone without any."""
    if not torch.cuda.is_available():
        return ["cpu"]
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def settle_accelerator() -> str:
    """ "cuda" or "cpu", for DeepSpeed and this engine alike; said outright, it spares DeepSpeed's guess and its
    warning.
    """
    return os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def computes_in_bf16() -> bool:
    """Whether the device of this process has units that multiply in bf16: a GPU of compute capability 8.0 (Ampere) or
    newer, a CPU with AVX512-BF16 or AMX. Any other CPU converts back and forth, and takes several times as long as in
    fp32.
    """
    if settle_accelerator() == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def optional_parts() -> dict[str, str]:
    """For each optional part "yes" or why not. Judged by the feature, not by the name: `apex` and `flash_attn` on disk
    may be another project, or a part of one.
    """
    settle_accelerator()
    return {
        "CUDA device": "yes" if torch.cuda.is_available() else "none found: training runs on the CPU",
        "DeepSpeed": _has("deepspeed", "initialize"),
        "DALI": _has("nvidia.dali", "pipeline_def"),
        "Triton": _has("triton", "jit"),
        "flash-attn 2": _has("flash_attn", "flash_attn_func"),
        "flash-attn 3": _has("flash_attn_interface", "flash_attn_func"),
        "flash-attn 4": _has("flash_attn.cute", "flash_attn_func"),
        "NVIDIA apex": _has("apex.optimizers", "FusedAdam"),
        "Weights & Biases": _has("wandb", "init"),
    }


def _has(module: str, feature: str) -> str:
    try:
        part: Callable[..., Any] | None = getattr(importlib.import_module(module), feature, None)
    except Exception as error:  # a broken build may raise anything
        return f"no ({first_line(error)})"
    return "yes" if part is not None else f"no ({module} is installed but has no {feature})"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _own_git(*arguments: str) -> str | None:
    """What git says, if the checkout around this file is its own and not one that it was merely installed into."""
    return _git(*arguments) if _git("ls-files", "--error-unmatch", Path(__file__).name) else None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None
