"""`ssast finetune TASK [key.sub=value ...]`; under a launcher: `deepspeed --module ssast.engine.finetune.run TASK ...`,
or torchrun.

A command is a list of runs, one for each arm, seed and fold, done one after the other in folders of their own. Finished
ones are not done again, so the same command resumes after an interruption, and a longer one (more seeds, another arm)
adds to what there is.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from ssast.engine.config import dump_config, list_presets, load_config
from ssast.engine.data.dataset import check_reachable
from ssast.engine.data.decode import AudioDecoder
from ssast.engine.data.loader import Batch, ClipReader, Shard, batches_of_all
from ssast.engine.distributed.interrupt import STOPPED, StopRequest
from ssast.engine.distributed.launch import add_rank_options, count_ranks, launch, one_line_errors, supervised
from ssast.engine.distributed.ranks import Ranks, be_deterministic, join_ranks, place_in_world
from ssast.engine.errors import UserError
from ssast.engine.files import expand_path, write_whole
from ssast.engine.model.adapt import build_model, init_classifier, resize
from ssast.engine.model.config import WIDTHS, ModelCard, ModelConfig
from ssast.engine.model.ssast import SSAST
from ssast.engine.model.weights import WEIGHTS_FILE, load_model, save_model
from ssast.engine.process import leave
from ssast.engine.training.backends import choose_backend
from ssast.engine.training.checkpoint import checkpoint_steps
from ssast.engine.training.rundir import check_run_dir, locked, measured_statistics, prepare_run_dir, settle_precision
from ssast.engine.training.runlog import read_rows
from ssast.engine.training.trainer import Trainer

from .config import SCRATCH, FinetuneConfig
from .dataset import LabelledClips, TaskData, open_task, read_task
from .finetune_report import write_summary
from .metrics import class_metrics, per_class, write_predictions
from .objective import FineTuning, freeze_encoder
from .pictures import CURVES, write_learning_curve, write_pictures
from .results import RESULTS_FILE, print_summary

LARGE = 2_000_000  # scores; more are written as .npz
Arm = tuple[str, str | None]


@dataclass(frozen=True)
class Run:
    """One training run of a command; `arm`, `seed` and `fold` are what tells it from the others."""

    arm: str
    seed: int
    fold: str | None
    config: FinetuneConfig


def main(argv: list[str] | None = None) -> int:
    """Command-line entry; returns the exit status."""
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    return one_line_errors(lambda: _start(arguments))


def _start(arguments: argparse.Namespace) -> int:
    compared = [text for text in arguments.compare if not _is_setting(text)]
    overrides = [*arguments.overrides, *(text for text in arguments.compare if _is_setting(text))]
    arms = _arms(compared)
    if arms and arguments.init_from is not None:
        raise UserError("--from, --compare: the arms say what each starts from; give one of the two")
    if arguments.seeds < 1:
        raise UserError(f"--seeds {arguments.seeds}: at least one is needed")
    if arguments.init_from is not None:
        overrides.append(f"model.init_from={arguments.init_from}")
    config = load_config(arguments.task, overrides, FinetuneConfig)
    place = place_in_world()
    ranks = count_ranks(arguments.ranks) if place is None else place.world_size
    config.batch_sizes(ranks)
    if arguments.dry_run:
        choose_backend(config.step.engine).check(config)
        print(dump_config(config).rstrip())
        return 0
    if place is None and ranks > 1:
        command = [arguments.task, *overrides, "--seeds", str(arguments.seeds)]
        command += ["--compare", *compared] if compared else []
        status = launch(ranks, "ssast.engine.finetune.run", command, engine=config.step.engine)
        if status is None:
            print("ssast: stopped; run the same command to resume from the last checkpoint", file=sys.stderr)
            return STOPPED
        return status
    return supervised(lambda stop_request: run_all(config, arms, arguments.seeds, stop_request))


def run_all(config: FinetuneConfig, arms: list[Arm], seeds: int, stop_request: StopRequest) -> int:
    """All runs of the command on the ranks that there are, and their table.

    Raises:
        UserError: mixup with micro-batches of one clip.
    """
    ranks = join_ranks()
    if config.run.deterministic:
        be_deterministic()
    micro_batch, _ = config.batch_sizes(ranks.world_size)
    if config.augment.mixup and micro_batch == 1:
        raise UserError(
            "augment.mixup: clips are mixed within a micro-batch, which has one clip here; make it larger, or set "
            "mixup to 0"
        )
    choose_backend(config.step.engine).check(config)
    read = ranks.once(lambda: read_task(config))
    runs = list(plan(config, arms, seeds, read))
    ranks.once(lambda: _check_folds(runs, read))
    if ranks.is_first and not arms and config.model.init_from is None:
        print("note: no weights to start from are named (--from PATH): training from scratch")
    with contextlib.ExitStack() as stack:
        ranks.once(lambda: stack.enter_context(locked(config.run_dir)))
        for number, run in enumerate(runs, start=1):
            if ranks.is_first and len(runs) > 1:
                print(f"run {number} of {len(runs)}: {run.config.run_dir}", flush=True)
            if not _run(run, read, ranks, stop_request):
                ranks.once(lambda: print("stopped and saved; run the same command to resume", flush=True))
                return STOPPED
    if ranks.is_first:
        folders = [run.config.run_dir for run in runs]
        print_summary(config.run_dir, folders)
        print(f"report: {write_summary(config, folders)}")
    return 0


def plan(config: FinetuneConfig, arms: list[Arm], seeds: int, read: LabelledClips) -> Iterator[Run]:
    """The runs: arms, then seeds, then folds. Where there is no comparison, there is no folder level for arms, and so
    for folds; the first seed has none, so that more of them only add to what there is.
    """
    folds = [config.task.fold] if config.task.folds is None or config.task.fold is not None else _folds(config, read)
    for name, of_arm in _with_arms(config, arms) if arms else [("", config)]:
        for seed in range(config.run.seed, config.run.seed + seeds):
            for fold in folds:
                parts = [name] if name else []
                parts += [f"seed-{seed}"] if seed != config.run.seed else []
                parts += [f"fold-{fold}"] if len(folds) > 1 else []
                of_fold = of_arm.model_copy(update={"task": of_arm.task.model_copy(update={"fold": fold})})
                one = of_fold.named(*parts)
                yield Run(name, seed, fold, one.model_copy(update={"run": one.run.model_copy(update={"seed": seed})}))


def _folds(config: FinetuneConfig, read: LabelledClips) -> list[str]:
    there = read.folds()
    count = config.task.folds or 0
    if there and len(there) != count:
        raise UserError(f"task.folds: {count}, but the clips come in {len(there)} folds ({', '.join(there)})")
    return there or [str(number) for number in range(1, count + 1)]


def _check_folds(runs: list[Run], read: LabelledClips) -> None:
    """Split the clips for every fold, where there are several, before the first is trained.

    Raises:
        UserError: what `open_task` finds wrong with a fold.
    """
    of_fold = {run.fold: run for run in runs}
    for fold, run in of_fold.items() if len(of_fold) > 1 else ():
        try:
            open_task(run.config, read, (0.0, 1.0))
        except UserError as error:
            raise UserError(f"fold {fold}: {error}") from None


def _with_arms(config: FinetuneConfig, arms: list[Arm]) -> Iterator[tuple[str, FinetuneConfig]]:
    """Each arm's config. A model from scratch is of the size of the first weights that it is compared with.

    Raises:
        UserError: weights that cannot be loaded or are of another patch shape, before anything is trained.
    """
    shape: dict[str, Any] = {}
    shapes = {path: load_model(path).config for _, path in arms if path is not None}
    for weights, model_config in shapes.items():
        _check_patches(config, weights, model_config)
    if shapes:
        weights, model_config = next(iter(shapes.items()))
        size = next((name for name, width in WIDTHS.items() if width == model_config.width), None)
        if size is None and any(path is None for _, path in arms):
            raise UserError(
                f"{weights}: width {model_config.width} is none of {', '.join(WIDTHS)}, so no arm from "
                "scratch can be like it"
            )
        stride = config.model.stride or model_config.stride
        shape = {"size": size, "depth": model_config.depth, "patch_shape": model_config.patch_shape, "stride": stride}
    for name, path in arms:
        changes: dict[str, Any] = {"init_from": path, **(shape if path is None else {})}
        yield name, config.model_copy(update={"model": config.model.model_copy(update=changes)})


def _statistics_of_weights(config: FinetuneConfig) -> tuple[float, float] | None:
    """Mean and std of the features that the weights to start from know: fine-tuning on features that lie elsewhere
    begins worse.
    """
    if config.model.init_from is None:
        return None
    card = load_model(config.model.init_from).card
    return card.mean, card.std


def _run(run: Run, read: LabelledClips, ranks: Ranks, stop_request: StopRequest) -> bool:
    """Train and test, or see that this was done; False if asked to stop before the end."""
    config = ranks.once(lambda: settle_precision(run.config))
    data = ranks.once(lambda: open_task(config, read, measured_statistics(config) or _statistics_of_weights(config)))
    check_reachable(data)
    config = config.timed(len(data.train), ranks.world_size)
    ranks.once(lambda: check_run_dir(config))
    if ranks.once(lambda: _is_finished(config)):
        return True
    if ranks.is_first:
        for remark in data.remarks:
            print(f"note: {remark}")
    ranks.once(lambda: prepare_run_dir(config, data, ranks.world_size))
    trainer = Trainer(config, data, start_model(config, data), ranks, FineTuning(config, data, ranks))
    with stop_request:
        finished = trainer.train(stop_request)
    trainer.release()
    del trainer
    gc.collect()  # a compiled model is in a cycle with itself, and the next one needs its memory
    if finished:
        _test(run, config, data, ranks)
    return finished


def _is_finished(config: FinetuneConfig) -> bool:
    """Whether the run folder holds results of this many steps.

    Raises:
        UserError: those of more steps.
    """
    file = config.run_dir / RESULTS_FILE
    steps = json.loads(file.read_text(encoding="utf-8"))["steps"] if file.is_file() else 0
    target = config.train.steps
    assert target is not None  # see `FinetuneConfig.timed`
    if steps > target:
        raise UserError(
            f"{config.run_dir}: holds a finished run of {steps} steps, not {target}; choose another run.name"
        )
    return steps == target


def start_model(config: FinetuneConfig, data: TaskData) -> SSAST:
    """The model as it is before the first step.

    Raises:
        UserError: weights that are not of the size or patch shape that the config names, or that cannot follow its
            input.
    """
    section, classes, seed = config.model, len(data.labels), config.run.seed
    if section.init_from is None:
        model = build_model(dataclasses.replace(config.architecture, num_classes=classes), seed)
    else:
        model = load_model(
            section.init_from,
            num_classes=classes,
            input_frames=section.input_frames,
            stride=section.stride,
            input_bins=section.num_mel_bins,
            position_resize=section.position_resize,
        )
        _check_patches(config, section.init_from, model.config)
        if model.card.sample_rate != config.data.sample_rate:
            raise UserError(
                f"{section.init_from}: is for sound at {model.card.sample_rate} Hz; set "
                f"data.sample_rate={model.card.sample_rate}"
            )
        init_classifier(model, torch.Generator().manual_seed(seed))
        if model.config.layer_weights:  # of another task
            model = resize(model, dataclasses.replace(model.config, layer_weights=False))
    if section.layer_weights:
        model = resize(model, dataclasses.replace(model.config, layer_weights=True))
    if section.train == "head":
        freeze_encoder(model)
    model.card = ModelCard(
        config.data.sample_rate, data.mean, data.std, tuple(data.labels), config.task.multi_label, section.pool
    )
    return model


def _check_patches(config: FinetuneConfig, path: str, model_config: ModelConfig) -> None:
    patch_shape = config.model.patch_shape
    if patch_shape not in (None, model_config.patch_shape):
        ours, theirs = ("x".join(map(str, shape)) for shape in (patch_shape, model_config.patch_shape))
        raise UserError(
            f"{path}: has patches of {theirs}, this task is set up for {ours}; take a recipe for {theirs} "
            f"({'NAME-frame' if model_config.patch_shape[0] > patch_shape[0] else 'the one without -frame'}), or set "
            "model.patch_shape and "
            "model.stride"
        )


def _test(run: Run, config: FinetuneConfig, data: TaskData, ranks: Ranks) -> None:
    """Measure the chosen weights on the test clips, and leave them, the answers and the figures in the run folder."""
    model, selection = _select_model(config)
    if config.model.train == "head":
        _put_back_frozen(model, start_model(config, data))
    if ranks.is_first:
        save_model(model, config.run_dir / WEIGHTS_FILE)
    objective = FineTuning(config, data, ranks)
    model.to(ranks.device, torch.bfloat16 if config.bf16 and not config.uses_autocast else torch.float32)
    scores, read = objective.scores(model, _test_batches(config, data, ranks), len(data.test))
    if not ranks.is_first:
        return
    notes = list(data.remarks)
    whole = read == np.arange(len(read))  # in the place of a clip that breaks after the check another one is read
    if not whole.all():
        first = data.test.sources[int(np.argmin(whole))]
        notes.append(f"{(~whole).sum()} test clips could not be read any more and are left out; the first is {first}")
        print(f"warning: {notes[-1]}", flush=True)
    scores, read = scores[whole], read[whole]
    targets = data.test_targets[read]
    metrics = class_metrics(scores, targets, data.labels, config.task.multi_label)
    predictions = config.run_dir / f"predictions.{'npz' if scores.size > LARGE else 'csv'}"
    write_predictions(predictions, list(data.test.subset(read).sources), scores, targets, data.labels)
    write_pictures(config.run_dir, scores, targets, data.labels, config.task.multi_label)
    write_learning_curve(config.run_dir / "learning.png", read_rows(config.run_dir / "metrics.jsonl"), CURVES, x="step")
    result = {
        "arm": run.arm,
        "seed": run.seed,
        "fold": run.fold,
        "metric": config.metric,
        "metrics": {name: value if math.isfinite(value) else None for name, value in metrics.items()},
        "weights": selection,
        "clips": {"train": len(data.train), "valid": len(data.valid), "test": len(read)},
        "steps": config.train.steps,
        "init_from": config.model.init_from,
        "notes": notes,
        "classes": per_class(scores, targets, data.labels, config.task.multi_label),
    }
    write_whole(config.run_dir / RESULTS_FILE, json.dumps(result, indent=2, allow_nan=False) + "\n")
    print(
        f"{config.run_dir}: test {config.metric} {metrics[config.metric]:.4f} on {len(read)} clips ({selection})",
        flush=True,
    )


def _select_model(config: FinetuneConfig) -> tuple[SSAST, str]:
    """The model that `task.select` asks for, and what to call it."""
    folder = config.run_dir / "checkpoints"
    epochs = sorted((folder / "epochs").glob("*.safetensors"), key=lambda path: int(path.stem))
    if config.task.select == "average" and epochs:
        model = load_model(epochs[0])
        total = model.state_dict()
        for file in epochs[1:]:
            for name, value in load_file(file).items():
                total[name] += value
        model.load_state_dict({name: value / len(epochs) for name, value in total.items()})
        return model, f"average of {len(epochs)} epochs, {epochs[0].stem} to {epochs[-1].stem}"
    if config.task.select == "best" and (folder / "best" / WEIGHTS_FILE).is_file():
        best = json.loads((folder / "best" / "best.json").read_text(encoding="utf-8"))
        return load_model(folder / "best"), f"best validation {best['metric']}, step {best['step']}"
    step = checkpoint_steps(config.run_dir)[-1]
    return load_model(folder / f"step-{step}"), f"last, step {step}"


@torch.no_grad()
def _put_back_frozen(model: SSAST, start: SSAST) -> None:
    """Weights that were not trained, bit for bit: ZeRO has no fp32 masters of them, so that checkpoints in bf16 hold
    them rounded.
    """
    for trained, before in zip(model.parameters(), start.parameters(), strict=True):
        if not before.requires_grad:
            if not torch.equal(trained.bfloat16(), before.bfloat16()):
                raise UserError(
                    "model.init_from: holds other weights than when training began; start from a file that stays as "
                    "it is"
                )
            trained.copy_(before)


def _test_batches(config: FinetuneConfig, data: TaskData, ranks: Ranks) -> Iterator[tuple[Batch, int]]:
    """This rank's test clips."""
    micro_batch, _ = config.batch_sizes(ranks.world_size)
    decoder = AudioDecoder(
        data.test,
        num_samples=config.num_samples,
        sample_rate=config.data.sample_rate,
        batch_size=micro_batch,
        num_threads=config.data.num_threads,
    )
    with contextlib.closing(decoder):
        reader = ClipReader(decoder, None, max_bad_fraction=config.data.max_bad_fraction)
        yield from batches_of_all(reader, len(data.test), Shard(ranks.rank, ranks.world_size, micro_batch))


def _is_setting(text: str) -> bool:
    """Whether what follows --compare is a setting rather than an arm."""
    section, dot, _ = text.partition("=")[0].partition(".")
    return bool(dot) and section in FinetuneConfig.model_fields


def _arms(compared: list[str]) -> list[Arm]:
    """NAME=PATH, with "none" for from scratch."""
    arms: list[Arm] = []
    for text in compared:
        name, equals, path = text.partition("=")
        if not equals or not name or not path or "/" in name:
            raise UserError(f"--compare {text}: an arm is written NAME=PATH, or NAME=none for one from scratch")
        if name in dict(arms):
            raise UserError(f"--compare {text}: there is another arm called {name}")
        arms.append((name, None if path == SCRATCH else expand_path(path)))
    return arms


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ssast finetune",
        description="Train a classifier on labelled audio, from pretrained weights or from scratch, and test it.",
        epilog=f"tasks: {', '.join(list_presets(FinetuneConfig))}; a CSV of path and label is data.train of the task "
        "custom",
    )
    parser.add_argument("task", metavar="TASK", help="the name of a recipe, or a YAML file")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="changes to the recipe, e.g. data.train=/data/ESC-50 train.epochs=10",
    )
    parser.add_argument(
        "--from", dest="init_from", metavar="PATH", help=f"weights to start from, or {SCRATCH} (model.init_from)"
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="NAME=PATH",
        help=f"train each of these with equal budgets; {SCRATCH}: from scratch",
    )
    parser.add_argument("--seeds", type=int, default=1, help="runs with so many seeds from run.seed on")
    add_rank_options(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings, and stop")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    leave(main())
