"""Weights that do not fit are errors that name what is wrong; what fits comes back bit for bit."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from ssast.engine import ModelConfig, load_model, save_model
from ssast.engine.errors import UserError
from ssast.engine.model.adapt import build_model, resize_position
from ssast.engine.model.config import ModelCard
from ssast.engine.model.ssast import unpatchify
from ssast.kernels import patchify

PATCH = ModelConfig(width=128, heads=2, depth=2, input_frames=64)
FRAME = ModelConfig(width=128, heads=2, depth=2, input_frames=64, patch_shape=(128, 2), stride=(128, 2))
VISIBLE = replace(PATCH, encoder_tokens="visible", decoder_width=64)


def official(tmp_path, config=PATCH, **changes):
    """An official file with tensors replaced (None: left out)."""
    path = tmp_path / "official.pth"
    save_model(build_model(config), path, format="official")
    tensors = torch.load(path, weights_only=True)
    for key, value in changes.items():
        name = "module." + key.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    torch.save(tensors, path)
    return path


@pytest.mark.parametrize(
    "config",
    [PATCH, FRAME, VISIBLE, ModelConfig(width=128, heads=4, num_classes=3, pretraining_heads=False, stride=(10, 10))],
)
def test_safetensors_round_trip(tmp_path, config):
    model = build_model(config, seed=4)
    save_model(model, tmp_path / "m.safetensors")
    again = load_model(tmp_path / "m.safetensors")
    assert again.config == config and not again.training
    for key, value in model.state_dict().items():
        assert again.state_dict()[key].equal(value), key
    assert not list(tmp_path.glob(".*"))


def test_a_visible_model_goes_into_an_official_file_as_its_encoder(tmp_path):
    """With the input it was trained on, which the official fine-tuning asks for; it comes back as what it is."""
    model = build_model(VISIBLE, seed=4)
    save_model(model, tmp_path / "m.pth", format="official")
    tensors = torch.load(tmp_path / "m.pth", weights_only=True)
    assert int(tensors["module.p_input_tdim"]) == 64 and not [key for key in tensors if "pred" in key or "mask" in key]
    again = load_model(tmp_path / "m.pth")
    assert again.config == replace(VISIBLE, pretraining_heads=False, decoder_width=None) and again.decoder is None
    features = torch.randn(2, 64, 128)
    assert torch.equal(again.encode(features), model.encode(features))
    tuned = load_model(tmp_path / "m.pth", num_classes=3)
    assert tuned.config.encoder_tokens == "visible" and tuned.classify(features).shape == (2, 3)


def test_the_card_goes_with_the_weights(tmp_path):
    """And other people can read the file, as they can any other."""
    card = ModelCard(8000, -3.0, 2.0, ("a", "b"), True, "cls")
    model = build_model(replace(PATCH, num_classes=2, pretraining_heads=False))
    model.card = card
    save_model(model, tmp_path / "x.safetensors")
    assert load_model(tmp_path / "x.safetensors").card == card
    assert load_model(tmp_path / "x.safetensors", num_classes=3).card == replace(card, labels=None, multi_label=False)
    (tmp_path / "plain").touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_official_without_module_prefix(tmp_path):
    path = official(tmp_path)
    torch.save({key.removeprefix("module."): value for key, value in torch.load(path, weights_only=True).items()}, path)
    assert load_model(path).config == PATCH


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"v__norm__weight": None}, "missing v.norm.weight"),
        ({"mask_embed": None}, "missing mask_embed"),
        (
            {"v__blocks__0__mlp__fc1__weight": torch.zeros(3, 3)},
            r"v.blocks.0.mlp.fc1.weight is \[3, 3\], the model needs \[512, 128\]",
        ),
        ({"v__blocks__7__norm1__bias": torch.zeros(128)}, "missing v.blocks.2.norm1.weight"),
        ({"v__pos_embed": torch.zeros(1, 9, 128)}, r"v.pos_embed is \[1, 9, 128\], the model needs \[1, 34, 128\]"),
        ({"surplus": torch.zeros(1)}, "unexpected surplus"),
        ({"v__dist_token": None}, "no v.dist_token"),
        ({"v__pos_embed": None}, "not an official SSAST checkpoint"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load_model(official(tmp_path, **changes))


def test_files_that_are_no_checkpoint(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    contents = {"text.pth": b"hello", "empty.pth": b"", "evil.pth": pickle.dumps({"module.x": Evil()}), "cut.pth": None}
    whole = official(tmp_path).read_bytes()
    for name, content in contents.items():
        (tmp_path / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
        with pytest.raises(UserError, match=name):
            load_model(tmp_path / name)
    save_model(build_model(PATCH), tmp_path / "m.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "m.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_model(tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match="no such file"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match="neither a checkpoint"):
        load_model(tmp_path)


def test_evil_pickles_do_not_run(tmp_path, capsys):
    test_files_that_are_no_checkpoint(tmp_path)
    assert "executed" not in capsys.readouterr().out


def test_heads_must_be_known_and_right(tmp_path):
    narrow = ModelConfig(width=96, heads=3, depth=1, input_frames=64)
    with pytest.raises(UserError, match="heads="):
        load_model(official(tmp_path, narrow))
    assert load_model(official(tmp_path, narrow), heads=3).config == narrow
    save_model(build_model(narrow), tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="3 attention heads, not 2"):
        load_model(tmp_path / "m.safetensors", heads=2)


def test_another_input_and_a_fresh_classifier(tmp_path):
    path = official(tmp_path)
    model = load_model(path, num_classes=7, input_frames=100, stride=10)
    assert model.config.grid == (12, 9) and not model.config.pretraining_heads
    assert model.classify(torch.randn(2, 100, 128)).shape == (2, 7)
    trained = load_model(path)
    assert model.blocks[1].mlp.fc2.weight.equal(trained.blocks[1].mlp.fc2.weight)
    assert model.embedding.weight.equal(trained.embedding.weight)
    with pytest.raises(ValueError, match=r"features must be \[B, 100, 128\].*input_frames"):
        model.classify(torch.randn(2, 64, 128))
    with pytest.raises(ValueError, match="no pretraining heads"):
        model.pretrain(torch.randn(2, 100, 128), torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(UserError, match="smaller than one patch"):
        load_model(path, input_frames=3)


def test_finetuned_official_files_say_what_they_were_made_for(tmp_path):
    for frames, stride, config in [(128, (10, 10), PATCH), (100, (128, 1), FRAME), (128, (16, 16), PATCH)]:
        pretrained = tmp_path / "p.safetensors"
        save_model(build_model(config), pretrained)
        tuned = load_model(pretrained, num_classes=4, input_frames=frames, stride=stride)
        save_model(tuned, tmp_path / "tuned.pth", format="official")
        guessed = load_model(tmp_path / "tuned.pth")
        assert guessed.config.grid == tuned.config.grid and guessed.config.stride == stride
        told = load_model(tmp_path / "tuned.pth", input_frames=frames, stride=stride)
        assert told.config == tuned.config
        features = torch.randn(1, frames, 128)
        assert told.classify(features).equal(tuned.classify(features))
        longer = load_model(tmp_path / "tuned.pth", stride=stride, input_frames=2 * frames)
        assert longer.config.input_frames == 2 * frames and longer.config.num_classes == 4
        kept, fresh = (
            load_model(tmp_path / "tuned.pth", num_classes=4),
            load_model(tmp_path / "tuned.pth", num_classes=5),
        )
        assert kept.classifier[1].weight.equal(tuned.classifier[1].weight) and fresh.config.num_classes == 5
    with pytest.raises(UserError, match="fit neither"):
        load_model(tmp_path / "tuned.pth", stride=(7, 7))


def test_patches_and_back():
    features = torch.arange(2 * 64 * 128.0).view(2, 64, 128)
    patches = patchify(features, (16, 16), (16, 16))
    assert patches.shape == (2, 32, 256)
    # patch 5 = frequency row 1, time column 1; value 18 = mel offset 1, frame offset 2
    assert patches[1, 5, 18] == features[1, 16 + 2, 16 + 1]
    assert unpatchify(patches, (8, 4), (16, 16)).equal(features)
    assert unpatchify(patchify(features, (128, 2), (128, 2)), (1, 32), (128, 2)).equal(features)


@pytest.mark.parametrize("new", [(8, 16), (8, 9), (5, 16), (12, 16), (8, 40), (12, 9), (3, 50)])
def test_exact_resize_is_a_cut_or_a_linear_interpolation(new):
    """A position embedding that is linear in both indices stays so away from the edges, and a cut keeps the middle."""
    rows, columns = np.mgrid[0:8, 0:16]
    position = torch.from_numpy(
        np.concatenate([np.zeros((2, 2)), np.stack([rows.ravel(), columns.ravel()], axis=1)])
    ).float()
    resized = resize_position(position, (8, 16), new)[2:].view(*new, 2)
    for axis, old in ((0, 8), (1, 16)):
        got = resized.select(1 - axis, 0)[:, axis].numpy()
        if new[axis] <= old:
            expected = np.arange(new[axis]) + old // 2 - new[axis] // 2
        else:
            expected = np.clip((np.arange(new[axis]) + 0.5) * old / new[axis] - 0.5, 0, old - 1)
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_same_seed_same_weights():
    one, two, other = (
        build_model(PATCH, 1).state_dict(),
        build_model(PATCH, 1).state_dict(),
        build_model(PATCH, 2).state_dict(),
    )
    assert all(one[key].equal(two[key]) for key in one) and not one["embedding.weight"].equal(other["embedding.weight"])
