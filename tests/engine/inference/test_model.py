"""The model as people use it."""

import inspect

import numpy as np
import pytest
import torch

from ssast.engine import AudioModel, embed, load_model, predict, save_model
from ssast.engine.model.adapt import build_model
from ssast.engine.model.config import ModelConfig

SHAPE = ModelConfig(width=32, depth=1, heads=2, input_frames=64, num_classes=3, pretraining_heads=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> AudioModel:
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    save_model(build_model(SHAPE), path)
    return load_model(path)


def test_the_methods_are_the_functions(model):
    wave = 0.1 * np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    assert torch.equal(model.embed(wave, 16_000).clip, embed(model, wave, 16_000).clip)
    assert torch.equal(model.predict(wave, 16_000).probabilities, predict(model, wave, 16_000).probabilities)
    assert "hop" in inspect.signature(model.embed).parameters
    assert "input_frames" in inspect.signature(load_model).parameters


def test_it_shares_what_it_is_made_of():
    network = build_model(SHAPE).train()
    network.unused = {"v.head.bias": torch.ones(1)}
    network.norm.bias.requires_grad_(False)
    model = AudioModel.of(network)
    assert dict(model.named_parameters()).keys() == dict(network.named_parameters()).keys()
    for name, parameter in network.named_parameters():
        assert model.get_parameter(name) is parameter
    assert (model.training, model.unused, model.card) == (True, network.unused, network.card)
    assert not model.norm.bias.requires_grad
