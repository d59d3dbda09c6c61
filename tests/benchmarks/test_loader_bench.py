"""The loader's benchmark on tiny sizes: it runs, its contestants do the same work, its verdicts follow from the
rows.
"""

import csv
import importlib.util
import itertools
import os

import numpy as np
import pytest
import torch

from ssast.benchmarks import bench, rows, tables
from ssast.benchmarks.loader import aims, command, race
from ssast.benchmarks.loader.contestants import CONTESTANTS, FRAMES, MEAN, STD, Case
from ssast.benchmarks.loader.corpus import make_corpus, repeat_index
from ssast.benchmarks.operator_baselines import official_fbank
from ssast.engine.data.shards import open_shards

CLIPS, SECONDS, BATCH = 6, 0.5, 4


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    return make_corpus(folder, ["wav", "flac", "opus"], clips=CLIPS, seconds=SECONDS, audio=None, workers=1)


def two_epochs(corpus, name, codec, source):
    """[2 * clips, ...]: a batch begins in the first and ends in the second."""
    stream = CONTESTANTS[name].stream(Case(corpus, codec, source, BATCH, 1))
    try:
        return torch.cat([batch.clone() for batch in itertools.islice(stream, 2 * CLIPS // BATCH)])
    finally:
        if hasattr(stream, "close"):
            stream.close()


def runs(name):
    try:
        CONTESTANTS[name].note()
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def present(name, codec, source):
    if not CONTESTANTS[name].enters(codec, source, 1):
        return False
    return runs(name)


@pytest.mark.parametrize("codec", ["wav", "flac", "opus"])
def test_all_read_the_same_samples(clips, codec):
    ours = two_epochs(clips, "this engine", codec, "files")
    assert ours.dtype == torch.int16 and ours.shape == (2 * CLIPS, round(SECONDS * 16000))
    assert (torch.unique(ours, dim=0, return_counts=True)[1] == 2).all()
    for name, source in itertools.product(CONTESTANTS, ("files", "shards")):
        if name == "official way" or not present(name, codec, source):
            continue
        theirs = two_epochs(clips, name, codec, source)
        if name.startswith("webdataset"):  # in the order of the shards
            theirs, expected = (np.unique(each.numpy(), axis=0, return_counts=True) for each in (theirs, ours))
            assert (theirs[0] == expected[0]).all() and (theirs[1] == expected[1]).all(), name
        elif codec == "opus" and name.startswith("torchcodec"):  # another decoder of a lossy codec, and a resampler
            a, b = theirs.double(), ours.double()
            assert ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)) > 0.9).all()
        else:
            assert theirs.dtype == torch.int16 and torch.equal(theirs, ours), name


def test_the_official_way_makes_features_of_them(clips):
    features, waveform = (
        two_epochs(clips, "official way", "wav", "files"),
        two_epochs(clips, "this engine", "wav", "files"),
    )
    expected = official_fbank(waveform, num_frames=FRAMES, mean=MEAN, std=STD, dtype=torch.float32)
    assert features.shape == (2 * CLIPS, FRAMES, 128)
    torch.testing.assert_close(features, expected, atol=2e-3, rtol=0)


def test_peers_that_are_installed_take_part():
    """Else the comparison above would pass without them."""
    assert runs("soundfile, DataLoader") and runs("libsndfile alone") and runs("official way")
    assert runs("webdataset, DataLoader") == all(
        importlib.util.find_spec(name) for name in ("webdataset", "braceexpand")
    )


def test_a_repeated_index_reads_the_clips_again(clips, tmp_path):
    repeat_index(clips.shards("wav"), tmp_path / "many", 20)
    once, many = open_shards(clips.shards("wav")), open_shards(tmp_path / "many")
    assert len(many) == 20 and len(set(many.sources)) == 20
    assert (many.offsets == np.resize(once.offsets, 20)).all() and list(many.paths[:CLIPS]) == [
        path.replace(str(clips.shards("wav")), str(tmp_path / "many")) for path in once.paths
    ]


def test_given_recordings_are_cut(clips, tmp_path):
    cut = make_corpus(tmp_path, ["wav"], clips=4, seconds=0.2, audio=clips.folder / "files" / "flac", workers=1)
    first = two_epochs(cut, "libsndfile alone", "wav", "files")
    assert first.shape[1] == 3200 and first.abs().max() > 0


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_benchmark(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(command, "COLD_STARTS", 1)
    # a process each, of which the imports are most: the others read above, in this one
    some = {name: CONTESTANTS[name] for name in ("this engine", "libsndfile alone", "torchcodec, DataLoader")}
    monkeypatch.setattr(command, "CONTESTANTS", some)
    options = (
        f"--codecs wav --workers 1 --clips {CLIPS} --length {SECONDS} --batch {BATCH} --rounds 2 --seconds 0.05".split()
    )
    options += [
        "--batches",
        "40",
        "--entries",
        "0",
        "--out",
        str(tmp_path / "loader.csv"),
        "--plot",
        str(tmp_path / "x" / "loader.png"),
    ]
    before = os.sched_getaffinity(0)
    assert bench.main(["loader", *options]) == 0
    assert os.sched_getaffinity(0) == before
    said, found = capfd.readouterr().err, rows.read_rows(tmp_path / "loader.csv")
    rates = [row for row in found if row["metric"] == "clips_per_s"]
    assert {row["contestant"] for row in rates} == set(some)
    for row in rates:
        if runs(row["contestant"]):
            assert float(row["p50"]) > 0 and float(row["cpu_p50"]) > 0 and row["rounds"] == "2" and row["note"], row
        else:
            assert row["p50"] == "" and row["note"].startswith("left out: ") and row["note"] in said
    assert [row["batches"] for row in found if row["metric"] == "rss_mib"] == ["40"]
    assert {row["entries"] for row in found if row["metric"] == "first_batch_s"} == {str(CLIPS)}
    assert all(100 < float(row["p50"]) < 4096 for row in found if row["metric"] == "peak_rss_mib")
    assert "WAV shards, at least" in said and (tmp_path / "x" / "loader.png").stat().st_size > 10_000
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.loader_table().count("\n| wav | ") == len(rates)


def test_who_fails_is_not_passed_over(clips):
    """Raised, not measured as nothing."""
    job = {
        "folder": str(clips.folder / "nowhere"),
        "num_samples": 10,
        "codec": "wav",
        "batch": 2,
        "source": "files",
        "workers": 1,
    }
    with pytest.raises(race.UserError, match="libsndfile alone, wav: ended with status 1"):
        race.run_race(
            [job | {"contestant": "libsndfile alone"}], sorted(os.sched_getaffinity(0))[:1], rounds=1, seconds=0.01
        )


@pytest.mark.parametrize("options", [["--rounds", "0"], ["--seconds", "0"], ["--workers", "100000"]])
def test_mistakes_are_told(options, capsys):
    assert bench.main(["loader", *options]) == 2
    assert options[0] in capsys.readouterr().err


def test_the_verb(capsys):
    assert bench.main([]) == 2 and bench.main(["--help"]) == 0 and bench.main(["dinner"]) == 2
    assert "dinner" in capsys.readouterr().err
    assert bench.main(["kernels", "dinner"]) == 2 and "unknown operator" in capsys.readouterr().err
    assert bench.main.__doc__.splitlines()[0]


# ---- verdicts and tables ---------------------------------------------------------------------------------------------


def row(metric, contestant, codec, source, value, workers=1, **more):
    cpu = more.pop("cpu", value)
    made = {
        "metric": metric,
        "contestant": contestant,
        "codec": codec,
        "source": source,
        "workers": workers,
        "batch": 32,
    }
    made |= {
        "clip_s": 10.0,
        "clips": 400,
        "audio": "synthetic",
        "entries": "",
        "batches": "",
        "rounds": 5,
        "note": "soundfile 1",
    }
    made |= {"p25": value * 0.9, "p50": value, "p75": value * 1.1, "cpu_p25": cpu, "cpu_p50": cpu, "cpu_p75": cpu}
    made |= {"run": "1", "date": "2026-01-02", "commit": "abc", "device": "CPU Y", "cores": 4, "torch": "2.13"}
    return made | more


def rates(wav, flac, alone, peer, **more):
    return [
        row("clips_per_s", "this engine", "wav", "shards", wav, **more),
        row("clips_per_s", "this engine", "flac", "shards", flac, **more),
        row("clips_per_s", "libsndfile alone", "flac", "files", alone, **more),
        row("clips_per_s", "soundfile, DataLoader", "flac", "files", peer, **more),
        row("clips_per_s", "official way", "flac", "files", peer / 2, **more),
    ]


def met(rows):
    return [verdict.met for verdict in aims.verdicts(rows)]


def test_verdicts():
    assert met(rates(5000, 90, 100, 30)) == [True, True, True]
    assert met(rates(4999, 89.9, 100, 29.9)) == [False, False, True]
    # 2.99 times the better of the peers; libsndfile alone is none
    assert met(rates(9000, 200, 100, 67)) == [
        True,
        True,
        False,
    ]
    assert met(rates(9000, 90, 100, 30, workers=2)) == [True]  # a core, and alone on the core, are of one core
    read_back = [{name: str(value) for name, value in each.items()} for each in rates(5000, 90, 100, 30)]
    assert aims.verdicts(read_back) == aims.verdicts(rates(5000, 90, 100, 30))


def test_verdicts_are_of_wall_time():
    (verdict,) = aims.verdicts([row("clips_per_s", "this engine", "wav", "shards", 4000, cpu=8000)])
    assert not verdict.met and "4,000" in str(verdict) and "8,000" in str(verdict)


def test_who_was_left_out_is_not_the_best():
    absent = row("clips_per_s", "webdataset, DataLoader", "flac", "shards", 0) | {
        "p50": "",
        "cpu_p50": "",
        "note": "left out: none",
    }
    assert met([*rates(5000, 90, 100, 30), absent]) == [True, True, True]
    assert any("webdataset" in line and "left out: none" in line for line in aims.table([absent]))


@pytest.mark.parametrize(("growth", "seconds", "mib"), [(1.04, 0.5, 800), (1.06, 5.5, 1100)])
def test_verdicts_of_time_and_memory(growth, seconds, mib):
    large = {"entries": 2_200_000}
    found = [
        row("open_s", "this engine", "wav", "shards", seconds, **large),
        row("first_batch_s", "this engine", "wav", "shards", seconds, **large),
        row("peak_rss_mib", "this engine", "wav", "shards", mib, **large),
        row("first_batch_s", "this engine", "wav", "shards", 99.0, entries=400),  # of no aim
        row("rss_mib", "this engine", "wav", "shards", 400.0 * growth, batches=100_000),
        row("rss_mib", "this engine", "wav", "shards", 400.0, batches=1_000),
    ]
    assert met(found) == [growth < 1.05] * 4


def test_loader_table(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    drawn = "<!-- table: loader -->\nnot measured yet\n<!-- end -->"
    assert tables.render(drawn.replace("not measured yet", "?")) == drawn
    for each in [*rates(1, 1, 1, 1, run="0"), *rates(5000, 80, 100, 30), *rates(9000, 150, 180, 70, workers=2)]:
        rows.append_row(tmp_path / "loader.csv", each)
    lines = tables.loader_table().splitlines()
    assert lines[0] == "| codec | clips/s of | from | 1 core | 2 cores | a CPU second |"
    assert lines[2] == "| wav | this engine | shards | **5,000** [4,500, 5,500] | **9,000** [8,100, 9,900] | 5,000 |"
    assert lines[5] == "| flac | soundfile, DataLoader | files | 30 [27, 33] | 70 [63, 77] | 30 |"
    assert "| FLAC shards, at least 90% of libFLAC alone on the core | 80% (80% by CPU time) | **missed** |" in lines
    assert "5 rounds in turn; 400 clips of 10 s" in lines[-1] and lines[-1].endswith(
        "CPU Y, 4 cores, torch 2.13, commit abc, 2026-01-02."
    )
    with open(tmp_path / "loader.csv", newline="") as file:
        assert len({each["run"] for each in csv.DictReader(file)}) == 2
