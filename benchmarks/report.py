"""`ssast report RUN ...`: the report of a run, and that of its throughput where it was profiled."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """write the reports of runs anew, or compare the throughput of two"""
    parser = argparse.ArgumentParser(
        prog="ssast report",
        description="Write report.html and its pictures anew, with the throughput report where `ssast profile` ran.",
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two run folders that were profiled")
    parser.add_argument(
        "--out", type=Path, default=Path("comparison"), help="folder for what --compare writes (default comparison)"
    )
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if bool(arguments.runs) == bool(arguments.compare):
        parser.error("name run folders, or two with --compare")
    from ssast.engine.files import PROFILE_FOLDER
    from ssast.engine.report.run import write_report

    from .throughput.profile_report import write_comparison, write_throughput_report

    def profile_of(run: Path) -> Path:
        return run / PROFILE_FOLDER if (run / PROFILE_FOLDER).is_dir() else run

    if arguments.compare:
        print(write_comparison(*(profile_of(run) for run in arguments.compare), arguments.out))
        return 0
    for run in arguments.runs:
        profile = profile_of(run)
        has_profile = (profile / "profile.json").is_file()
        if has_profile:
            print(write_throughput_report(profile))
        if (run / "metrics.jsonl").is_file() or not has_profile:
            print(write_report(run))
    return 0
