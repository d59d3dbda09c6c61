"""Checkpoints as people have them: wrapped, nested, damaged, or something else altogether."""

import argparse
import gzip
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ssast.engine import ModelConfig, load_model, save_model
from ssast.engine.errors import UserError
from ssast.engine.model.adapt import build_model
from ssast.engine.model.weights import FORMAT, save_weights

SHAPE = ModelConfig(width=64, depth=2, heads=1, input_frames=32, num_mel_bins=32)


class Evil:
    """Would print when it is unpickled."""

    def __reduce__(self):
        return (print, ("executed",))


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> dict[str, torch.Tensor]:
    """An official state dict without `module.`."""
    path = tmp_path_factory.mktemp("official") / "official.pth"
    save_model(build_model(SHAPE), path, format="official")
    return {key.removeprefix("module."): value for key, value in torch.load(path, weights_only=True).items()}


def prefixed(tensors: dict, prefix: str) -> dict:
    return {prefix + key: value for key, value in tensors.items()}


WRAPPED = {
    "compiled": lambda bare: prefixed(bare, "_orig_mod."),
    "compiled in parallel": lambda bare: prefixed(bare, "module._orig_mod."),
    "parallel, compiled": lambda bare: prefixed(bare, "_orig_mod.module."),
    "compiled blocks": lambda bare: {key.replace("blocks.1.", "blocks.1._orig_mod."): bare[key] for key in bare},
    "model": lambda bare: {"model": prefixed(bare, "module."), "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
    "state_dict": lambda bare: {"state_dict": prefixed(bare, "model."), "epoch": 3},
    "params": lambda bare: {"params": bare},
    "all of them": lambda bare: {"params": {"model": {"state_dict": prefixed(bare, "net.module._orig_mod.")}}},
    "NumPy arrays": lambda bare: {"model": {key: value.numpy() for key, value in bare.items()}},
    "NumPy scalars": lambda bare: {
        "model": bare,
        "best": np.float64(0.5),
        "step": np.int64(3),
        "half": np.float16(1),
        "flag": np.bool_(True),
        "curve": np.arange(3.0),
        "args": argparse.Namespace(lr=1e-3),
    },
    "a number beside them": lambda bare: bare | {"epoch": 3},
}


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("how", WRAPPED)
def test_wrapped_checkpoints_are_the_model(bare, tmp_path, how, is_zip):
    path = tmp_path / "wrapped.pth"
    torch.save(WRAPPED[how](bare), path, _use_new_zipfile_serialization=is_zip)
    expected = build_model(SHAPE).state_dict()
    loaded = load_model(path).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda bare: {"model": bare, "ema": bare}, "several models"),
        (lambda bare: bare | prefixed(bare, "_orig_mod."), "twice, wrapped and plain"),
        (lambda bare: prefixed(bare, "module.") | {"loss.weight": torch.ones(1)}, "unexpected loss.weight"),
        (lambda bare: {"model": bare, "callback": Evil()}, r"run code \((builtins\.|__builtin__\.)?print\)"),
        (lambda bare: {"a": torch.ones(1)}, "not an official SSAST checkpoint"),
        (lambda bare: [torch.ones(1)], "not an official SSAST checkpoint"),
        (lambda bare: {"model": build_model(SHAPE).state_dict()}, "ssast.engine.save_model"),
        (lambda bare: bare | {"p_input_tdim": torch.tensor(10**12)}, "does not fit the model: v.pos_embed"),
        (lambda bare: bare | {"p_input_tdim": torch.ones(2)}, "describe no model"),
        (lambda bare: bare | {"v.blocks.999999999.norm1.bias": torch.zeros(64)}, "missing v.blocks.2"),
        (lambda bare: bare | {"v.norm.bias": torch.full((64,), float("nan"))}, "v.norm.bias holds 64 of 64 values"),
        (lambda bare: bare | {"mask_embed": torch.full((1, 1, 64), float("inf"))}, "mask_embed holds 64 of 64"),
        (lambda bare: bare | {"v.norm.bias": torch.zeros(64).to_sparse()}, "v.norm.bias is sparse"),
    ],
)
def test_checkpoints_that_are_no_model_are_refused(bare, tmp_path, content, message, capsys):
    path = tmp_path / "other.pth"
    torch.save(content(bare), path)
    with pytest.raises(UserError, match=message) as refused:
        load_model(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "executed" not in capsys.readouterr().out


FOREIGN = {
    "web page": b"\n<!DOCTYPE html><html><body>404</body></html>",
    "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
    "zeros": bytes(3 << 20),
    "empty": b"",
    "text file": b"hello\n",
    "JSON": b'{"a": 1}',
    "gzip": gzip.compress(b"x"),
    "run code": pickle.dumps({"module.x": Evil()}),
    "damaged": pickle.dumps({"a": 1}, protocol=2)[:-3],
    "no checkpoint of PyTorch": bytes(range(1, 256)) * 20,
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_other_files_are_called_what_they_are(tmp_path, kind, suffix, capsys):
    path = tmp_path / f"file{suffix}"
    path.write_bytes(FOREIGN[kind])
    with pytest.raises(UserError, match=kind) as refused:
        load_model(path)
    assert "\n" not in str(refused.value)
    assert "executed" not in capsys.readouterr().out


def test_cut_and_damaged_files(bare, tmp_path):
    path = tmp_path / "whole.pth"
    torch.save(bare, path)
    save_model(build_model(SHAPE), tmp_path / "whole.safetensors")
    for file in (path, tmp_path / "whole.safetensors"):
        whole = file.read_bytes()
        for length in (9, 500, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:length])
            with pytest.raises(UserError, match=r"damaged|text file|nothing but zeros"):
                load_model(file)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "x")
    with pytest.raises(UserError, match=r"zip archive of notes\.txt"):
        load_model(path)


def described(path: Path, **metadata: str) -> Path:
    """A file of ours with other metadata."""
    save_model(build_model(SHAPE), path)
    weights = load_file(path)
    size = struct.unpack("<Q", path.read_bytes()[:8])[0]
    kept = json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]
    save_file(weights, path, metadata={k: v for k, v in (kept | metadata).items() if v != "absent"})
    return path


CONFIG = {"width": 64, "depth": 2, "heads": 1, "input_frames": 32, "num_mel_bins": 32}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"config": "absent"}, "describe no model"),
        ({"config": "not JSON"}, "describe no model"),
        ({"config": "[]"}, "describe no model"),
        ({"config": "[" * 100_000}, "describe no model"),
        ({"config": json.dumps(CONFIG | {"width": "64"})}, "width: Input should be a valid integer"),
        ({"config": json.dumps(CONFIG | {"heads": 0})}, "heads must be at least 1"),
        ({"config": json.dumps(CONFIG | {"depth": 10**9})}, "say 1000000000 blocks, it holds 2"),
        (
            {"config": json.dumps(CONFIG | {"encoder_tokens": "visible", "decoder_depth": 10**9})},
            r"say 1000000000 decoder\.blocks, it holds 0",
        ),
        ({"config": json.dumps(CONFIG | {"encoder_tokens": 3})}, "encoder_tokens"),
        ({"config": json.dumps(CONFIG | {"depth": 1e9})}, "depth: Input should be a valid integer"),
        ({"config": json.dumps(CONFIG | {"depth": -1})}, "depth must be at least 0"),
        ({"config": json.dumps(CONFIG | {"input_frames": 10**15})}, "embedding.position is|describe no model"),
        ({"config": json.dumps(CONFIG | {"mlp_ratio": 10**15})}, "mlp.fc1.weight is|describe no model"),
        ({"config": json.dumps(CONFIG | {"stride": [1, 2, 3]})}, "stride"),
        ({"config": json.dumps(CONFIG | {"depht": 2})}, "unknown 'depht'"),
        ({"card": '{"std": NaN}'}, "mean and std"),
        ({"card": '{"std": 0}'}, "mean and std"),
        ({"card": '{"pool": "max"}'}, "pool"),
        ({"card": '{"labels": [1, 2]}'}, "labels"),
        ({"card": '{"labels": ["a", "b"]}'}, "names 2 classes, its model has 0"),
        ({"card": '{"sample_rate": "16000"}'}, "sample_rate"),
        ({"format": "absent"}, "not written by this engine"),
    ],
)
def test_metadata_that_describe_no_model(tmp_path, metadata, message):
    with pytest.raises(UserError, match=message) as refused:
        load_model(described(tmp_path / "m.safetensors", **metadata))
    assert "\n" not in str(refused.value)


def test_weights_of_ours_are_checked_and_unwrapped(tmp_path):
    path = described(tmp_path / "m.safetensors")
    assert load_model(path).config == SHAPE
    model = torch.compile(build_model(SHAPE))
    save_model(model, path)  # its names begin with _orig_mod.
    assert torch.equal(load_model(path).norm.weight, model.norm.weight)
    for prefix in ("module.", "_orig_mod.module.", "net.model."):
        save_weights(prefixed(build_model(SHAPE, 1).state_dict(), prefix), build_model(SHAPE), path)
        assert torch.equal(load_model(path).embedding.weight, build_model(SHAPE, 1).embedding.weight), prefix
    broken = build_model(SHAPE)
    with torch.no_grad():
        broken.blocks[1].mlp.fc1.bias[3] = float("nan")
    save_model(broken, path)
    with pytest.raises(UserError, match=r"blocks.1.mlp.fc1.bias holds 1 of 256 values that are NaN"):
        load_model(path)
    assert FORMAT.encode() in path.read_bytes()


def test_files_that_are_zeros_from_the_middle_on(tmp_path):
    path = tmp_path / "m.safetensors"
    save_model(build_model(SHAPE), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    with pytest.raises(
        UserError, match=r"blocks\.\d\.\S+\.weight is nothing but zeros: .* half-downloaded; fetch it again$"
    ):
        load_model(path)


@pytest.mark.parametrize("format", ["safetensors", "official"])
@pytest.mark.parametrize("name", ["embedding.weight", "blocks.1.attn.proj.weight", "blocks.0.mlp.fc2.weight"])
def test_weights_of_zeros_are_refused(tmp_path, format, name):
    model = build_model(SHAPE)
    for vector in model.parameters():
        if vector.dim() == 1:
            torch.nn.init.zeros_(vector)  # may well be
    save_model(model, tmp_path / "m", format=format)
    load_model(tmp_path / "m")
    torch.nn.init.zeros_(model.get_parameter(name))
    save_model(model, tmp_path / "m", format=format)
    leaf = {"embedding.weight": r"(embedding|proj)\.weight"}.get(name, r"\.".join(name.split(".")[-2:]))
    with pytest.raises(UserError, match=f"{leaf} is nothing but zeros"):
        load_model(tmp_path / "m")


def test_a_missing_checkpoint_names_its_twin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(build_model(SHAPE), "best.safetensors")
    with pytest.raises(UserError, match=r"Best.safetensors: no such file or folder: there is .*/best.safetensors, in"):
        load_model("Best.safetensors")


def test_hugging_face_folders_are_named(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "audio-spectrogram-transformer"}')
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(UserError, match="ssast export"):
            load_model(path)
    monkeypatch.setenv("HOME", str(tmp_path))
    save_model(build_model(SHAPE), "~/other.safetensors")
    assert os.listdir(tmp_path).count("other.safetensors") == 1
    assert load_model("~/other.safetensors").config == SHAPE


def test_a_copy_beside_the_checkpoints_is_passed_over(tmp_path):
    for seed, name in enumerate(("step-9", "step-10", "step-10-copy", "step-x")):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        save_model(build_model(SHAPE, seed), tmp_path / "checkpoints" / name / "model.safetensors")
    assert torch.equal(load_model(tmp_path).embedding.weight, build_model(SHAPE, 1).embedding.weight)
