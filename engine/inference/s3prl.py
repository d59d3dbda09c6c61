"""SSAST models as an upstream of s3prl, the toolkit of the SUPERB benchmark: waveforms of any length to the hidden
states of all layers.

With this package installed, s3prl takes the model through a folder `s3prl/upstream/ssast_engine` with two one-line
files,

    expert.py    from ssast.engine.inference.s3prl import UpstreamExpert
    hubconf.py   from ssast.engine.inference.s3prl import ssast_engine

and `python run_downstream.py -u ssast_engine -k CHECKPOINT ...`. Nothing of s3prl is imported here.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ssast.engine.errors import UserError
from ssast.engine.model.weights import load_model
from ssast.kernels import NUM_PREFIX
from ssast.kernels.fbank import SHIFT_SECONDS, frame_geometry

from .inference import hidden_states

SAMPLE_RATE = 16000  # Hz: s3prl's
FREQUENCY = ("mean", "concat")


class UpstreamExpert(nn.Module):
    """s3prl's interface. Parameters are the model's, so `--upstream_trainable` fine-tunes it."""

    def __init__(
        self,
        ckpt: str | os.PathLike[str],
        model_config: str | None = None,
        *,
        window_secs: float | None = None,
        stride: int | tuple[int, int] | None = None,
        frequency: str = "mean",
        windows_at_once: int = 16,
        **ignored: Any,
    ) -> None:
        """
        Args:
            ckpt: what `ssast.engine.load_model` reads.
            model_config: not used; s3prl may give it.
            window_secs: length of the windows that the model sees, to which its position embedding is fitted; default
                its own. For short clips a window of their length is faster and sees less padding (the authors: 1 s for
                commands, 6 s for emotion).
            stride: of the patches, (mel bins, frames); default as saved. The authors' upstream takes 10.
            frequency: what becomes of the patches above each other at one time: their "mean", or as in the authors'
                upstream, "concat": one after the other in a frame of f * D values.
            windows_at_once: how many windows go through the model together, which bounds memory.
            ignored: what s3prl gives to all upstreams.

        Raises:
            UserError: as `load_model`, an unknown `frequency`, or a model for another sample rate than 16 kHz.
        """
        super().__init__()
        if frequency not in FREQUENCY:
            raise UserError(f"frequency must be one of {', '.join(FREQUENCY)}, not {frequency!r}")
        frames = None if window_secs is None else round(window_secs / SHIFT_SECONDS)
        self.model = load_model(ckpt, input_frames=frames, stride=stride)
        if self.model.card.sample_rate != SAMPLE_RATE:
            raise UserError(f"{ckpt}: is for {self.model.card.sample_rate} Hz; s3prl gives {SAMPLE_RATE} Hz")
        self.frequency, self.windows_at_once = frequency, windows_at_once
        for name, parameter in self.model.named_parameters():
            unused = ("decoder", "class_head", "recon_head", "classifier", "layer_weights")
            if name.startswith(unused) or name.endswith("mask_token"):
                parameter.requires_grad_(False)  # no hidden state depends on them

    def get_downsample_rates(self, key: str | None = None) -> int:
        """Samples between one hidden state and the next, the same for all layers."""
        return frame_geometry(SAMPLE_RATE)[1] * self.model.config.stride[1]

    def forward(self, wavs: list[torch.Tensor]) -> dict[str, Any]:
        """Hidden states of a batch.

        Args:
            wavs: float32 waveforms in [-1, 1] at 16 kHz, each [S].

        Returns:
            "hidden_states": the tokens before the first and after every block, each [B, T', D] (f * D for "concat"),
            zero past a clip's own length; "last_hidden_state": after the final norm. T' is that of the longest clip, of
            S samples round(S / downsample rate), at least 1.

        Raises:
            ValueError: there are no waveforms.
        """
        if not wavs:
            raise ValueError("wavs is empty")
        lengths = [len(wav) for wav in wavs]
        times = [max(1, round(length / self.get_downsample_rates())) for length in lengths]
        windows = self._windows(wavs, lengths, max(times))  # [B, W, T, F]
        # of each [L, w, t, D]
        layers = [self._encode(chunk) for chunk in windows.flatten(0, 1).split(self.windows_at_once)]
        # [L, B, T', D]
        states = torch.cat(layers, dim=1).unflatten(1, windows.shape[:2]).flatten(2, 3)[:, :, : max(times)]
        time = torch.arange(max(times), device=states.device)
        is_past = time[None, :] >= torch.tensor(times, device=states.device)[:, None]  # [B, T']
        *hidden, last = states.masked_fill(is_past[..., None], 0.0)
        return {"hidden_states": hidden, "last_hidden_state": last}

    def _windows(self, wavs: list[torch.Tensor], lengths: list[int], times: int) -> torch.Tensor:
        """[B, W, T, F] normalised features. Each window starts where the patches of the one before it would go on, so
        that all patches lie on one line of time, a stride apart.
        """
        config = self.model.config
        step = config.grid[1] * config.stride[1]  # frames
        count = -(-times // config.grid[1])
        front_end = replace(self.model.front_end, num_frames=(count - 1) * step + config.input_frames)
        waveform = nn.utils.rnn.pad_sequence([wav.float() for wav in wavs], batch_first=True)
        features = front_end.features(waveform, torch.tensor(lengths, device=waveform.device))
        return features.unfold(1, config.input_frames, step).transpose(2, 3)

    def _encode(self, features: torch.Tensor) -> torch.Tensor:
        """[w, T, F] -> [2 + depth, w, t, D]: before the blocks, after each, after the norm."""
        layers = list(hidden_states(self.model, features))
        layers.append(self.model.norm(layers[-1]))
        patches = torch.stack(layers)[:, :, NUM_PREFIX:].unflatten(2, self.model.config.grid)  # [L, w, f, t, D]
        return patches.mean(dim=2) if self.frequency == "mean" else patches.transpose(2, 3).flatten(3)


def ssast_engine(ckpt: str | os.PathLike[str], *args: Any, **kwargs: Any) -> UpstreamExpert:
    """The entry of s3prl's hub."""
    return UpstreamExpert(ckpt, *args, **kwargs)
