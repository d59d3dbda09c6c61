"""The model as people use it: the network, with sound as its input. `ssast.engine.load_model` gives one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

import torch

from ssast.engine.model import weights
from ssast.engine.model.ssast import SSAST

from .embed import embed
from .predict import predict

P = ParamSpec("P")


class AudioModel(SSAST):
    """An SSAST that takes waveforms of any length, rate and number of channels, too.

    The network itself knows features and patches only; what is done to sound before and after it is the business of
    this room, `ssast.engine.inference`.
    """

    embed = embed
    predict = predict

    @classmethod
    def of(cls, network: SSAST) -> AudioModel:
        """The same model, its parameters shared, in the same mode."""
        with torch.device("meta"):
            model = cls(network.config, network.card)
        for name, parameter in network.named_parameters():
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent).register_parameter(leaf, parameter)
        model.unused = network.unused
        return model.train(network.training)


def _with_audio(load: Callable[P, SSAST]) -> Callable[P, AudioModel]:
    @functools.wraps(load)
    def loaded(*args: P.args, **kwargs: P.kwargs) -> AudioModel:
        return AudioModel.of(load(*args, **kwargs))

    return loaded


load_model = _with_audio(weights.load_model)
