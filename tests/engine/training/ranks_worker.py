"""Runs a list of configs one after another in one set of ranks: `RANK=.. WORLD_SIZE=.. python ranks_worker.py
JOBS.json`.

A job is {"config": name or path, "overrides": [...], "failed": where to say why}; or {"copy": [from, to, step]},
which makes a run folder as a kill after that checkpoint would have left it.
"""

import json
import os
import shutil
import sys
import traceback
from pathlib import Path

import torch.distributed as dist

from ssast.engine.config import load_config
from ssast.engine.pretrain import run


def leave_as_killed(source: Path, target: Path, step: int) -> None:
    shutil.copytree(source, target)
    for checkpoint in (target / "checkpoints").glob("step-*"):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    (target / "report.html").unlink()


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if "copy" in job:
            source, target, step = job["copy"]
            if os.environ["RANK"] == "0":
                leave_as_killed(Path(source), Path(target), step)
            dist.barrier()
        else:
            try:
                status = run(load_config(job["config"], job["overrides"]))
                assert status == 0, status
            except Exception:  # the other jobs are other tests' business
                with open(job["failed"], "a", encoding="utf-8") as file:
                    file.write(f"rank {os.environ['RANK']}: {traceback.format_exc()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
