"""The run folder: whose it is, and what a run that resumes keeps of its beginning."""

import copy
from pathlib import Path

import pytest
from training_runs import SMALL

from ssast.engine import environment
from ssast.engine.config import Config, dump_config
from ssast.engine.errors import UserError
from ssast.engine.training.rundir import check_run_dir, is_finished, settle_precision
from ssast.engine.training.runlog import read_rows


def config(folder: Path, **sections: dict) -> Config:
    tree = copy.deepcopy(SMALL)
    tree["run"]["folder"] = str(folder)
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return Config.model_validate(tree)


@pytest.fixture
def device(monkeypatch):
    """Sets whether the device of this process computes in bf16."""
    return lambda bf16: monkeypatch.setattr("ssast.engine.config.computes_in_bf16", lambda: bf16)


def begin(run: Config) -> None:
    """As `prepare_run_dir` and the first step leave the folder."""
    run.run_dir.mkdir(parents=True)
    (run.run_dir / "config.yaml").write_text(dump_config(run))
    (run.run_dir / "environment.json").write_text("{}")
    (run.run_dir / "metrics.jsonl").write_text('{"kind": "event", "step": 0, "event": "start"}\n')


@pytest.mark.parametrize("bf16", [True, False])
def test_precision_auto_is_what_the_device_does_best(tmp_path, device, bf16):
    device(bf16)
    settled = settle_precision(config(tmp_path, step={"precision": "auto"}))
    assert settled.bf16 is bf16 and settled.step.precision == ("bf16" if bf16 else "fp32")


def test_what_deepspeeds_section_says_decides_for_auto(tmp_path, device):
    device(True)
    section = {**SMALL["deepspeed"], "bf16": {"enabled": False, "check_grad_overflow": True}}
    settled = settle_precision(config(tmp_path, step={"precision": "auto"}, deepspeed=section))
    assert settled.step.precision == "fp32" and settled.deepspeed["bf16"] == {"check_grad_overflow": True}


def test_a_resumed_run_keeps_the_precision_that_it_began_with(tmp_path, device, capsys):
    device(True)
    auto = config(tmp_path, step={"precision": "auto"})
    begin(settle_precision(auto))
    device(False)
    check_run_dir(auto)
    assert settle_precision(auto).bf16 and "began in bf16 and keeps it" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"step\.precision was bf16, is now fp32"):
        check_run_dir(config(tmp_path, step={"precision": "fp32"}))


def test_a_run_of_an_older_config_compares_by_what_it_means(tmp_path, device):
    device(False)
    begin(config(tmp_path, deepspeed={**SMALL["deepspeed"], "bf16": {"enabled": True}}))
    check_run_dir(config(tmp_path, step={"precision": "bf16"}))
    assert settle_precision(config(tmp_path, step={"precision": "auto"})).bf16


@pytest.mark.parametrize("content", ["garbage: [", "\xff", "run: 3", "[]"])
def test_garbage_in_place_of_the_config_is_one_line(tmp_path, content):
    run = config(tmp_path)
    begin(run)
    (run.run_dir / "config.yaml").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.yaml: cannot be read"):
        check_run_dir(run)


def test_a_run_of_minutes_is_finished_when_they_are_used(tmp_path):
    run = config(tmp_path, train={"steps": None, "minutes": 2, "schedule": "cosine"})
    begin(run)
    (run.run_dir / "report.html").write_text("")
    step = run.run_dir / "checkpoints" / "step-7"
    step.mkdir(parents=True)
    for seconds, finished in ((119.0, False), (120.5, True)):
        (step / "state.json").write_text(f'{{"seconds": {seconds}}}')
        assert is_finished(run) is finished


def test_bf16_is_asked_of_the_processor(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for avx512, amx in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda value=avx512: value)
        monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda value=amx: value)
        assert environment.computes_in_bf16() is (avx512 or amx)


def test_a_run_whose_checkpoints_are_gone_does_not_start_anew(tmp_path):
    run = config(tmp_path)
    begin(run)
    check_run_dir(run)  # nothing was saved yet
    log = run.run_dir / "metrics.jsonl"
    log.write_text(log.read_text() + '{"kind": "event", "step": 4, "event": "checkpoint", "detail": "step-4"}\n')
    with pytest.raises(UserError, match="step 4 was saved"):
        check_run_dir(run)
    (run.run_dir / "checkpoints" / "step-4").mkdir(parents=True)
    check_run_dir(run)


def test_a_run_whose_log_is_gone_is_still_compared_with_the_config(tmp_path):
    run = config(tmp_path)
    begin(run)
    (run.run_dir / "checkpoints" / "step-4").mkdir(parents=True)
    (run.run_dir / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"run\.seed was 0, is now 7"):
        check_run_dir(config(tmp_path, run={"seed": 7}))


def test_foreign_lines_of_a_log_are_passed_over(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'3\n[]\n{"kind": "train"}\n\xff\xfe\n{"kind": "train", "step": 2, "loss": 1.0}\n{"kind": "tr')
    assert [row["step"] for row in read_rows(file)] == [2]
