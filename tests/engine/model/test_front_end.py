"""One way from waveforms to features."""

import dataclasses

import pytest
import torch

from ssast.engine.model.adapt import build_model
from ssast.engine.model.config import LossConfig, ModelCard, ModelConfig
from ssast.engine.model.front_end import FrontEnd
from ssast.engine.model.ssast import SSAST
from ssast.kernels import fbank, patchify

CONFIG = ModelConfig(width=32, depth=1, heads=2, num_mel_bins=32, input_frames=32)
CARD = ModelCard(sample_rate=8000, mean=-3.0, std=2.0)


@pytest.fixture
def waveform() -> torch.Tensor:
    return 0.1 * torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))


def test_features_are_those_of_the_card(waveform):
    lengths = torch.tensor([4000, 1500])
    front_end = SSAST(CONFIG, CARD).front_end
    features = front_end.features(waveform, lengths)
    options = {"sample_rate": 8000, "num_mel_bins": 32, "num_frames": 32, "lengths": lengths}
    assert torch.equal(features, fbank(waveform, **options, mean=-3.0, std=2.0))
    assert torch.equal(front_end.features(waveform, lengths, patch=(16, 16)), patchify(features, (16, 16), (16, 16)))
    assert front_end.features(waveform, dtype=torch.bfloat16).dtype == torch.bfloat16
    longer = dataclasses.replace(front_end, num_frames=40).features(waveform, lengths)
    assert longer.shape == (2, 40, 32) and torch.equal(longer[:, :32], features)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(FrontEnd)])
def test_every_field_is_heard(waveform, name):
    front_end = FrontEnd.of(CONFIG, CARD)
    other = dataclasses.replace(front_end, **{name: getattr(front_end, name) * 2})
    one, two = front_end.features(waveform), other.features(waveform)
    assert one.shape != two.shape or not torch.equal(one, two)


def test_the_loss_is_one_value_from_the_keywords_on(waveform):
    model = build_model(CONFIG)
    features, mask = model.front_end.features(waveform.repeat(1, 2)), torch.tensor([[0, 3], [1, 2]])
    patches = patchify(features, (16, 16), (16, 16))
    for loss in (LossConfig(), LossConfig("discriminative", "targets"), LossConfig("joint", "targets", 3.0)):
        options = {"objective": loss.objective, "softmax_over": loss.softmax_over, "recon_weight": loss.recon_weight}
        expected = model.pretrain(features, mask, **options).loss
        assert model(lambda network, loss=loss: network.pretrain_patches(patches, mask, None, loss)).loss == expected
    with pytest.raises(ValueError, match="objective must be one of joint"):
        model.pretrain(features, mask, objective="contrastive")
