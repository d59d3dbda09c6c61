"""Exported models compute what the engine computes, from the same waveforms, in processes that know nothing of the
engine.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from ssast.engine import SSAST, ModelConfig, load_model, save_model
from ssast.engine.errors import UserError
from ssast.engine.inference.embed import embed
from ssast.engine.inference.export import export_model, from_hf, input_samples, main
from ssast.engine.inference.export import hf as hf_export
from ssast.engine.model.adapt import build_model
from ssast.engine.model.config import ModelCard
from ssast.kernels import fbank

try:
    import torchaudio  # noqa: F401
except OSError:  # made for another torch; transformers would stumble over it
    sys.modules["torchaudio"] = None
except ImportError:
    pass
hf_export.hide_namesake()  # tests import transformers themselves
HIDE_TORCHAUDIO = "import sys; sys.modules['torchaudio'] = None; " if sys.modules.get("torchaudio") is None else ""

# Largest deviations allowed, of outputs up to 3 in size; docs/export.md quotes them.
STOCK_CLASS = 5e-5  # one epsilon of transformers' class differs
OWN_CLASS = 2e-5
TOKENS = 1e-4
ONNX = 5e-5
FEATURES = 5e-4

SMALL = {"width": 64, "depth": 2, "heads": 2, "input_frames": 98}
FINETUNED = {**SMALL, "num_classes": 5, "pretraining_heads": False}


def trained(config: ModelConfig, card: ModelCard) -> SSAST:
    """No parameter at its initial value of zero or one."""
    model, r = build_model(config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=r))
    model.card = card
    return model.eval()


def clips(samples: int) -> list[np.ndarray]:
    """Shorter than the window of that many samples, just as long, and longer: noise that fades, silence, a tone beside
    a DC offset.
    """
    r = np.random.default_rng(0)
    noise = 0.3 * r.standard_normal(samples + 9000) * np.exp(-np.arange(samples + 9000) / 4000)
    noise[samples // 2 : samples // 2 + 2000] = 0.0
    tone = 0.2 + 0.5 * np.sin(2 * np.pi * 440 * np.arange(samples) / 16000)
    return [each.astype(np.float32) for each in (noise[: samples // 3], tone, noise)]


def ours(model: SSAST, clip: np.ndarray) -> dict[str, torch.Tensor]:
    config, card = model.config, model.card
    features = fbank(
        torch.from_numpy(clip)[None],
        sample_rate=card.sample_rate,
        num_mel_bins=config.num_mel_bins,
        num_frames=config.input_frames,
        mean=card.mean,
        std=card.std,
    )
    with torch.no_grad():
        tokens = model.encode(features)
        if config.num_classes is not None:
            return {"logits": model.classify(features), "tokens": tokens}
        return {
            "embedding": embed(model, clip[: input_samples(model)], card.sample_rate).clip[0][None],
            "tokens": tokens,
        }


def in_fresh_process(code: str, *arguments: Path | str, home: Path) -> None:
    environment = dict(os.environ) | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


# --- Hugging Face -----------------------------------------------------------------------------------------------------

HF_MODELS = {
    "stock": (
        ModelConfig(**FINETUNED, stride=(10, 12)),
        ModelCard(pool="cls", mean=-5.0, std=3.5, labels=tuple("vwxyz")),
    ),
    "own": (
        ModelConfig(**FINETUNED, num_mel_bins=80, stride=(10, 10)),
        ModelCard(labels=tuple("vwxyz"), multi_label=True),
    ),
    "tokens": (ModelConfig(**SMALL), ModelCard()),
}

THEIR_SIDE = (
    HIDE_TORCHAUDIO
    + """
import json, sys
from pathlib import Path
import numpy as np, torch
from transformers import ASTForAudioClassification, ASTModel, AutoFeatureExtractor, AutoModel
from transformers import AutoModelForAudioClassification, pipeline
folder = Path(sys.argv[1])
waves = [value for _, value in sorted(np.load(folder / "waves.npz").items())]
results = {}
for name in ("stock", "own", "tokens"):
    extractor = AutoFeatureExtractor.from_pretrained(folder / name)
    if name == "tokens":
        model = AutoModel.from_pretrained(folder / name)
        assert type(model) is ASTModel
    else:
        model = AutoModelForAudioClassification.from_pretrained(folder / name, trust_remote_code=name == "own")
        assert isinstance(model, ASTForAudioClassification)
        assert (type(model) is ASTForAudioClassification) == (name == "stock")
    for number, wave in enumerate(waves):
        values = extractor(wave, sampling_rate=16000, return_tensors="pt")["input_values"]
        with torch.no_grad():
            output = model(values)
        results[f"{name}{number}"] = (output.last_hidden_state if name == "tokens" else output.logits).numpy()
try:
    AutoModelForAudioClassification.from_pretrained(folder / "own", trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise AssertionError("read with the other pooling, and nobody was told")
pipe = pipeline("audio-classification", model=str(folder / "own"), trust_remote_code=True)
results["pipeline"] = json.dumps(pipe({"raw": waves[0], "sampling_rate": 16000}, top_k=5))
assert not [name for name in sys.modules if name.split(".")[0] == "ssast"]
np.savez(folder / "results.npz", **results)
"""
)


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    for name, (config, card) in HF_MODELS.items():
        export_model(trained(config, card), folder / name)
    return folder


@pytest.mark.slow
def test_transformers_gives_the_same_from_the_same_waveform(hf_folder, capsys):
    waves = clips(input_samples(trained(*HF_MODELS["stock"])))
    np.savez(hf_folder / "waves.npz", *waves)
    in_fresh_process(THEIR_SIDE, hf_folder, home=hf_folder)
    theirs = np.load(hf_folder / "results.npz")
    for name, tolerance in (("stock", STOCK_CLASS), ("own", OWN_CLASS), ("tokens", TOKENS)):
        model = trained(*HF_MODELS[name])
        wanted = [ours(model, wave)["tokens" if name == "tokens" else "logits"].numpy() for wave in waves]
        worst = max(np.abs(theirs[f"{name}{number}"] - each).max() for number, each in enumerate(wanted))
        assert worst <= tolerance, name
        assert np.abs(wanted[0] - wanted[1]).max() > 100 * tolerance, name  # the clips are told apart
        with capsys.disabled():
            print(f"\n{name}: {worst:.1e} of {max(np.abs(each).max() for each in wanted):.1f}", end="")
    probabilities = ours(trained(*HF_MODELS["own"]), waves[0])["logits"][0].sigmoid()
    for row in json.loads(str(theirs["pipeline"])):
        assert row["score"] == pytest.approx(probabilities["vwxyz".index(row["label"])].item(), abs=1e-5)


def test_features_of_real_audio(real_audio, hf_folder, capsys):
    """transformers' extractor, with torchaudio or without, against the engine's filter bank: normalised log-mel."""
    from transformers import ASTFeatureExtractor

    extractor = ASTFeatureExtractor.from_pretrained(hf_folder / "tokens")
    worst = 0.0
    for file in sorted((real_audio / "esc10").glob("*.flac"))[::20]:
        clip, rate = soundfile.read(file, dtype="float32")
        theirs = extractor(clip, sampling_rate=rate, return_tensors="pt")["input_values"]
        mine = fbank(torch.from_numpy(clip)[None], num_frames=98, mean=ModelCard().mean, std=ModelCard().std)
        worst = max(worst, (theirs - mine).abs().max().item())
    assert 0 < worst <= FEATURES
    with capsys.disabled():
        print(f"\nfeatures: {worst:.1e}", end="")


@pytest.mark.parametrize("name", list(HF_MODELS))
def test_hf_folder_comes_back_bit_for_bit(hf_folder, tmp_path, name):
    model, again = trained(*HF_MODELS[name]), from_hf(hf_folder / name)
    assert again.card == model.card and again.config == replace(model.config, pretraining_heads=False)
    for key, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    assert cli_export(hf_folder / name, tmp_path / "x.safetensors") == 0
    assert load_model(tmp_path / "x.safetensors", num_classes=7).config.num_classes == 7  # to fine-tune further


def cli_export(model: Path, out: Path, *options: str) -> int:
    return main([str(model), "--out", str(out), *options])


def test_models_made_by_transformers_are_read(tmp_path):
    """As MIT's checkpoints are: an epsilon of 1e-12, features of another mean; and one without biases of q, k and v."""
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

    size = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "max_length": 98,
    }
    for qkv_bias in (True, False):
        config = ASTConfig(
            **size, qkv_bias=qkv_bias, id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2}
        )
        theirs = ASTForAudioClassification(config).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
        theirs.save_pretrained(tmp_path / "theirs")
        ASTFeatureExtractor(max_length=98, do_normalize=False).save_pretrained(tmp_path / "theirs")
        model = from_hf(tmp_path / "theirs")
        assert model.card == ModelCard(
            mean=0.0, std=0.5, labels=("a", "b", "c"), pool="cls"
        ) and model.config.stride == (10, 10)
        features = torch.randn(2, 98, 128, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.testing.assert_close(model.classify(features), theirs(features).logits, atol=STOCK_CLASS, rtol=0)
    described = tmp_path / "theirs" / "config.json"
    whole = json.loads(described.read_text())
    described.write_text(json.dumps(whole | {"id2label": {"0": "a", "1": "b", "3": "c"}}))
    with pytest.raises(UserError, match="but not number 2: number all classes"):
        from_hf(tmp_path / "theirs")
    described.write_text(json.dumps(whole))
    (tmp_path / "theirs" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="transformers cannot load it"):
        from_hf(tmp_path / "theirs")
    with pytest.raises(UserError, match="not a Hugging Face AST folder"):
        from_hf(tmp_path)


@pytest.mark.parametrize(
    ("config", "card", "reason"),
    [
        (
            {"patch_shape": (128, 2), "stride": (128, 2)},
            ModelCard(),
            "square patches .* 128x2; export to onnx or torch-export instead",
        ),
        ({**FINETUNED, "layer_weights": True}, ModelCard(), "a weighted sum of all"),
        ({}, ModelCard(sample_rate=8000), "frames for 16000 Hz"),
    ],
)
def test_what_has_no_equal_in_transformers_is_refused(tmp_path, config, card, reason):
    with pytest.raises(UserError, match=reason):
        export_model(trained(ModelConfig(**(SMALL | config)), card), tmp_path / "x", "hf")
    assert not list(tmp_path.iterdir())


# --- graphs -----------------------------------------------------------------------------------------------------------

SHALLOW = {**SMALL, "depth": 1}
GRAPHS = {
    "patch": (
        ModelConfig(**SHALLOW, num_classes=5, pretraining_heads=False, stride=(10, 10), layer_weights=True),
        ModelCard(labels=tuple("vwxyz")),
    ),
    "frame": (
        ModelConfig(**SHALLOW, patch_shape=(128, 2), stride=(128, 2)),
        ModelCard(sample_rate=8000, mean=-6.0),
    ),
}

TORCH_SIDE = """
import json, sys
from pathlib import Path
import torch
folder = Path(sys.argv[1])
for name in ("patch", "frame"):
    extra = {"card.json": ""}
    program = torch.export.load(folder / f"{name}.pt2", extra_files=extra).module()
    cases = torch.load(folder / f"{name}.pt")
    assert json.loads(extra["card.json"])["input_samples"] == cases[0][0].shape[1]
    for waveform, lengths, wanted in cases:
        got = program(waveform, lengths)
        got = got if isinstance(got, tuple) else (got,)
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=5e-5, rtol=0)
assert not [name for name in sys.modules if name.split(".")[0] in ("ssast", "transformers")]
"""


def graph_cases(model: SSAST) -> list[tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]]:
    """Batches of three and of one, with garbage behind the ends of clips, and what the engine makes of each clip by
    itself.
    """
    samples = input_samples(model)
    lengths = torch.tensor([samples // 3, samples, 500])
    waveform = torch.full((3, samples), 0.7)
    for row, length, clip in zip(waveform, lengths, clips(samples), strict=True):
        row[:length] = torch.from_numpy(clip[:length])
    names = ("embedding", "tokens") if model.config.num_classes is None else ("logits",)
    alone = [ours(model, row[:length].numpy()) for row, length in zip(waveform, lengths, strict=True)]
    wanted = tuple(torch.cat([each[name] for each in alone]) for name in names)
    return [(waveform, lengths, wanted), (waveform[:1], lengths[:1], tuple(each[:1] for each in wanted))]


@pytest.mark.slow
def test_torch_export_runs_without_the_engine(tmp_path):
    for name, (config, card) in GRAPHS.items():
        model = trained(config, card)
        export_model(model, tmp_path / f"{name}.pt2")
        torch.save(graph_cases(model), tmp_path / f"{name}.pt")
    in_fresh_process(TORCH_SIDE, tmp_path, home=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(GRAPHS))
def test_onnx(tmp_path, capsys, name):
    import onnx
    import onnxruntime

    model = trained(*GRAPHS[name])
    save_model(model, tmp_path / "x.safetensors")
    assert cli_export(tmp_path / "x.safetensors", tmp_path / "x.onnx") == 0
    assert "in onnxruntime" in capsys.readouterr().out
    proto = onnx.load(tmp_path / "x.onnx")
    assert (
        {node.domain for node in proto.graph.node} == {""}
        and not proto.functions
        and sorted(os.listdir(tmp_path))
        == [
            "x.onnx",
            "x.safetensors",
        ]
    )
    card = json.loads({prop.key: prop.value for prop in proto.metadata_props}["ssast"])
    assert card["sample_rate"] == model.card.sample_rate and card["labels"] == (
        list("vwxyz") if name == "patch" else None
    )
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    worst = 0.0
    for waveform, lengths, wanted in graph_cases(model):
        got = session.run(None, {"waveform": waveform.numpy(), "lengths": lengths.numpy()})
        worst = max(worst, *(np.abs(one - other.numpy()).max() for one, other in zip(got, wanted, strict=True)))
        assert [each.name for each in session.get_outputs()] == (
            ["logits"] if name == "patch" else ["embedding", "tokens"]
        )
        # without lengths, what lies behind the ends counts
        whole = session.run(None, {"waveform": waveform.numpy()})[0]
        full = ours(model, waveform[0].numpy())
        worst = max(worst, np.abs(whole[0] - next(iter(full.values()))[0].numpy()).max())
        assert np.abs(whole[0] - got[0][0]).max() > 100 * ONNX
        too_short = session.run(None, {"waveform": waveform.numpy(), "lengths": np.zeros(len(waveform), np.int64)})
        # all silence alike
        assert all(np.isfinite(each).all() and np.ptp(each, axis=0).max() == 0 for each in too_short)
    assert worst <= ONNX
    with capsys.disabled():
        print(f"\nonnx, {name}: {worst:.1e}", end="")


# --- files ------------------------------------------------------------------------------------------------------------


def test_nothing_is_lost(tmp_path, monkeypatch):
    model = trained(*HF_MODELS["stock"])
    source = tmp_path / "x.safetensors"
    export_model(model, source)
    assert cli_export(source, tmp_path / "x.pth", "--stride", "10", "12") == 0
    assert load_model(source).card == model.card and load_model(source).config == model.config
    for again in (load_model(source), load_model(tmp_path / "x.pth", heads=2, stride=(10, 12))):
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
    with pytest.raises(UserError, match=r"x.pth: is there already; --force"):
        cli_export(source, tmp_path / "x.pth")
    with pytest.raises(UserError, match="its suffix tells no format"):
        export_model(model, tmp_path / "x.bin")
    with pytest.raises(UserError, match="is a file; hf is a folder"):
        export_model(model, source, "hf", force=True)
    folder = tmp_path / "hf"
    export_model(model, folder)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(UserError, match="is there already"):
        export_model(model, folder)
    export_model(model, folder, force=True)
    assert (folder / "model.safetensors").stat().st_mtime_ns > before
    with pytest.raises(UserError, match="is a folder; onnx is one file"):
        export_model(model, folder, "onnx", force=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds more than an exported model"):
        export_model(model, folder, force=True)
    monkeypatch.setattr(hf_export, "NORM_EPS", 0.5)
    with pytest.raises(UserError, match=r"differs by .* nothing was written"):
        export_model(model, tmp_path / "wrong")
    assert sorted(os.listdir(tmp_path)) == ["hf", "x.pth", "x.safetensors"]
    assert (folder / "notes.txt").read_text() == "mine"


def test_missing_libraries_are_named(tmp_path, monkeypatch):
    model = trained(*GRAPHS["patch"])
    for module, out in (("transformers", "x"), ("onnxscript", "x.onnx")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=f"pip install .*{module}"):
            export_model(trained(*HF_MODELS["tokens"]) if out == "x" else model, tmp_path / out)
    assert not list(tmp_path.iterdir()) and importlib.metadata.version("transformers")
