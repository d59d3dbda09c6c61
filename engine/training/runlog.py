"""What a run writes down while it goes on: metrics.jsonl, TensorBoard, Weights & Biases, and a line or bar for the
person watching.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ssast.engine.config import RunConfig
from ssast.engine.files import write_whole

SECONDS_BETWEEN_LINES = 10.0


class RunLog:
    """Rows of metrics, on rank 0. A row is a flat dictionary with "kind": "train", "valid" or "event"."""

    def __init__(self, config: RunConfig, run_dir: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = run_dir / "metrics.jsonl"
        _drop_rows_after(self.path, first_step)
        self._rows = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)
        self._wandb = _start_wandb(config, run_dir) if config.run.wandb else None
        on_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=config.train.steps, initial=first_step, unit="step", disable=not on_terminal, dynamic_ncols=True
        )
        self._plain = not on_terminal
        self._last_line = 0.0

    def row(self, kind: str, step: int, **values: Any) -> None:
        """Log values to metrics.jsonl, TensorBoard and wandb; numbers that are not finite become null."""
        values = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        self._rows.write(json.dumps({"kind": kind, "step": step, **values, "time": round(time.time(), 3)}) + "\n")
        self._rows.flush()
        numbers = {f"{kind}/{key}": value for key, value in values.items() if isinstance(value, int | float)}
        for key, value in numbers.items():
            self._board.add_scalar(key, value, step)
        if self._wandb is not None and numbers:
            self._wandb.log(numbers, step=step)

    def progress(self, step: int, where: str, *, is_last: bool, **shown: str) -> None:
        """Move the bar or, where there is none, now and then print a line that begins with `where`."""
        self._bar.update(step - self._bar.n)
        self._bar.set_postfix(shown, refresh=False)
        now = time.monotonic()
        if self._plain and (now - self._last_line > SECONDS_BETWEEN_LINES or is_last):
            self._last_line = now
            print(f"{where}  " + "  ".join(f"{key} {value}" for key, value in shown.items()), flush=True)

    def say(self, text: str) -> None:
        """A line for the person watching, which does not tear the bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Complete the files."""
        self._bar.close()
        self._board.close()
        self._rows.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows. What is none is left out: a last line cut short by a crash, or anything foreign."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int) and "kind" in row:
                rows.append(row)
    return rows


def _drop_rows_after(path: Path, step: int) -> None:
    """Training resumes from a checkpoint: what was logged past it will be logged again."""
    rows = read_rows(path)
    if rows:
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))


def _start_wandb(config: RunConfig, run_dir: Path) -> Any:
    import wandb

    id_file = run_dir / "wandb-id.txt"
    if not id_file.is_file():
        write_whole(id_file, wandb.util.generate_id())
    run_id = id_file.read_text().strip()
    return wandb.init(
        id=run_id, name=config.run.name, dir=run_dir, config=config.model_dump(mode="json"), resume="allow"
    )
