import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from ssast.engine.distributed import launch as launching
from ssast.engine.distributed.launch import count_ranks, launch, one_line_errors, supervised
from ssast.engine.errors import UserError


def test_ranks_are_as_many_as_asked_for_or_as_there_are_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert count_ranks(None) == 1 and count_ranks(3) == 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert count_ranks(None) == 4 and count_ranks(2) == 2
    with pytest.raises(UserError, match="--ranks 0: at least one"):
        count_ranks(0)


def test_devices_keep_to_those_that_are_visible(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for visible, words in (
        ("2,3,5,7", ["--include", "localhost:2,3"]),
        ("", ["--num_accelerators", "2"]),
        ("GPU-8f2a,GPU-11c0", ["--num_accelerators", "2"]),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert launching._devices(2) == words
    with pytest.raises(UserError, match="--ranks 5: there are 4 GPUs"):
        launching._devices(5)


def raising(error):
    def work(*_):
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "local_rank", "status", "said"),
    [
        (UserError("no such file"), "0", 2, "ssast: no such file\n"),
        (UserError("no such file"), "1", 2, ""),
        (UserError("this disk is full", every_rank=True), "1", 2, "ssast: this disk is full\n"),
        (KeyboardInterrupt(), "0", 130, "ssast: stopped"),
        (KeyboardInterrupt(), "1", 130, ""),
    ],
)
def test_a_mistake_is_one_line_of_one_rank(error, local_rank, status, said, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert one_line_errors(raising(error)) == status
    error = capsys.readouterr().err
    assert error.startswith(said) and error.count("\n") == bool(said)


def test_out_of_memory_names_what_takes_less():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(UserError, match=r"out of GPU memory \(tried to allocate\).*--auto-batch"):
        supervised(raising(torch.OutOfMemoryError("tried to allocate\nmore")))
    assert signal.getsignal(signal.SIGINT) == before


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module for ranks to run; they tell its folder which they were."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(work):
        start = "import os, pathlib, signal, sys, time\nhere = pathlib.Path(__file__).parent\n"
        start += "(here / os.environ['RANK']).write_text(os.environ['WORLD_SIZE'] + ' ' + ' '.join(sys.argv[1:]))\n"
        (tmp_path / "ranks_run_this.py").write_text(start + textwrap.dedent(work))
        return "ranks_run_this"

    return write


def test_the_status_is_that_of_the_ranks(module, tmp_path):
    assert launch(2, module("sys.exit(0)"), ["a", "b=c"], engine="ddp") == 0
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2 a b=c", "2 a b=c"]
    assert launch(2, module("sys.exit(3)"), [], engine="ddp") not in (0, None)


def test_asked_to_stop_it_waits_for_the_ranks(module, tmp_path):
    """The ranks take a second to save; the command ends after them."""
    name = module(
        """
        def save(*_):
            time.sleep(1)
            (here / f"saved-{os.environ['RANK']}").touch()
            sys.exit(0)
        signal.signal(signal.SIGTERM, save)
        (here / f"ready-{os.environ['RANK']}").touch()
        time.sleep(600)
        """
    )
    code = f"from ssast.engine.distributed.launch import launch; print(launch(2, {name!r}, [], engine='ddp'))"
    command = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ)
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("ready-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        command.terminate()
        output, _ = command.communicate(timeout=120)
    finally:
        command.kill()
    assert output.split()[-1] == b"None" and len(list(tmp_path.glob("saved-*"))) == 2
