import subprocess
from pathlib import Path

import pytest

from ssast.benchmarks import compare, kernels

ROOT = Path(__file__).parents[2]


def git(folder, *arguments):
    command = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@localhost", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """Two commits of rooms that hold a word each."""
    folder = tmp_path / "repository"
    for room in ("kernels", "engine", "configs", "benchmarks"):
        (folder / room).mkdir(parents=True)
        (folder / room / "word").write_text("old")
    git(tmp_path, "init", "-q", str(folder))
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "old")
    git(folder, "tag", "before")
    for room in ("kernels", "engine", "configs", "benchmarks"):
        (folder / room / "word").write_text("new")
    git(folder, "commit", "-qam", "new")
    return folder


def key(shape):
    return ("embed", shape, "float32", "forward", "torch")


def test_two_trees_take_turns(repository, monkeypatch, capsys):
    order = []

    def measure(site, label, arguments, left, out):
        words = [
            (site / "ssast" / room / "word").read_text() for room in ("kernels", "engine", "configs", "benchmarks")
        ]
        order.append(words[0])
        assert words == [order[-1], order[-1], order[-1], "new"]  # measured by this tree's benchmark, both
        assert label.startswith("before [" if order[-1] == "old" else "this tree [")
        return {key("A"): 2.0 * len(order), key("old only"): 1.0} if order[-1] == "old" else {key("A"): 1.0}

    monkeypatch.setattr(compare, "_measure", measure)
    assert compare.compare(kernels.parse(["--compare", "before"]), repository) == 0
    assert order == ["old", "new", "new", "old", "old", "new"]
    lines = capsys.readouterr().out.splitlines()
    before, head = (git(repository, "rev-parse", "--short", name) for name in ("before", "HEAD"))
    assert lines[0].startswith(f"before [{before}] against this tree [{head}]:")
    assert lines[1].endswith("8         1  8.000 x [2.000, 10.000]")
    assert "only in before" in lines[2]
    assert git(repository, "worktree", "list").count("\n") == 0 and git(repository, "status", "--porcelain") == ""


def test_the_worktree_goes_in_any_case(repository, monkeypatch):
    seen = []

    def fail(site, *_):
        seen.append((site / "ssast" / "kernels").resolve())
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "_measure", fail)
    with pytest.raises(KeyboardInterrupt):
        compare.compare(kernels.parse(["--compare", "before"]), repository)
    assert len(seen) == 1 and not seen[0].exists()
    assert git(repository, "worktree", "list").count("\n") == 0


def test_no_such_revision(repository):
    with pytest.raises(compare.UserError, match="--compare later: no such revision in"):
        compare.compare(kernels.parse(["--compare", "later"]), repository)


@pytest.mark.slow
def test_a_tree_is_measured_in_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    arguments = kernels.parse(["mask", "--seconds", "0.01", "--compare", "HEAD"])
    medians = compare._measure(
        compare._site(tmp_path / "site", ROOT, ROOT), "this tree", arguments, None, tmp_path / "rows.csv"
    )
    assert [entry[0] for entry in medians] == ["mask", "mask"] and min(medians.values()) > 0


def test_a_tree_that_does_not_run_says_why(tmp_path):
    site = tmp_path / "site" / "ssast"
    (site / "benchmarks").mkdir(parents=True)
    (site / "benchmarks" / "kernels.py").write_text("raise SystemExit('there is nothing here')")
    arguments = kernels.parse(["--compare", "HEAD"])
    with pytest.raises(compare.UserError, match=r"old \[1\] cannot be measured: there is nothing here"):
        compare._measure(site.parent, "old [1]", arguments, None, tmp_path / "rows.csv")
