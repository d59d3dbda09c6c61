"""A model that was pretrained on visible patches is used as any other: its decoder is of no account, and what leaves
the engine says which kind it is.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from ssast.engine import ModelConfig, load_model, save_model
from ssast.engine.inference.embed import embed
from ssast.engine.inference.export import export_model, from_hf
from ssast.engine.inference.export.graph import FromWaveform, describe
from ssast.engine.inference.s3prl import UpstreamExpert
from ssast.engine.model.adapt import build_model, resize

VISIBLE = ModelConfig(width=64, heads=2, depth=2, input_frames=98, encoder_tokens="visible", decoder_width=32)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A visible model, and the same encoder as an SSAST model."""
    folder = tmp_path_factory.mktemp("models")
    visible = build_model(replace(VISIBLE, input_frames=96), seed=1)
    save_model(visible, folder / "visible.safetensors")
    save_model(resize(visible, replace(visible.config, encoder_tokens="all")), folder / "all.safetensors")
    return folder


def test_embeddings_and_hidden_states_are_those_of_the_encoder(files):
    sound = 0.1 * np.random.default_rng(0).standard_normal(20000).astype(np.float32)
    visible, whole = (load_model(files / f"{kind}.safetensors") for kind in ("visible", "all"))
    assert visible.decoder is not None and whole.decoder is None
    np.testing.assert_array_equal(embed(visible, sound, 16000).clip, embed(whole, sound, 16000).clip)
    ours, theirs = (UpstreamExpert(files / f"{kind}.safetensors") for kind in ("visible", "all"))
    states = [each([torch.from_numpy(sound)])["hidden_states"] for each in (ours, theirs)]
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))
    trained = [name for name, parameter in ours.model.named_parameters() if parameter.requires_grad]
    assert not [name for name in trained if name.startswith(("decoder", "class_head", "recon_head"))]


def test_every_export_says_which_kind_it_is(files, tmp_path, caplog):
    for kind in ("visible", "all"):
        model = load_model(files / f"{kind}.safetensors")
        for out in ("x.safetensors", "x.pth", "x"):
            said = export_model(model, tmp_path / kind / out)
            assert said.endswith(f"; encoder_tokens: {kind}"), said
        assert load_model(tmp_path / kind / "x.safetensors").config == model.config
        assert load_model(tmp_path / kind / "x.pth").config.encoder_tokens == kind
        config = json.loads((tmp_path / kind / "x" / "config.json").read_text())
        assert config["pretraining_encoder_tokens"] == kind
        assert from_hf(tmp_path / kind / "x").config.encoder_tokens == kind
        assert describe(model)["model"]["encoder_tokens"] == kind
        assert not [name for name in FromWaveform(model).state_dict() if "decoder" in name or "head" in name]
    assert "the file holds the encoder alone" in caplog.text


def test_an_imported_encoder_is_refused_as_a_start_of_pretraining_by_name(files, tmp_path):
    """It has no heads; what says so names the file."""
    from ssast.engine.config import load_config
    from ssast.engine.errors import UserError
    from ssast.engine.pretrain import start_model

    model = load_model(files / "visible.safetensors", input_frames=96)
    save_model(model, tmp_path / "x.pth", format="official")
    config = load_config("ssast-tiny-patch-400-visible", [f"model.init_from={tmp_path / 'x.pth'}"])
    with pytest.raises(UserError, match=r"x\.pth"):
        start_model(config)


def test_the_line_of_a_start_from_the_other_kind(files):
    from ssast.engine.config import load_config
    from ssast.engine.pretrain import start_model

    said: list[str] = []
    model = build_model(load_config("ssast-tiny-patch-400").architecture)
    save_model(model, files / "tiny.safetensors")
    config = load_config(
        "ssast-tiny-patch-400-visible", [f"model.init_from={files / 'tiny.safetensors'}", "model.decoder_width=128"]
    )
    started = start_model(config, said.append)
    assert torch.equal(started.blocks[3].mlp.fc1.weight, model.blocks[3].mlp.fc1.weight)
    assert said == [
        f"{files / 'tiny.safetensors'}: the encoder's weights are taken (encoder_tokens all -> visible); freshly "
        "initialised: decoder, class_head, recon_head; left behind: embedding.mask_token, class_head, recon_head"
    ]
