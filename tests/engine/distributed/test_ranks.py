import socket
import subprocess
import sys

import pytest

from ssast.engine.distributed.ranks import Place, place_in_world
from ssast.engine.errors import UserError
from ssast.engine.pretrain import main

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    def put(**values):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({}, None),
        (MEETING, None),
        ({"WORLD_SIZE": "1"}, None),
        ({"RANK": "", "WORLD_SIZE": ""}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Place(0, 0, 1)),
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", **MEETING}, Place(3, 1, 4)),
    ],
)
def test_place_by_the_launchers_environment(environment, values, place):
    environment(**values)
    assert place_in_world() == place


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 but no RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0"}, "RANK=0 but no WORLD_SIZE"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 but no RANK, WORLD_SIZE"),
        ({"RANK": "1", "WORLD_SIZE": "2", **MEETING}, "but no LOCAL_RANK"),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "but no MASTER_PORT"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK=x, which is no number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1, which is no number"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0, which is no number"),
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2", **MEETING}, "RANK=2, LOCAL_RANK=0 of WORLD_SIZE=2"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "70000"}, "is no port"),
    ],
)
def test_environments_that_are_no_launchers(environment, values, message, capsys):
    environment(**values)
    with pytest.raises(UserError, match=message) as caught:
        place_in_world()
    assert caught.value.every_rank  # the variable that says who speaks may be the one that is wrong
    assert main(["demo", "--dry-run"]) == 2 and capsys.readouterr().err.count("\n") == 1


def test_batches_that_do_not_fit_the_ranks_are_refused_before_any_process_starts(environment, capsys, monkeypatch):
    environment()
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **options: pytest.fail("a process was started"))
    command = ["demo", "data.train=/nowhere", "deepspeed.train_batch_size=32", "--ranks", "3"]
    for how in ([], ["--dry-run"]):
        assert main([*command, *how]) == 2
        error = capsys.readouterr().err
        assert "on 3 ranks do not fit" in error and error.count("\n") == 1


def test_a_dry_run_has_deepspeed_read_its_section(environment, capsys):
    environment()
    for override, message in (
        ("deepspeed.zero_optimization={stage: 1, reduce_buket_size: 1}", "reduce_buket_size: Extra inputs"),
        ("deepspeed.zero_optimization={stage: 1, reduce_bucket_size: many}", "reduce_bucket_size: Input should be"),
        ("deepspeed.bf16={enabled: true, check_grad_overflow: 7}", "check_grad_overflow: Input should be"),
        ("deepspeed.communication_data_type=fp17", "fp17"),
    ):
        assert main(["demo", override, "--dry-run"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("ssast: deepspeed: ") and message in error and error.count("\n") == 1
    assert main(["demo", "step.engine=ddp", "deepspeed.zero_optimization={stage: 1, nope: 1}", "--dry-run"]) == 0


def test_one_process_needs_no_port():
    code = (
        "from ssast.engine.distributed.ranks import join_ranks; from ssast.engine.process import leave; "
        "r = join_ranks(); "
        "print(r.world_size, r.once(lambda: 'alone'), flush=True); leave(0)"
    )
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(other.getsockname()[1])}
        command = [sys.executable, "-c", f"import os; os.environ.update({there}); {code}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["1", "alone"]


def test_processes_that_cannot_meet_say_where():
    """On the first of two ranks, which opens the port."""
    code = (
        "from ssast.engine.distributed.ranks import join_ranks\nfrom ssast.engine.errors import UserError\n"
        "try: join_ranks()\nexcept UserError as error: print(error)"
    )
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        place["MASTER_PORT"] = str(port)
        command = [sys.executable, "-c", f"import os\nos.environ.update({place})\n{code}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert f"the processes cannot meet at 127.0.0.1:{port}" in done.stdout and done.stdout.count("\n") == 1
