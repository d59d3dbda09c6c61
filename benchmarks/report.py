"""`ssast report RUN ...`: the report of a run, and that of its throughput where it was profiled."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """write the reports of runs anew"""
    parser = argparse.ArgumentParser(
        prog="ssast report",
        description="Write report.html and its pictures anew, with the throughput report where `ssast profile` ran.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_FOLDER")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    from ssast.engine.files import PROFILE_FOLDER
    from ssast.engine.report.run import write_report

    from .throughput.profile_report import write_throughput_report

    for run in arguments.runs:
        profile = run / PROFILE_FOLDER if (run / PROFILE_FOLDER).is_dir() else run
        has_profile = (profile / "profile.json").is_file()
        if has_profile:
            print(write_throughput_report(profile))
        if (run / "metrics.jsonl").is_file() or not has_profile:
            print(write_report(run))
    return 0
