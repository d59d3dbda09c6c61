"""Named tensors out of files: whether they are those that a model needs."""

from __future__ import annotations

from pathlib import Path

import torch

from ssast.engine.errors import UserError


def check_weights(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], where: Path) -> None:
    """Raise UserError that names every tensor that is missing, left over or of another shape."""
    problems = [f"missing {key}" for key in wanted if key not in found]
    problems += [f"unexpected {key}" for key in found if key not in wanted]
    for key, value in found.items():
        if key in wanted and value.shape != wanted[key].shape:
            problems.append(f"{key} is {list(value.shape)}, the model needs {list(wanted[key].shape)}")
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise UserError(f"{where}: does not fit the model: {shown}")
