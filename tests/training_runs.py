"""Small runs for tests: their config, and processes that train a list of them."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from ssast.engine.training.runlog import read_rows

WORKER = Path(__file__).parent / "engine" / "training" / "ranks_worker.py"
SMALL = {
    "run": {"name": "small"},
    "model": {"size": "tiny", "depth": 1, "input_frames": 64},  # 8 x 4 patches
    "mask": {"num_masked": 20},
    "data": {"valid_fraction": 0.2, "num_threads": 1, "crop": "random"},
    "train": {
        "steps": 9,
        "schedule": "plateau",
        "warmup_steps": 3,
        "plateau_patience": 99,
        "valid_every": 2,
        "checkpoint_every": 4,
        "keep_last": 3,
        "log_every": 1,
    },
    "deepspeed": {
        "train_batch_size": 8,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.95, 0.999], "weight_decay": 5e-7}},
    },
}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class Runs:
    """Writes jobs down, runs them on so many ranks, and reads what they logged. A job that fails or takes too long ends
    its ranks; the jobs after it run in fresh ones, and only tests that read the failed run fail.
    """

    def __init__(self, folder: Path, corpus: Path, *, job_seconds: float = 180) -> None:
        self.folder, self.corpus, self.job_seconds = folder, corpus, job_seconds
        self.config = folder / "small.yaml"
        self.config.write_text(yaml.safe_dump(SMALL))

    def job(self, name: str, *overrides: str, report: bool = False) -> dict:
        given = [
            f"run.name={name}",
            f"run.folder={self.folder}",
            f"data.train={self.corpus}",
            f"data.cache_dir={self.folder / 'cache'}",
        ]
        return {"name": name, "config": str(self.config), "overrides": [*given, *overrides], "report": report}

    def interrupted(self, name: str, of: str, step: int) -> dict:
        return {"name": name, "copy": [str(self.folder / of), str(self.folder / name), step]}

    def run(self, ranks: int, *lists: list[dict]) -> None:
        """Lists beside the first one run at the same time, in ranks of their own."""
        with ThreadPoolExecutor(len(lists)) as pool:
            list(pool.map(lambda jobs: self._run(ranks, jobs), lists))

    def _run(self, ranks: int, jobs: list[dict]) -> None:
        while jobs := [job for job in jobs if not self._failure(job["name"]).exists()]:
            done, output = self._attempt(ranks, jobs)
            tried = len(jobs) if done < 0 else done + 1
            for job in jobs[max(done, 0) : tried]:
                self._failure(job["name"]).write_text(output)
            jobs = jobs[tried:]

    def _attempt(self, ranks: int, jobs: list[dict]) -> tuple[int, str]:
        """How many of the jobs all ranks have finished, -1 if the ranks did not even start; and the end of what they
        said.
        """
        folder = Path(tempfile.mkdtemp(dir=self.folder, prefix="ranks-"))
        (folder / "jobs.json").write_text(json.dumps(jobs))
        given = {
            **os.environ,
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(),
            "OMP_NUM_THREADS": "1",
        }
        processes = []
        for rank in range(ranks):
            command = [sys.executable, str(WORKER), str(folder / "jobs.json"), str(folder / f"done-{rank}")]
            with open(folder / f"output-{rank}", "w") as output:
                environment = {**given, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))

        def finished() -> int:
            files = [folder / f"done-{rank}" for rank in range(ranks)]
            return min(int(file.read_text() or 0) if file.exists() else -1 for file in files)

        before, deadline = -1, time.monotonic() + self.job_seconds
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(0.1)
            if finished() > before:
                before, deadline = finished(), time.monotonic() + self.job_seconds
            elif any(process.poll() for process in processes):  # the others wait for it
                deadline = min(deadline, time.monotonic() + 10)
        late = [process for process in processes if process.poll() is None]
        for process in late:
            process.kill()
            process.wait()
        outputs = [f"rank {rank}: {(folder / f'output-{rank}').read_text()[-3000:]}" for rank in range(ranks)]
        return finished(), "\n".join(
            [*outputs, "ended from outside: it waited for another rank, or took too long" if late else ""]
        )

    def _failure(self, name: str) -> Path:
        return self.folder / f"{name}.failed"

    def path(self, name: str) -> Path:
        """The folder of a run. Fails the test that asks, and no other, where the job of this run failed."""
        failure = self._failure(name)
        assert not failure.exists(), f"the run {name} failed: {failure.read_text()}"
        return self.folder / name

    def rows(self, name: str, kind: str) -> list[dict]:
        return [row for row in read_rows(self.path(name) / "metrics.jsonl") if row["kind"] == kind]

    def losses(self, name: str, kind: str = "train") -> list[tuple]:
        return [(row["step"], row["loss"], row["nce"], row["mse"], row["accuracy"]) for row in self.rows(name, kind)]
