"""Small runs for tests: their config, and processes that train a list of them."""

import json
import os
import socket
import subprocess
import sys
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
    """Writes jobs down, runs them on so many ranks, and reads what they logged."""

    def __init__(self, folder: Path, corpus: Path) -> None:
        self.folder, self.corpus = folder, corpus
        self.config = folder / "small.yaml"
        self.config.write_text(yaml.safe_dump(SMALL))

    def job(self, name: str, *overrides: str) -> dict:
        given = [
            f"run.name={name}",
            f"run.folder={self.folder}",
            f"data.train={self.corpus}",
            f"data.cache_dir={self.folder / 'cache'}",
        ]
        failed = str(self.folder / f"{name}.failed")
        return {"config": str(self.config), "overrides": [*given, *overrides], "failed": failed}

    def interrupted(self, name: str, of: str, step: int) -> dict:
        return {"copy": [str(self.folder / of), str(self.folder / name), step]}

    def run(self, ranks: int, jobs: list[dict]) -> None:
        file = self.folder / f"jobs-{ranks}-{len(jobs)}.json"
        file.write_text(json.dumps(jobs))
        shared = {
            **os.environ,
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(),
            "OMP_NUM_THREADS": "1",
        }
        processes = [
            subprocess.Popen(
                [sys.executable, str(WORKER), str(file)],
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(ranks)
        ]
        outputs = [process.communicate(timeout=600)[0] for process in processes]
        assert all(process.returncode == 0 for process in processes), "\n".join(outputs)[-6000:]

    def rows(self, name: str, kind: str) -> list[dict]:
        """Fails the test that asks, and no other, where the job of this run failed."""
        failed = self.folder / f"{name}.failed"
        assert not failed.exists(), f"the run {name} failed: {failed.read_text()[-3000:]}"
        return [row for row in read_rows(self.folder / name / "metrics.jsonl") if row["kind"] == kind]

    def losses(self, name: str, kind: str = "train") -> list[tuple]:
        return [(row["step"], row["loss"], row["nce"], row["mse"], row["accuracy"]) for row in self.rows(name, kind)]
