"""The report of a run: its numbers, its pictures, and that it can be written from any run folder."""

import html
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import yaml
from matplotlib.image import imread

from ssast.engine.errors import UserError
from ssast.engine.report import page as page_frame
from ssast.engine.report import run as report
from ssast.engine.report.run import expand_mask, rows_by_kind, wall_seconds, write_report
from ssast.engine.report.theme import DARK, LIGHT, png

CURVE_FILES = ["loss", "infonce", "mse", "accuracy", "learning-rate", "gradient-norm", "throughput", "data-stall"]
HIDDEN = 40
FRAMES, BINS = 256, 128


def train_row(step, seconds, rng):
    progress = 1 - math.exp(-step / 150)
    nce, mse = math.log(HIDDEN) * (1 - 0.7 * progress) + 0.05 * rng.normal(), 0.5 - 0.3 * progress + 0.01 * rng.normal()
    clips_per_s = float(200 + 5 * rng.normal())
    return {
        "kind": "train",
        "step": step,
        "samples": 16 * step,
        "epoch": step / 20,
        "loss": nce + 10 * mse,
        "nce": nce,
        "mse": mse,
        "accuracy": 1 / HIDDEN + 0.5 * progress,
        "lr": 1e-4 * min(1, step / 50),
        "grad_norm": math.exp(0.2 * rng.normal()),
        "clips_per_s": clips_per_s,
        "audio_s_per_s": clips_per_s * 9.0,
        "data_stall": abs(0.02 * rng.normal()),
        "seconds": seconds,
    }


def valid_row(step, rng):
    row = train_row(step, 0.0, rng)
    return {"kind": "valid"} | {key: row[key] for key in ("step", "loss", "nce", "mse", "accuracy")}


def event_row(step, event, detail=""):
    return {"kind": "event", "step": step, "event": event, "detail": detail}


def training_rows():
    """400 steps: a crash after 260, and a resume from the checkpoint of step 200."""
    rng = np.random.default_rng(0)
    rows = [event_row(0, "start")]
    for first, last in ((0, 260), (200, 400)):
        for step in range(first + 2, last + 1, 2):
            rows.append(train_row(step, 0.5 * (step - first), rng))
            if step % 50 == 0:
                rows += [valid_row(step, rng), event_row(step, "checkpoint")]
        rows.append(event_row(200, "resume", "checkpoints/step-200"))
    return [*rows[:-1], event_row(400, "done")]


def reconstruction(shape=(16, 16), clips=4, noise=0.3):
    rng = np.random.default_rng(1)
    frames, bins = np.arange(FRAMES)[:, None], np.arange(BINS)[None]
    features = np.sin(frames / 20) * np.cos(bins / 9) + noise * rng.normal(size=(clips, FRAMES, BINS))
    patches = (FRAMES // shape[1]) * (BINS // shape[0])
    mask = np.stack([rng.choice(patches, HIDDEN, replace=False) for _ in range(clips)])
    hidden = np.stack([expand_mask(row, shape, (FRAMES, BINS)) for row in mask])
    return {
        "features": features.astype(np.float32),
        "mask": mask,
        "recon": np.where(hidden, 0.9 * features, np.nan).astype(np.float32),
        "found": rng.random(mask.shape) < 0.4,
        "names": np.array(["rain & <wind>.wav", "dog.wav", "$x$.wav", "fourth.wav"][:clips]),
        "patch_shape": np.array(shape),
        "step": np.int64(400),
    }


def make_run(folder, rows, *, name="joint", hidden=HIDDEN):
    folder.mkdir(exist_ok=True)
    config = {
        "run": {"name": name},
        "model": {"size": "tiny", "patch_shape": [16, 16]},
        "mask": {"num_masked": hidden},
        "train": {"steps": 400},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_complete_run(folder):
    make_run(folder, training_rows(), name="joint <script>alert(1)</script>")
    environment = {"versions": {"torch": "2.11.0"}, "command": "ssast pretrain tiny a=<b>", "devices": ["gpu", "gpu"]}
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "data.json").write_text(json.dumps({"clips": 12345, "hours": 30.5, "skipped": 25}))
    skipped = "".join(f"a{i}.wav,too short: 0.{i} s\n" for i in range(24)) + '"b,<c>.wav",cannot be decoded\n'
    (folder / "skipped.csv").write_text("path,reason\n" + skipped)
    for step in (200, 400):
        (folder / "checkpoints" / f"step-{step}").mkdir(parents=True)
    (folder / "checkpoints" / "best.json").write_text(json.dumps({"step": 400, "metric": "accuracy", "value": 0.4871}))
    np.savez(folder / "reconstruction.npz", **reconstruction())
    return folder


def text_of(page):
    """The words of a page, as a reader sees them."""
    body = page.read_text(encoding="utf-8").split("<body>")[1]
    return " ".join(html.unescape(re.sub("<[^>]+>", " ", body)).split())


@pytest.fixture
def without_pixels(monkeypatch):
    """Draws the pictures without turning them into pixels, which takes most of the time."""
    monkeypatch.setattr(page_frame, "png", lambda figure: b"")


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    return write_report(make_complete_run(tmp_path_factory.mktemp("runs") / "complete"))


def test_numbers_are_those_of_the_rows(complete):
    rows = training_rows()
    valid = [row for row in rows if row["kind"] == "valid"][-1]
    text = text_of(complete)
    assert f"Pretext accuracy {100 * valid['accuracy']:.1f}% {valid['accuracy'] * HIDDEN:.3g} × chance (2.5%)" in text
    assert f"InfoNCE {valid['nce']:.3f} uniform guess {math.log(HIDDEN):.3f} validation, step 400" in text
    assert f"Reconstruction {valid['mse']:.4f} mean squared error validation, step 400" in text
    kept = {row["step"]: row for row in rows if row["kind"] == "train"}
    rates = sorted(row["clips_per_s"] for row in kept.values())
    assert f"Clips per second {rates[(len(rates) - 1) // 2]:.1f}" in text
    assert "Audio seen 16.00 h" in text  # 400 steps of 16 clips of 9 s
    # 0.5 s for each of 400 steps; the 60 steps lost in the crash are not in the log
    assert "Wall time 3 min 20 s" in text
    assert f"ln {HIDDEN} = {math.log(HIDDEN):.2f}" in text and f"1 in {HIDDEN}" in text


def test_tells_what_the_run_did_and_how_it_ended(complete):
    text = text_of(complete)
    assert "find and redraw 16×16 patches" in text and "40 in each clip" in text
    assert text.startswith("Finished") and "step 400 of 400" in text and "resumed after step 200" in text


def test_shows_what_was_skipped_and_how_to_do_it_again(complete):
    text = text_of(complete)
    assert "24 too short" in text and "1 cannot be decoded" in text and "The first 20 of 25 skipped files" in text
    assert "12,345" in text and "30.50" in text
    assert "command ssast pretrain tiny a=<b>" in text and "versions.torch 2.11.0" in text and "gpu, gpu" in text
    assert "step-200, step-400" in text and "step 400: accuracy 0.4871" in text
    assert f"ssast pretrain {complete.parent / 'config.yaml'} run.name=another-name" in text
    assert "num_masked: 40" in text


def test_page_needs_no_other_file_and_escapes_names(complete):
    page = complete.read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', page)
    assert len(sources) == 1 + 2 * (len(CURVE_FILES) + 3)
    assert all(source.startswith("data:") for source in sources)
    assert not re.search(r"https?://|url\(|@import|<script", page)
    assert "joint &lt;script&gt;alert(1)&lt;/script&gt;" in page and "rain &amp; &lt;wind&gt;.wav" in page
    assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page


def test_pictures_are_small_and_show_something(complete):
    pictures = complete.parent / "pictures"
    assert {path.name for path in pictures.iterdir()} == {
        f"{name}.png" for name in [*CURVE_FILES, "clip-1", "clip-2", "clip-3"]
    }
    for path in pictures.iterdir():
        pixels = imread(path)[..., :3]
        assert path.stat().st_size < 120_000
        assert np.allclose(pixels[2, 2], 1, atol=0.01), "light background"
        assert len(np.unique(pixels @ (1.0, 10.0, 100.0))) > 8, "colours"
        assert (pixels.min(-1) < 0.9).mean() > 0.01, "something drawn"


def test_a_clip_of_noise_makes_a_small_file_too():
    rng = np.random.default_rng(0)
    noise, patches = rng.normal(size=(1024, 128)), rng.choice(512, 400, replace=False)
    recon = np.where(expand_mask(patches, (16, 16), noise.shape), 0.0, np.nan)
    clip = report.Clip("noise", noise, patches, recon, np.arange(400) % 2 == 0, (16, 16))
    assert len(png(report.draw_clip(1, clip, DARK))) < 120_000


@pytest.mark.parametrize("shape", [(16, 16), (128, 2)])
def test_mask_covers_exactly_the_hidden_patches(shape):
    height, width = shape
    mask = expand_mask(np.array([0, 5]), shape, (64, 128))  # 4 patches along time for 16×16, 32 for 128×2
    expected = np.zeros((64, 128), bool)
    expected[:width, :height] = True
    if shape == (16, 16):
        expected[16:32, 16:32] = True  # number 5: second in time, second from the bottom
    else:
        expected[10:12, :] = True  # number 5: sixth in time, all frequencies
    assert np.array_equal(mask, expected)


def test_mask_leaves_frames_beyond_the_last_whole_patch():
    mask = expand_mask(np.arange(2 * 8), (16, 16), (40, 128))
    assert mask[:32].all() and not mask[32:].any()


@pytest.mark.parametrize(("shape", "second", "outline"), [((16, 16), 3, " outline"), ((128, 2), 100, "")])
def test_found_and_missed_patches_have_their_colours(shape, second, outline):
    features = np.zeros((64 if outline else 256, 128), np.float32)
    features[::2] = 1
    recon, found = np.full_like(features, np.nan), np.array([True, False])
    clip = report.Clip("a", features, np.array([0, second]), recon, found, shape)
    figure = report.draw_clip(1, clip, LIGHT)
    pixels = imread(io.BytesIO(png(figure)))[..., :3]
    found, missed = (np.abs(pixels - matplotlib.colors.to_rgb(c)).max(-1) < 0.05 for c in (LIGHT.found, LIGHT.missed))
    assert found.any() and missed.any()
    assert np.argwhere(found)[:, 1].mean() < np.argwhere(missed)[:, 1].mean(), "patch 0 comes first"
    assert [axes.get_title("left") for axes in figure.axes][-1] == f"Found 1 (green), missed 1 (red{outline})"


def test_just_started_run(tmp_path):
    page = write_report(make_run(tmp_path / "run", []))
    text = text_of(page)
    assert text.startswith("Just started")
    assert list((tmp_path / "run" / "pictures").iterdir()) == []


def test_bare_configuration(tmp_path, without_pixels):
    run = make_run(tmp_path / "bare", training_rows()[:2])
    (run / "config.yaml").write_text("")
    text = text_of(write_report(run))
    assert text.startswith("In progress bare") and "chance" not in text


def test_one_row_and_a_torn_last_line(tmp_path):
    row = train_row(10, 61.0, np.random.default_rng(0))
    run = make_run(tmp_path / "run", [row])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind":"train","step":20,"lo')
    text = text_of(write_report(run))
    assert "In progress" in text and "step 10 of 400" in text
    assert f"InfoNCE {row['nce']:.3f}" in text and "training, step 10" in text and "Wall time 1 min 01 s" in text
    assert "1 line of metrics.jsonl" in text


def test_generative_run_has_no_matching_task(tmp_path, without_pixels):
    rows = [row | {"nce": None, "accuracy": None} if row["kind"] != "event" else row for row in training_rows()]
    run = make_run(tmp_path / "run", rows)
    np.savez(run / "reconstruction.npz", **reconstruction())
    text = text_of(write_report(run))
    assert "InfoNCE, Pretext accuracy" in text, "curves that are missing are named"
    assert "× chance" not in text and "hidden patches found" not in text
    names = {path.stem for path in (run / "pictures").iterdir()}
    assert "mse" in names and not names & {"infonce", "accuracy"}


def test_discriminative_run_has_no_drawing(tmp_path, without_pixels):
    rows = [row | {"mse": None} if row["kind"] != "event" else row for row in training_rows()]
    run = make_run(tmp_path / "run", rows)
    np.savez(run / "reconstruction.npz", **reconstruction())
    text = text_of(write_report(run))
    assert "hidden patches found" in text
    assert "Redrawn" not in text and "answering the average" not in text


def test_validation_that_hides_another_number_of_patches(tmp_path, without_pixels):
    rows = [row | {"num_masked": 200} if row["kind"] == "valid" else row for row in training_rows()]
    valid = [row for row in rows if row["kind"] == "valid"][-1]
    text = text_of(write_report(make_run(tmp_path / "run", rows)))
    assert f"{valid['accuracy'] * 200:.3g} × chance (0.5%)" in text and "uniform guess 5.298" in text
    assert "Dashed: chance in training, 1 in 40, chance in validation, 1 in 200." in text


def test_missing_columns_and_numbers_that_are_not_finite(tmp_path, without_pixels):
    rows = [{"kind": "train", "step": step, "loss": loss} for step, loss in ((1, 2.0), (2, math.nan), (3, math.inf))]
    text = text_of(write_report(make_run(tmp_path / "run", rows)))
    assert "2 logged steps" in text and "Wall time –" in text


def test_stopped_run_and_fewer_clips_than_before(tmp_path, without_pixels):
    run = make_run(tmp_path / "run", [*training_rows()[:30], event_row(50, "stop", "step 50 of 400")])
    (run / "checkpoints" / "step-50").mkdir(parents=True)
    np.savez(run / "reconstruction.npz", **reconstruction(clips=2))
    write_report(run)
    np.savez(run / "reconstruction.npz", **reconstruction(clips=1))
    text = text_of(write_report(run))
    assert text.startswith("Stopped") and "step 50 of 400" in text
    assert f"checkpoint ssast pretrain {run / 'config.yaml'}" in text
    assert [path.name for path in (run / "pictures").glob("clip-*")] == ["clip-1.png"]
    assert not list(run.rglob("*.tmp"))


def test_later_rows_replace_earlier_ones(tmp_path):
    path = tmp_path / "metrics.jsonl"
    train = [
        {"kind": "train", "step": step, "loss": loss, "seconds": s}
        for step, loss, s in ((10, 1, 5), (20, 2, 10), (30, 3, 15))
    ]
    again = {"kind": "train", "step": 20, "loss": 9, "seconds": 4}
    path.write_text("\n".join(json.dumps(row) for row in [*train, event_row(10, "resume"), again]))
    rows, valid, events, unreadable = rows_by_kind(path)
    assert [(row["step"], row["loss"]) for row in rows] == [(10, 1), (20, 9)]  # step 30 is still to come
    assert (valid, len(events), unreadable) == ([], 1, 0)
    assert wall_seconds(rows) == 9


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl"])
def test_not_a_run_folder(tmp_path, missing):
    run = make_run(tmp_path / "run", [])
    (run / missing).unlink()
    with pytest.raises(UserError, match=f"not a run folder: it has no {missing}"):
        write_report(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("name", ["environment.json", "reconstruction.npz", "config.yaml"])
def test_damaged_file_is_named(tmp_path, name):
    run = make_run(tmp_path / "run", [])
    (run / name).write_text("{torn: [")
    with pytest.raises(UserError, match=f"{re.escape(name)} is damaged"):
        write_report(run)


def test_names_that_are_not_utf8_are_shown_with_replacements(tmp_path, without_pixels):
    """As os.fsdecode gives them: bytes of a file's name that are no UTF-8 are lone surrogates."""
    run = make_complete_run(tmp_path / "run")
    examples = reconstruction()
    examples["names"] = np.array([f"caf\udce9-{i}.wav" for i in range(4)])
    np.savez(run / "reconstruction.npz", **examples)
    (run / "skipped.csv").write_bytes(b"path,reason\ncaf\xe9.wav,too short\n")
    page = write_report(run).read_bytes().decode("utf-8")  # strict
    assert "caf\ufffd-0.wav" in page and "caf\ufffd.wav" in page


def test_leaves_the_callers_matplotlib_alone(tmp_path):
    before, backend = dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False)
    write_report(make_run(tmp_path / "run", training_rows()[:4]))
    assert dict(matplotlib.rcParams) == before and matplotlib.get_backend(auto_select=False) == backend


def test_does_not_load_torch():
    """Of itself: the package around it does."""
    code = "\n".join(
        [
            "import sys, types",
            "package = types.ModuleType('ssast.engine')",
            f"package.__path__ = [{str(Path(report.__file__).parents[1])!r}]",
            "sys.modules['ssast.engine'] = package",
            "import ssast.engine.report.run",
            "sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)",
        ]
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
