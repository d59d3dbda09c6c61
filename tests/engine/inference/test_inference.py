"""`embed` and `predict` against what they are made of: features, tokens, and windows put together by hand."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from ssast.engine import load_model
from ssast.engine.inference.embed import embed
from ssast.engine.inference.inference import features_of, hidden_states
from ssast.engine.inference.predict import class_encoder, predict
from ssast.engine.inference.windows import Window, embedding_windows, prediction_windows, read_windows
from ssast.engine.model.adapt import build_model
from ssast.engine.model.config import ModelCard, ModelConfig
from ssast.kernels import fbank
from ssast.kernels.fbank import count_frames

RATE = 16000
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}  # of float32 sums in another order


def small(frames=64, stride=(16, 16), shape=(16, 16), classes=None, card=None, **kwargs):
    config = ModelConfig(
        width=32,
        depth=2,
        heads=2,
        input_frames=frames,
        patch_shape=shape,
        stride=stride,
        num_classes=classes,
        pretraining_heads=False,
        **kwargs,
    )
    model = build_model(config, seed=3).eval()
    with torch.no_grad():  # far from symmetric, so that a wrong place or order shows
        model.embedding.position.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
        for block in model.blocks:
            block.attn.qkv.weight.mul_(8)
    model.card = card or ModelCard(mean=-5.0, std=3.0)
    return model


def noise(samples, seed=0, channels=None):
    """Sound that changes all the time."""
    shape = (samples,) if channels is None else (channels, samples)
    rng = np.random.default_rng(seed)
    envelope = np.repeat(rng.uniform(0.01, 0.5, -(-samples // 1600)), 1600)[:samples]
    return (rng.standard_normal(shape) * envelope).astype(np.float32)


def window_samples(model):
    return 400 + 160 * (model.config.input_frames - 1)


@torch.no_grad()
def tokens_at(model, wave, start):
    """[f, t, D] of the window from frame `start` on, and how many of its frames are sound: by the definitions."""
    part = torch.from_numpy(wave[start * 160 : start * 160 + window_samples(model)].copy())
    normal = {"mean": model.card.mean, "std": model.card.std}
    features = fbank(part[None], num_frames=model.config.input_frames, num_mel_bins=model.config.num_mel_bins, **normal)
    return model.encode(features)[0, 2:].unflatten(0, model.config.grid), min(
        count_frames(len(part), RATE), model.config.input_frames
    )


def by_hand(model, wave, hop_steps):
    """[G, f, D]: every step is the mean of the windows that hold it; windows until the sound ends, the last one at its
    end.
    """
    stride, total = model.config.stride[1], count_frames(len(wave), RATE)
    starts, frames = [0], model.config.input_frames
    while starts[-1] + frames < total:
        starts.append(starts[-1] + hop_steps * stride)
    if total > frames:
        starts[-1] = -(-(total - frames) // stride) * stride
    found = {}
    for start in starts:
        tokens, sound = tokens_at(model, wave, start)
        for step in range(model.config.grid[1]):
            if step * stride < sound:
                found.setdefault(start // stride + step, []).append(tokens[:, step])
    assert sorted(found) == list(range(len(found)))
    return torch.stack([torch.stack(found[step]).mean(dim=0) for step in sorted(found)])


def test_one_window_is_the_mean_of_its_tokens():
    model = small()
    wave = noise(window_samples(model))
    features = fbank(torch.from_numpy(wave)[None], num_frames=64, mean=-5.0, std=3.0)
    with torch.no_grad():
        tokens = model.encode(features)
    found = embed(model, wave, RATE, tokens=True)
    assert found.clip.dtype == torch.float32 and found.clip.shape == (1, 32) and not found.clip.requires_grad
    torch.testing.assert_close(found.clip, tokens[:, 2:].mean(dim=1), **TOLERANCE)
    torch.testing.assert_close(found.tokens[0].transpose(0, 1).flatten(0, 1), tokens[0, 2:], **TOLERANCE)
    torch.testing.assert_close(found.frames, found.tokens.mean(dim=2), **TOLERANCE)
    torch.testing.assert_close(embed(model, wave, RATE, pool="cls").clip, tokens[:, :2].mean(dim=1), **TOLERANCE)
    assert found.num_frames.tolist() == [4] and found.seconds_per_frame == pytest.approx(0.16)


@pytest.mark.parametrize(
    ("options", "hop", "hop_steps"),
    [
        ({}, None, 2),
        ({}, 0.16, 1),
        ({}, 0.64, 4),
        ({"stride": (10, 10)}, None, 2),
        ({"shape": (128, 2), "stride": (128, 1)}, 0.3, 30),
    ],
)
@pytest.mark.parametrize("frames", [65, 81, 200, 263])
def test_long_clips_by_hand(options, hop, hop_steps, frames):
    model = small(**options)
    wave = noise(400 + 160 * (frames - 1) + 37, seed=frames)
    found = embed(model, wave, RATE, hop=hop, tokens=True, batch_size=3)
    expected = by_hand(model, wave, hop_steps)
    torch.testing.assert_close(found.tokens[0], expected, **TOLERANCE)
    torch.testing.assert_close(found.clip[0], expected.mean(dim=(0, 1)), **TOLERANCE)
    assert found.num_frames.tolist() == [len(expected)]
    torch.testing.assert_close(embed(model, wave, RATE, hop=hop).frames, found.frames, **TOLERANCE)


def test_blocks_of_any_size_make_the_same_windows():
    model = small()
    wave = noise(70_000)
    for windows in (embedding_windows(model, None), prediction_windows(model, 0.333)):
        whole = list(windows.cut([wave]))
        rng = np.random.default_rng(0)
        edges = np.sort(rng.choice(len(wave), 50, replace=False))
        pieces = list(windows.cut(iter(np.split(wave, edges))))
        assert [start for start, _ in pieces] == [start for start, _ in whole] and len(whole) > 9
        for start, samples in pieces:
            np.testing.assert_array_equal(samples, wave[start * 160 : start * 160 + window_samples(model)])
        assert (whole[-1][0] + 64) * 160 + 240 > len(wave) - 160  # all sound but less than a frame was heard


def test_padding_counts_only_if_asked_for():
    model = small()
    wave = noise(400 + 160 * 20)  # 21 frames: 2 of 4 steps
    tokens, _ = tokens_at(model, wave, 0)
    found = embed(model, wave, RATE)
    assert found.num_frames.tolist() == [2]
    torch.testing.assert_close(found.clip[0], tokens[:, :2].mean(dim=(0, 1)), **TOLERANCE)
    found = embed(model, wave, RATE, padding=True)
    assert found.num_frames.tolist() == [4]
    torch.testing.assert_close(found.clip[0], tokens.mean(dim=(0, 1)), **TOLERANCE)


def test_a_batch_is_its_clips_one_by_one():
    model = small()
    clips = [noise(length, seed=length) for length in (400, 5000, 12_000, 41_000, 90_000)]
    batch = embed(model, clips, RATE, batch_size=4)
    for number, clip in enumerate(clips):
        alone = embed(model, clip, RATE)
        torch.testing.assert_close(batch.clip[number], alone.clip[0], **TOLERANCE)
        steps = int(batch.num_frames[number])
        torch.testing.assert_close(batch.frames[number, :steps], alone.frames[0], **TOLERANCE)
        assert not batch.frames[number, steps:].any()
    equal = np.stack([noise(12_000, seed=seed) for seed in range(3)])
    torch.testing.assert_close(embed(model, equal, RATE).clip, embed(model, list(equal), RATE).clip)


def test_channels_types_and_tensors():
    model = small()
    stereo = noise(20_000, channels=2)
    expected = embed(model, stereo.mean(axis=0), RATE).clip
    torch.testing.assert_close(embed(model, stereo[None], RATE).clip, expected, **TOLERANCE)
    torch.testing.assert_close(embed(model, [torch.from_numpy(stereo)], RATE).clip, expected, **TOLERANCE)
    assert embed(model, stereo, RATE).clip.shape == (2, 32)  # two clips
    integers = np.rint(stereo[0] * 8192).astype(np.int16)
    expected = embed(model, integers / 32768, RATE).clip
    for other in (
        integers,
        torch.from_numpy(integers),
        integers.astype(np.int32) * 65536,
        torch.from_numpy(integers.astype(np.int64) * 65536),
        [integers.astype(np.int32) * 65536],
        torch.from_numpy(integers / 32768),
    ):
        torch.testing.assert_close(embed(model, other, RATE).clip, expected, **TOLERANCE)


def test_a_quiet_clip_has_the_scale_of_its_batch():
    model = small()
    loud, quiet = (np.rint(noise(20_000) * size).astype(np.int32) for size in (1 << 30, 1 << 20))
    together = embed(model, np.stack((loud, quiet)), RATE).clip
    torch.testing.assert_close(together[1:], embed(model, quiet / 2.0**31, RATE).clip, **TOLERANCE)
    silent = embed(model, np.zeros(20_000, np.int32), RATE).clip  # of any scale
    torch.testing.assert_close(silent, embed(model, np.zeros(20_000), RATE).clip, **TOLERANCE)


def test_resampled_sound_is_the_same_sound():
    model = small(frames=128)
    seconds = 2.0

    def sound(rate, pitch=1.0):  # below 3.3 kHz, so that every rate holds it
        time = np.arange(round(seconds * rate)) / rate
        parts = [
            np.sin(2 * np.pi * f * pitch * time + f) * (1 + np.sin(2 * np.pi * 3 * time))
            for f in (220, 733, 1510, 3130)
        ]
        return (sum(parts) / 16 + 1e-2 * np.sin(2 * np.pi * 50 * time)).astype(np.float32)

    reference = embed(model, sound(RATE), RATE).clip
    another = (embed(model, sound(RATE, 1.06), RATE).clip - reference).norm()
    for rate in (8000, 22_050, 44_100, 48_000):
        assert (embed(model, sound(rate), rate).clip - reference).norm() < (0.5 if rate == 8000 else 0.1) * another, (
            rate
        )


def test_layers():
    model = small()
    wave = noise(window_samples(model))
    with torch.no_grad():
        states = list(hidden_states(model, features_of(model, [wave])))
        torch.testing.assert_close(model.norm(states[-1]), model.encode(features_of(model, [wave])), **TOLERANCE)
    assert len(states) == 3
    for layer in (0, 1, 2, -1, -3):
        torch.testing.assert_close(
            embed(model, wave, RATE, layer=layer).clip, states[layer][:, 2:].mean(dim=1), **TOLERANCE
        )
    for layer in (3, -4):
        with pytest.raises(ValueError, match="layer must be None or from 0"):
            embed(model, wave, RATE, layer=layer)


def test_the_model_s_rate_and_statistics_count():
    wave = noise(8000)
    expected = embed(small(), wave, RATE).clip
    assert not torch.allclose(embed(small(card=ModelCard(mean=-4.0, std=3.0)), wave, RATE).clip, expected, atol=1e-3)
    half = small(card=ModelCard(sample_rate=8000, mean=-5.0, std=3.0))
    found = embed(half, noise(24_000), 8000)
    assert found.num_frames.tolist() == [
        -(-(1 + (24_000 - 200) // 80) // 16)
    ] and found.seconds_per_frame == pytest.approx(0.16)


BAD = {
    "no clips were given": [],
    "too short: 0 samples": np.zeros(0, np.float32),
    "too short: 1 samples": np.zeros(1, np.float32),
    "too short: 399 samples": np.zeros(399, np.float32),
    "clip 1: too short": [np.zeros(400, np.float32), np.zeros(10, np.float32)],
    "NaN or infinite samples .2": np.array([0.0] * 500 + [np.nan, np.inf], np.float32),
    "clip 1: NaN": [np.zeros(500), np.full((2, 500), np.nan)],
    "full scale of 1": np.full(500, 20_000.0),
    "not of shape": np.zeros((2, 2, 2, 500), np.float32),
    "clip 0 must be": [np.zeros((1, 2, 500), np.float32)],
    "samples come last": np.zeros((16_000, 2), np.float32),
    "channels: they come first": [np.zeros((16_000, 2), np.float32)],
    "signed integers, not uint8": np.zeros(500, np.uint8),
    "may be of 16, 24 or 32 bits": np.full(500, 20_000, np.int32),
    "peak 20000 may be of 16, 24 or 32 bits": torch.full((2, 500), -20_000, dtype=torch.int64),
    "may be of 24 or 32 bits": np.full(500, 1 << 20, np.int32),
    "may be of more than 32 bits": np.full(500, 1 << 40),
    "clip 1: int32": [np.full(500, 1 << 30, np.int32), np.full(500, 1000, np.int32)],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_waveforms(message):
    with pytest.raises(ValueError, match=message):
        embed(small(), BAD[message], RATE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_rate": 0}, "sample_rate must be at least 1000 Hz, not 0"),
        ({"sample_rate": -16_000}, "sample_rate must be"),
        ({"sample_rate": float("nan")}, "sample_rate must be"),
        ({"hop": 0.0}, "hop must be more than 0"),
        ({"hop": 0.7}, "at most a window of 0.64 s"),
        ({"hop": float("nan")}, "hop must be"),
        ({"pool": "max"}, "pool must be"),
        ({"batch_size": 0}, "batch_size must be"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        embed(small(), noise(5000), options.pop("sample_rate", RATE), **options)


def test_a_clip_of_one_frame():
    found = embed(small(), noise(400), RATE)
    assert found.num_frames.tolist() == [1] and torch.isfinite(found.clip).all()


@pytest.mark.parametrize("multi_label", [False, True])
def test_predict_by_hand(multi_label):
    card = ModelCard(mean=-5.0, std=3.0, labels=("a", "b", "c"), multi_label=multi_label, pool="cls")
    model = small(classes=3, card=card)
    short, long = noise(5000), noise(40_000, seed=1)
    found = predict(model, [short, long], RATE, hop=0.5, batch_size=2)

    def probabilities(part):
        part = torch.from_numpy(part.copy())[None]
        with torch.no_grad():
            logits = model.classify(fbank(part, num_frames=64, mean=-5.0, std=3.0), "cls")[0]
        return logits.sigmoid() if multi_label else logits.softmax(dim=0)

    torch.testing.assert_close(found.probabilities[0], probabilities(short), **TOLERANCE)
    total = count_frames(40_000, RATE)
    starts = [*range(0, total - 63, 50), total - 64]
    expected = torch.stack([probabilities(long[start * 160 : start * 160 + window_samples(model)]) for start in starts])
    torch.testing.assert_close(found.windows[1], expected, **TOLERANCE)
    torch.testing.assert_close(found.probabilities[1], expected.mean(dim=0), **TOLERANCE)
    torch.testing.assert_close(found.times[1][:, 0], torch.tensor(starts) / 100)
    best = found.top(2)[0]
    assert best[0][1] >= best[1][1] and best[0][0] == card.labels[int(found.probabilities[0].argmax())]


def test_predict_without_classifier_or_names():
    with pytest.raises(ValueError, match="fine-tune it first"):
        predict(small(), noise(5000), RATE)
    assert predict(small(classes=3), noise(5000), RATE).labels == ("class 0", "class 1", "class 2")


def test_a_failing_recording_ends_with_its_error():
    def blocks():
        yield np.zeros(30_000, np.int16)
        raise ValueError("broken in the middle")

    *windows, end = read_windows(7, blocks(), embedding_windows(small(), None))
    assert len(windows) > 3 and all(isinstance(window, Window) for window in windows)
    assert (end.clip, end.samples, end.error) == (7, 30_000, "broken in the middle")


def test_golden_waves_give_the_official_features(golden_values):
    """What the official loader makes of real files, padded to 1024 frames."""
    model = small(frames=1024, card=ModelCard())
    checked = 0
    for file in sorted((golden_values / "fbank").glob("*.npz")):
        arrays = np.load(file)
        if (
            not {"norm1024", "sample_rate"} <= set(arrays)
            or int(arrays["sample_rate"]) != RATE
            or len(arrays["wave"]) != 1
        ):
            continue
        wave = arrays["wave"][0][: window_samples(model)]
        features = features_of(model, [wave])[0].numpy()[arrays["norm1024_rows"]]
        difference = np.abs(features - arrays["norm1024"])
        # both are float32, whose rounding is of the size of a frame's loudest bin: as in the tests of the kernel
        logs = arrays["norm1024"] * 2 * model.card.std + model.card.mean
        tolerance = 1.2e-3 + 2e-6 * np.exp((logs.max(axis=1, keepdims=True) - logs) / 2)
        assert np.median(difference) < 1e-5, file.name
        assert (difference * 2 * model.card.std / tolerance).max() < 0.4, file.name
        checked += 1
    assert checked >= 5


def test_golden_classifiers(reference):
    """Probabilities of the official fine-tuned models, pooled as either kind is."""
    files = sorted((reference / "model").glob("*_ft_*.pth"))
    assert files
    for file in files:
        arrays = np.load(file.with_suffix(".npz"))
        heads = json.loads((reference / "model" / f"{file.stem.split('_ft_')[0]}.json").read_text())["config"]["heads"]
        model = load_model(file, heads=heads)
        for pool, key in (("mean", "avgtok"), ("cls", "cls")):
            model.card = dataclasses.replace(model.card, pool=pool)
            with torch.no_grad():
                found = class_encoder(model)(torch.from_numpy(arrays["fbank"]))
            expected = torch.from_numpy(arrays[f"logits_ft_{key}_f64"]).softmax(dim=1)
            np.testing.assert_allclose(found, expected, atol=3e-6, err_msg=file.name)
