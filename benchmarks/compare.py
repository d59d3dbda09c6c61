"""The kernels of another git revision against those of this tree: `python -m ssast.benchmarks.kernels --compare REV`.

Both are measured by this tree's benchmark, in processes that take turns on the same machine; from REV come only
`ssast.kernels` and `ssast.engine`, out of a temporary worktree. What is printed is the ratio within each turn: its
median, and the least and greatest.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ssast.engine.errors import UserError

from .rows import read_rows

ROOT = Path(__file__).resolve().parent.parent
TURNS = 3
KEY = ("operator", "shape", "dtype", "mode", "provider")
Medians = dict[tuple[str, ...], float]  # milliseconds, by KEY


def compare(arguments: argparse.Namespace, root: Path = ROOT) -> int:
    sha = _git(root, "rev-parse", "--short", "--verify", "--quiet", f"{arguments.compare}^{{commit}}")
    if sha is None:
        raise UserError(f"--compare {arguments.compare}: no such revision in {root}")
    changed = "+" if _git(root, "status", "--porcelain") else ""
    labels = f"{arguments.compare} [{sha}]", f"this tree [{_git(root, 'rev-parse', '--short', 'HEAD')}{changed}]"
    until = time.monotonic() + arguments.deadline if arguments.deadline else None
    with tempfile.TemporaryDirectory(prefix="ssast-compare-") as folder, _worktree(root, sha, Path(folder)) as worktree:
        sites = [_site(Path(folder) / "old", worktree, root), _site(Path(folder) / "new", root, root)]
        turns: list[tuple[Medians, Medians]] = []
        for turn in range(TURNS):
            found: list[Medians] = [{}, {}]
            for side in (0, 1) if turn % 2 == 0 else (1, 0):  # neither is always the one on the warmer machine
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    print(
                        f"the deadline of {arguments.deadline:g} s came first: {len(turns)} of {TURNS} turns",
                        file=sys.stderr,
                    )
                    return _show(labels, turns) or 3
                print(f"turn {turn + 1} of {TURNS}: {labels[side]}", file=sys.stderr, flush=True)
                found[side] = _measure(sites[side], labels[side], arguments, left, Path(folder) / f"{turn}-{side}.csv")
            turns.append((found[0], found[1]))
    return _show(labels, turns)


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@contextlib.contextmanager
def _worktree(root: Path, sha: str, folder: Path) -> Iterator[Path]:
    """Removed in any case, also when the process is told to end."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    path = folder / "worktree"
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "worktree", "add", "--detach", str(path), sha],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise UserError(f"git worktree add: {done.stderr.strip().splitlines()[-1]}")
        yield path
    finally:
        _git(root, "worktree", "remove", "--force", str(path))
        _git(root, "worktree", "prune")
        signal.signal(signal.SIGTERM, before)


def _site(site: Path, tree: Path, harness: Path) -> Path:
    """A folder for PYTHONPATH in which `ssast` is that tree's kernels and engine under this tree's benchmarks."""
    (site / "ssast").mkdir(parents=True)
    for room, home in (("kernels", tree), ("engine", tree), ("configs", tree), ("benchmarks", harness)):
        (site / "ssast" / room).symlink_to(home / room)
    return site


def _measure(site: Path, label: str, arguments: argparse.Namespace, left: float | None, out: Path) -> Medians:
    command = [
        sys.executable,
        "-m",
        "ssast.benchmarks.kernels",
        *arguments.operators,
        "--out",
        str(out),
        "--seed",
        str(arguments.seed),
    ]
    command += ["--modes", *arguments.modes, "--providers", *(arguments.providers or ("triton", "torch"))]
    for option in ("dtype", "seconds"):
        if (value := getattr(arguments, option)) is not None:
            command += [f"--{option}", str(value)]
    command += ["--small"] if arguments.small else []
    command += ["--compiled"] if arguments.compiled else ["--no-compiled"]
    command += ["--deadline", str(left)] if left is not None else []
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(site)}, cwd=site, capture_output=True, text=True, check=False
    )
    for line in done.stderr.splitlines():
        if line.lstrip().startswith("RED"):
            print(f"  {label}: {line.strip()}", file=sys.stderr)
    if not out.exists():
        raise UserError(f"{label} cannot be measured: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
    return {
        tuple(row[name] for name in KEY): float(row["p50_ms"]) for row in read_rows(out) if row["operator"] != "ceiling"
    }


def _show(labels: tuple[str, str], turns: Sequence[tuple[Medians, Medians]]) -> int:
    """A line for each case, with how many times as fast this tree is; 1 if there is no case that both have."""
    print(
        f"{labels[0]} against {labels[1]}: milliseconds, and how many times as fast this tree is [least, greatest of "
        f"{len(turns)} turns]"
    )
    keys = list(dict.fromkeys(key for turn in turns for side in turn for key in side))
    shared = 0
    for key in keys:
        old, new = ([turn[side][key] for turn in turns if key in turn[side]] for side in (0, 1))
        name = f"{key[0]:10}{key[1]:50}{key[3]:9}{key[4]:12}"
        if not old or not new:
            print(f"{name} only in {labels[1] if new else labels[0]}")
            continue
        shared += 1
        ratios = [turn[0][key] / turn[1][key] for turn in turns if key in turn[0] and key in turn[1]]
        times = f"{statistics.median(old):9.4g} {statistics.median(new):9.4g}"
        print(f"{name} {times}  {statistics.median(ratios):.3f} x [{min(ratios):.3f}, {max(ratios):.3f}]")
    return 0 if shared else 1
