"""Runs a list of jobs one after another in one set of ranks: `RANK=.. WORLD_SIZE=.. python ranks_worker.py JOBS.json
DONE`.

A job is {"name": of the run, "config": name or path, "overrides": [...], "report": whether it ends with one}; or
{"name": .., "copy": [from, to, step]}, which makes a run folder as a kill after that checkpoint would have left it.
The file DONE holds the number of jobs that this rank has finished. The first one that fails ends the process, and with
it the other ranks, which would wait for this one.
"""

import json
import os
import shutil
import sys
import traceback
from pathlib import Path

import torch.distributed as dist

from ssast.engine import pretrain
from ssast.engine.config import load_config

write_report = pretrain._finish


def leave_as_killed(source: Path, target: Path, step: int) -> None:
    shutil.copytree(source, target)
    for checkpoint in (target / "checkpoints").glob("step-*"):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    (target / "report.html").unlink(missing_ok=True)


def run(job: dict) -> None:
    if "copy" in job:
        source, target, step = job["copy"]
        if os.environ["RANK"] == "0":
            leave_as_killed(Path(source), Path(target), step)
        if dist.is_initialized():
            dist.barrier()
        return
    pretrain._finish = write_report if job["report"] else lambda *about: None  # takes longer than the training
    status = pretrain.run(load_config(job["config"], job["overrides"]))
    assert status == 0, status


def main() -> None:
    jobs, done = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    done.write_text("0")
    for number, job in enumerate(jobs, 1):
        try:
            run(job)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        done.write_text(str(number))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
