"""A run where little is as usual: names that are not UTF-8, an ASCII terminal, no home folder, a port that is taken."""

import os
import socket
import subprocess
import sys

import numpy as np
import soundfile

CONFIG = """
run: {name: r, folder: runs}
model: {size: tiny, depth: 1, input_frames: 32}
mask: {num_masked: 8}
data: {valid_fraction: 0.25, num_threads: 1}
train: {steps: 2, schedule: constant, warmup_steps: 0, valid_every: 2, checkpoint_every: 2, log_every: 1}
deepspeed: {train_batch_size: 4, optimizer: {type: AdamW, params: {lr: 1.0e-3}}}
"""


def test_a_run_in_strange_surroundings(tmp_path):
    audio = os.fsencode(tmp_path) + b"/na\xefve/caf\xe9"
    os.makedirs(audio)
    rng = np.random.default_rng(0)
    for number in range(8):
        with open(audio + b"/\xe9-%d.wav" % number, "wb") as file:
            soundfile.write(file, 0.1 * rng.standard_normal(8000), 16000, format="WAV")
    with open(audio + b"/\xe9-bad.wav", "wb") as file:
        file.write(b"no sound")
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        environment = {
            name: value for name, value in os.environ.items() if name not in ("XDG_CACHE_HOME", "PYTHONUTF8")
        }
        environment |= {"HOME": "/proc", "TMPDIR": str(tmp_path), "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(other.getsockname()[1])}
        command = [sys.executable, "-m", "ssast.engine.cli", "pretrain", "tiny.yaml", b"data.train=" + audio]
        done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and b"finished 2 steps" in done.stdout
    assert done.stderr.count(b"data.cache_dir") == 1 and b"Traceback" not in done.stderr
    report = (tmp_path / "runs" / "r" / "report.html").read_text(encoding="utf-8")
    assert "caf\ufffd" in report
    assert (tmp_path / f"ssast-{os.getuid()}" / ".cache" / "ssast" / "checked.sqlite").is_file()
