"""What the trained model makes of a few masked clips, kept for the report."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch

from ssast.engine.config import Config
from ssast.engine.data.dataset import Dataset
from ssast.engine.data.decode import AudioDecoder
from ssast.engine.files import write_whole
from ssast.engine.model.weights import load_model
from ssast.kernels import sample_patch_mask

PREVIEW_CLIPS = 3


def write_preview(config: Config, data: Dataset, run_dir: Path, step: int) -> None:
    """Write `reconstruction.npz`: features [N, T, F], mask [N, M], recon [N, T, F] (NaN where not masked), found [N,
    M], names [N], patch_shape [2], step.
    """
    model = load_model(run_dir / "checkpoints" / f"step-{step}")
    index = _longest(data, config.num_samples, config.data.sample_rate)
    decoder = AudioDecoder(
        data.valid,
        num_samples=config.num_samples,
        sample_rate=config.data.sample_rate,
        batch_size=PREVIEW_CLIPS,
        num_threads=1,
    )
    decoded = decoder.decode(index, np.zeros(len(index), dtype=np.int64))
    decoder.close()
    features = model.front_end.features(torch.from_numpy(decoded.waveform), torch.from_numpy(decoded.lengths))
    mask = sample_patch_mask(
        len(index),
        grid=model.config.grid,
        num_masked=config.mask.num_masked,
        cluster=config.mask.cluster,
        algorithm=config.mask.algorithm,
        seed=config.run.seed,
    )
    recon, matches = model.reconstruct(features, mask, softmax_over=config.objective.softmax_over)
    content = io.BytesIO()
    np.savez_compressed(
        content,
        features=features.numpy(),
        mask=mask.numpy(),
        recon=recon.numpy(),
        found=matches.numpy(),
        names=np.array([Path(data.valid.sources[clip]).name.encode("utf-8", "replace").decode() for clip in index]),
        patch_shape=np.array(model.config.patch_shape),
        step=np.array(step),
    )
    write_whole(run_dir / "reconstruction.npz", content.getvalue())


def _longest(data: Dataset, window: int, sample_rate: int) -> np.ndarray:
    """Validation clips, spread over the list, among those that fill the window best."""
    seconds = np.minimum(data.valid.frames / data.valid.sample_rates, window / sample_rate)
    full = np.flatnonzero(seconds >= np.quantile(seconds, 0.5))
    return full[np.linspace(0, len(full) - 1, min(PREVIEW_CLIPS, len(full))).astype(np.int64)]
