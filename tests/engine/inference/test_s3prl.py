"""The upstream of s3prl, behind a stub of what s3prl does with it."""

import numpy as np
import pytest
import torch
from torch import nn

from ssast.engine import ModelConfig, save_model
from ssast.engine.errors import UserError
from ssast.engine.inference.s3prl import UpstreamExpert, ssast_engine
from ssast.engine.model.adapt import build_model
from ssast.engine.model.config import ModelCard
from ssast.kernels import NUM_PREFIX, fbank

SMALL = {"width": 64, "depth": 3, "heads": 2, "input_frames": 96}
KINDS = {
    "patch": {},
    "overlap": {"stride": (10, 10), "pretraining_heads": False},
    "frame": {"patch_shape": (128, 2), "stride": (128, 2)},
}


class Featurizer(nn.Module):
    """What s3prl's class of that name does: asks a second of noise for the number of layers, weighs the layers, and
    cuts every clip to round(samples / downsample rate).
    """

    def __init__(self, upstream: nn.Module) -> None:
        super().__init__()
        upstream.eval()
        with torch.no_grad():
            states = upstream([torch.randn(16000)])["hidden_states"]
        self.weights = nn.Parameter(torch.zeros(len(states)))
        self.output_dim = states[0].shape[-1]
        self.downsample_rate = upstream.get_downsample_rates("hidden_states")

    def forward(self, wavs: list[torch.Tensor], features: dict[str, list[torch.Tensor]]) -> list[torch.Tensor]:
        stacked = torch.stack(list(features["hidden_states"]))
        feature = (self.weights.softmax(0)[:, None, None, None] * stacked).sum(dim=0)
        assert abs(feature.shape[1] - round(max(len(wav) for wav in wavs) / self.downsample_rate)) < 5
        return [rows[: round(len(wav) / self.downsample_rate)] for rows, wav in zip(feature, wavs, strict=True)]


@pytest.fixture
def checkpoint(tmp_path):
    def write(kind: str, card: ModelCard | None = None) -> str:
        model = build_model(ModelConfig(**SMALL, **KINDS[kind]), seed=3)
        model.card = card or ModelCard(mean=-5.0, std=4.0)
        save_model(model, tmp_path / f"{kind}.safetensors")
        return str(tmp_path / f"{kind}.safetensors")

    return write


def noise(*seconds: float) -> list[torch.Tensor]:
    r = np.random.default_rng(0)
    return [torch.from_numpy((0.1 * r.standard_normal(int(16000 * each))).astype(np.float32)) for each in seconds]


@pytest.mark.parametrize(("kind", "rate"), [("patch", 2560), ("overlap", 1600), ("frame", 320)])
def test_superb_trains_on_it(checkpoint, kind, rate):
    """Clips of less and more than a window and of several; a downstream head learns from the weighted layers, and so
    does the model.
    """
    upstream = ssast_engine(checkpoint(kind))
    featurizer = Featurizer(upstream)
    assert (
        featurizer.downsample_rate == rate
        and featurizer.output_dim == 64
        and len(featurizer.weights) == 1 + SMALL["depth"]
    )
    wavs = noise(0.5, 0.96, 3.3)
    states = upstream(wavs)
    longest = round(len(wavs[2]) / rate)
    assert [state.shape for state in states["hidden_states"]] == 4 * [(3, longest, 64)]
    again = upstream(wavs)["hidden_states"]
    assert all(torch.equal(one, other) for one, other in zip(states["hidden_states"], again, strict=True))
    features = featurizer(wavs, states)
    assert [len(each) for each in features] == [round(len(wav) / rate) for wav in wavs]
    assert (
        not states["hidden_states"][1][0, len(features[0]) :].any()
        and states["hidden_states"][1][2].abs().sum(-1).all()
    )
    torch.stack([nn.Linear(64, 1)(each).mean() for each in features]).sum().backward()
    assert featurizer.weights.grad.abs().min() > 0
    without = [
        name for name, p in upstream.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert without == ["model.norm.weight", "model.norm.bias"]  # only the last_hidden_state has passed it


@pytest.mark.parametrize("kind", list(KINDS))
def test_states_are_the_models_own(checkpoint, kind):
    """Time step n is the mean over frequency of the tokens of its window, which begins where the patches of the last
    one would go on.
    """
    upstream = UpstreamExpert(checkpoint(kind), windows_at_once=2)
    model, (wav,) = upstream.model, noise(3.3)
    config, step = model.config, model.config.grid[1] * model.config.stride[1] * 160
    with torch.no_grad():
        states = upstream([wav])
        for window in range(2):
            part = wav[window * step :]
            features = fbank(part[None], sample_rate=16000, num_frames=96, mean=-5.0, std=4.0)
            wanted = model.encode(features)[0, NUM_PREFIX:].unflatten(0, config.grid).mean(dim=0)
            start = window * config.grid[1]
            torch.testing.assert_close(
                states["last_hidden_state"][0, start : start + config.grid[1]], wanted, atol=1e-5, rtol=0
            )
        if kind == "frame":  # one patch high, so the mean over frequency changes nothing
            torch.testing.assert_close(model.norm(states["hidden_states"][-1]), states["last_hidden_state"])
        alone = upstream(noise(3.3))["hidden_states"][2]
        beside = upstream([wav, *noise(5.0)])["hidden_states"][2][:1]
    torch.testing.assert_close(beside[:, : alone.shape[1]], alone, atol=1e-5, rtol=0)


def test_shape_options_and_short_clips(checkpoint):
    concat = UpstreamExpert(checkpoint("patch"), None, frequency="concat", window_secs=0.5, stride=10, refresh=False)
    assert concat.model.config.input_frames == 50 and concat.get_downsample_rates("ASR") == 1600
    states = concat(noise(1.0))["hidden_states"]
    assert states[0].shape == (1, 10, concat.model.config.grid[0] * 64)
    averaged = UpstreamExpert(checkpoint("patch"), window_secs=0.5, stride=10)(noise(1.0))["hidden_states"]
    torch.testing.assert_close(states[1].unflatten(2, (-1, 64)).mean(dim=2), averaged[1])
    for samples in (0, 1, 399):
        tiny = concat([torch.zeros(samples)])["hidden_states"][-1]
        assert tiny.shape[1] == 1 and tiny.isfinite().all()


def test_refusals(checkpoint):
    with pytest.raises(UserError, match="is for 8000 Hz"):
        UpstreamExpert(checkpoint("patch", ModelCard(sample_rate=8000)))
    with pytest.raises(UserError, match="frequency must be one of mean, concat"):
        UpstreamExpert(checkpoint("patch"), frequency="max")
    with pytest.raises(UserError, match="no such file"):
        ssast_engine("nowhere.safetensors")
