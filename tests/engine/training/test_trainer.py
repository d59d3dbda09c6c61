"""Training as a whole: the same losses for any ZeRO stage, number of ranks and interruption."""

import json

import pytest
from training_runs import SMALL, Runs

from ssast.engine import load_model
from ssast.engine.config import TrainSection
from ssast.engine.training.meters import ChanceWatch
from ssast.engine.training.schedule import Schedule

ENGINES = {
    **{f"zero{stage}": f"deepspeed.zero_optimization.stage={stage}" for stage in range(4)},
    "ddp": "step.engine=ddp",
}
VISIBLE = ("model.encoder_tokens=visible", "model.decoder_depth=1", "model.decoder_width=64", "train.steps=6")
KINDS = [(engine, precision) for engine in ENGINES for precision in ("fp32", "bf16")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, corpus) -> Runs:
    """All jobs of this file: on two ranks every ZeRO stage in both precisions, whole and interrupted; on one rank with
    accumulation.
    """
    runs = Runs(tmp_path_factory.mktemp("runs"), corpus)
    fp32, bf16 = "deepspeed.bf16.enabled=False", "deepspeed.bf16.enabled=True"
    unsaved = "train.checkpoint_every=100"  # but for the last step

    def once(name: str, *overrides: str) -> dict:
        """A run of which the losses are read, and not its checkpoints."""
        return runs.job(name, unsaved, *overrides)

    two: list[dict] = []
    for engine, precision in KINDS:
        name = f"{engine}-{precision}"
        overrides = [ENGINES[engine], f"deepspeed.bf16.enabled={precision == 'bf16'}"]
        two += [runs.job(name, *overrides, report=name == "zero1-bf16"), runs.interrupted(f"{name}-again", name, 4)]
        two += [runs.job(f"{name}-again", *overrides)]
    ddp, targets = ENGINES["ddp"], "objective.softmax_over=targets"
    two += [
        once("objective-separate", "objective.masks=separate"),
        once("objective-generative", "objective.name=generative"),
        once("objective-discriminative", "objective.name=discriminative", targets),
        *(once(f"clipped-{stage}", ENGINES[f"zero{stage}"], "deepspeed.gradient_clipping=1.0") for stage in range(4)),
        once("ddp-accumulate", ddp, "deepspeed.train_micro_batch_size_per_gpu=2"),
        once("ddp-separate", ddp, "objective.masks=separate"),
        once("ddp-generative", ddp, "objective.name=generative"),
        once("ddp-clipped", ddp, "deepspeed.gradient_clipping=1.0"),
        once("plateau", "train.plateau_patience=0"),
        once("two-accumulate", "deepspeed.train_micro_batch_size_per_gpu=2"),
        once("visible-separate", *VISIBLE, "objective.masks=separate"),
    ]
    for engine, override in ENGINES.items():
        save = () if engine in ("zero1", "zero3") else (unsaved,)
        two += [runs.job(f"visible-{engine}", *VISIBLE, override, *save)]
    two += [runs.interrupted("visible-again", "visible-zero3", 4)]
    two += [runs.job("visible-again", *VISIBLE, ENGINES["zero3"])]
    idle = ("train.steps=7", "train.valid_every=1", "deepspeed.optimizer.params.lr=1e-12", ddp)
    two += [runs.job("chance", *idle), runs.interrupted("chance-again", "chance", 4), runs.job("chance-again", *idle)]
    runs.run(2, two)

    whole, resumed = [], []
    for precision, enabled in (("fp32", fp32), ("bf16", bf16)):
        for stage in range(4):
            settings = [ENGINES[f"zero{stage}"], enabled]
            accumulate = "deepspeed.train_micro_batch_size_per_gpu=4"
            whole += [once(f"one-{stage}-{precision}", *settings, accumulate)]
            if stage:
                resumed += [runs.interrupted(f"fewer-{stage}-{precision}", f"zero{stage}-{precision}", 4)]
                resumed += [runs.job(f"fewer-{stage}-{precision}", *settings)]
    whole += [
        runs.job("compiled", "step.compile=encoder", ENGINES["zero1"]),
        once("visible-one", *VISIBLE, ENGINES["zero1"], "deepspeed.train_micro_batch_size_per_gpu=4"),
        once("visible-bf16", *VISIBLE, ENGINES["zero1"], bf16),
        once("visible-continued", *VISIBLE, f"model.init_from={runs.folder / 'zero1-fp32'}", "train.steps=4"),
        once("one-frame", "model.patch_shape=[128,2]", "mask.cluster=null"),
        once("continued", f"model.init_from={runs.folder / 'zero1-fp32'}", "train.steps=4"),
    ]
    resumed += [runs.interrupted("visible-fewer", "visible-zero1", 4)]
    resumed += [runs.job("visible-fewer", *VISIBLE, ENGINES["zero1"])]
    resumed += [runs.interrupted("fewer-ddp", "ddp-fp32", 4), runs.job("fewer-ddp", ddp, fp32)]
    runs.run(1, whole, resumed)
    return runs


def test_zero_stages_agree(runs):
    """fp32: without clipping the same arithmetic in the same order, so the same bits."""
    whole = runs.losses("zero0-fp32")
    assert len(whole) == 9 and whole[-1][1] < whole[0][1]
    for stage in (1, 2, 3):
        for ours, theirs in zip(runs.losses(f"zero{stage}-fp32"), whole, strict=True):
            assert ours == theirs, stage
    for stage in (0, 1, 2, 3):
        for ours, theirs in zip(runs.losses(f"zero{stage}-bf16"), whole, strict=True):
            assert ours[1] == pytest.approx(theirs[1], rel=2e-2), stage


def test_plain_pytorch_agrees_with_deepspeed(runs):
    """fp32: the same bits; bf16: stage 0 computes under autocast, too, and adds up over ranks in the same order."""
    assert runs.losses("ddp-fp32") == runs.losses("zero0-fp32")
    assert runs.losses("ddp-bf16") == runs.losses("zero0-bf16")
    for name, like in (("ddp-accumulate", "two-accumulate"), ("ddp-separate", "objective-separate")):
        for ours, theirs in zip(runs.losses(name), runs.losses(like), strict=True):
            assert ours[1] == pytest.approx(theirs[1], rel=1e-5), name
    for ours, theirs in zip(runs.losses("ddp-clipped"), runs.losses("clipped-0"), strict=True):
        assert ours[1] == pytest.approx(theirs[1], rel=1e-3)
    assert runs.losses("ddp-clipped")[-1] != runs.losses("ddp-fp32")[-1]
    assert all(row["grad_norm"] > 0 for row in runs.rows("ddp-fp32", "train"))
    for row in runs.rows("ddp-generative", "train"):
        assert row["nce"] is None and row["loss"] == row["mse"]
    for ours, theirs in zip(runs.losses("fewer-ddp"), runs.losses("ddp-fp32"), strict=True):
        assert ours[1] == pytest.approx(theirs[1], rel=1e-5)


def test_compiled_training_agrees_and_compiles_no_more_after_two_steps(runs):
    """With validations and checkpoints in between; a recompilation after step 2 would have ended the run. Compiled code
    rounds otherwise, and Adam enlarges it.
    """
    for ours, theirs in zip(runs.losses("compiled"), runs.losses("one-1-fp32"), strict=True):
        assert ours[1] == pytest.approx(theirs[1], rel=1e-5 if ours[0] == 1 else 1e-3)
    assert runs.losses("compiled")[-1] != runs.losses("one-1-fp32")[-1], "nothing was compiled"
    (step,) = [row["detail"] for row in runs.rows("compiled", "event") if row["event"] == "step"]
    assert "compile: encoder, default (as configured)" in step


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_rank_with_accumulation_equals_two_ranks(runs, stage):
    for kind in ("train", "valid"):
        for ours, theirs in zip(
            runs.losses(f"one-{stage}-fp32", kind), runs.losses(f"zero{stage}-fp32", kind), strict=True
        ):
            assert ours == theirs
        # bf16: micro-batches add up in fp32, ranks at stages 2 and 3 in bf16
        for ours, theirs in zip(
            runs.losses(f"one-{stage}-bf16", kind), runs.losses(f"zero{stage}-bf16", kind), strict=True
        ):
            assert ours[1] == pytest.approx(theirs[1], rel=2e-3)


def test_smaller_micro_batches_sum_to_the_same(runs):
    """Two of two clips instead of one of four: other shapes round otherwise, and Adam enlarges it."""
    for ours, theirs in zip(runs.losses("two-accumulate"), runs.losses("zero0-fp32"), strict=True):
        assert ours[1] == pytest.approx(theirs[1], rel=1e-3)


def test_clipping_agrees_between_stages(runs):
    """The norm is summed in another order at each stage; Adam turns the last bit of a gradient that is all but zero
    into a step of its full size, so after nine steps only 1e-3 is left of the agreement.
    """
    for stage in (1, 2, 3):
        for ours, theirs in zip(runs.losses(f"clipped-{stage}"), runs.losses("clipped-0"), strict=True):
            assert ours[1] == pytest.approx(theirs[1], rel=1e-3), stage
    assert runs.losses("clipped-0")[-1] != runs.losses("zero0-fp32")[-1]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_can_be_gone_on_with_on_one(runs, stage):
    for precision, tolerance in (("fp32", 1e-5), ("bf16", 5e-3)):
        for ours, theirs in zip(
            runs.losses(f"fewer-{stage}-{precision}"), runs.losses(f"zero{stage}-{precision}"), strict=True
        ):
            assert ours[1] == pytest.approx(theirs[1], rel=tolerance), precision


@pytest.mark.parametrize(("engine", "precision"), KINDS)
def test_interrupted_equals_uninterrupted(runs, engine, precision):
    """Bit for bit, training and validation, learning rate and gradient norm, from the checkpoint on and in the log
    before it.
    """
    name = f"{engine}-{precision}"
    resumed = [row for row in runs.rows(f"{name}-again", "event") if row["event"] == "resume"]
    assert [row["step"] for row in resumed] == [4]
    for kind in ("train", "valid"):
        assert runs.losses(f"{name}-again", kind) == runs.losses(name, kind)
    for ours, theirs in zip(runs.rows(f"{name}-again", "train"), runs.rows(name, "train"), strict=True):
        assert (ours["lr"], ours["grad_norm"], ours["samples"]) == (
            theirs["lr"],
            theirs["grad_norm"],
            theirs["samples"],
        )


@pytest.mark.parametrize(("engine", "precision"), KINDS)
def test_checkpoints_hold_the_whole_model_in_fp32(runs, engine, precision):
    """Whatever the stage, `load_model` gives the same weights, and the resumed run's are bit-equal."""
    name = f"{engine}-{precision}"
    ours, again, plain = (
        load_model(runs.path(run) / "checkpoints" / "step-9") for run in (name, f"{name}-again", "zero0-fp32")
    )
    for (key, value), resumed, reference in zip(
        ours.state_dict().items(), again.state_dict().values(), plain.state_dict().values(), strict=True
    ):
        assert value.equal(resumed), key
        tolerance = 2e-4 if precision == "fp32" else 2e-2
        assert (value - reference).abs().max() < tolerance, key


def test_gradient_norm_is_logged_at_every_stage(runs):
    norms = {
        name: [row["grad_norm"] for row in runs.rows(name, "train")]
        for name in ("zero0-fp32", "zero1-fp32", "zero3-fp32")
    }
    assert all(norm > 0 for norm in norms["zero0-fp32"])
    for name in ("zero1-fp32", "zero3-fp32"):
        assert norms[name] == pytest.approx(norms["zero0-fp32"], rel=1e-4)


def test_learning_rate_warms_up_and_halves(runs):
    schedule = Schedule(TrainSection(**{**SMALL["train"], "plateau_patience": 0}), 1e-3)
    validations = {row["step"]: row["accuracy"] for row in runs.rows("plateau", "valid")}
    for row in runs.rows("plateau", "train"):
        assert row["lr"] == schedule.lr(row["step"] - 1)
        if row["step"] in validations:
            schedule.after_validation(validations[row["step"]])
    assert schedule.factor < 1.0


def test_objectives(runs):
    for row in runs.rows("objective-generative", "train"):
        assert row["nce"] is None and row["accuracy"] is None and row["loss"] == row["mse"]
    for row in runs.rows("objective-discriminative", "train"):
        assert row["mse"] is None and row["loss"] == row["nce"]
    separate, shared = runs.losses("objective-separate"), runs.losses("zero0-fp32")
    assert separate[0][2] == pytest.approx(shared[0][2], abs=1e-5) and separate[0][3] != shared[0][3]
    best = json.loads((runs.path("objective-generative") / "checkpoints" / "best" / "best.json").read_text())
    assert best["metric"] == "mse"


def test_visible_encoders_train_the_same_way(runs):
    """fp32: ZeRO stages, plain PyTorch, an interruption and one rank with accumulation, all to the bit."""
    whole = runs.losses("visible-zero0")
    valid = runs.losses("visible-zero0", "valid")
    assert len(whole) == 6 and valid[-1][1] < valid[0][1]
    for name in ("zero1", "zero2", "zero3", "ddp", "again", "one"):
        assert runs.losses(f"visible-{name}") == whole, name
    assert runs.losses("visible-again", "valid") == runs.losses("visible-zero3", "valid")
    assert [row["step"] for row in runs.rows("visible-again", "event") if row["event"] == "resume"] == [4]
    for name, tolerance in (("fewer", 1e-5), ("bf16", 2e-2)):
        for ours, theirs in zip(runs.losses(f"visible-{name}"), whole, strict=True):
            assert ours[1] == pytest.approx(theirs[1], rel=tolerance), name
    separate = runs.losses("visible-separate")
    assert separate[0][2] == pytest.approx(whole[0][2], abs=1e-5) and separate[0][3] != whole[0][3]


def test_a_visible_run_starts_from_an_ssast_checkpoint(runs):
    """Its encoder is the trained one, its decoder is not: what it says at first is no better than a fresh model's."""
    ours, theirs = (load_model(runs.path(name)) for name in ("visible-continued", "zero1-fp32"))
    moved = (ours.embedding.weight - theirs.embedding.weight).abs().max()
    assert 0 < moved < 0.01 and ours.decoder is not None and theirs.decoder is None


def test_frame_model_trains(runs):
    losses = runs.losses("one-frame")
    assert losses[-1][1] < losses[0][1]


def test_continued_pretraining_starts_where_the_other_run_ended(runs):
    """Its first loss is that of a trained model, far below that of a fresh one."""
    assert runs.losses("continued")[0][1] < runs.losses("zero1-fp32")[0][1] - 1.0


def test_run_folder_is_complete(runs):
    folder = runs.path("zero1-bf16")
    for name in (
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "skipped.csv",
        "data.json",
        "report.html",
        "source.diff",
    ):
        assert (folder / name).is_file(), name
    assert list((folder / "tensorboard").iterdir())
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir() if path.is_dir())
    assert kept == ["best", "step-4", "step-8", "step-9"]
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["world_size"] == 2 and environment["torch"]
    best = json.loads((folder / "checkpoints" / "best" / "best.json").read_text())
    values = {row["step"]: row["accuracy"] for row in runs.rows("zero1-bf16", "valid")}
    assert best["value"] == values[best["step"]] == max(values.values())


def test_a_run_that_stays_at_chance_warns_once(runs):
    """With a learning rate of nearly nothing; a resumed run goes on counting."""
    for name in ("chance", "chance-again"):
        assert [row["step"] for row in runs.rows(name, "event") if row["event"] == "chance"] == [5]
    assert [row["step"] for row in runs.rows("chance-again", "event") if row["event"] == "resume"] == [4]


def test_a_run_that_has_learned_is_not_warned():
    watch = ChanceWatch()
    assert not any(watch.after_validation(at_chance) for at_chance in [True] * 4 + [False] + [True] * 9)
