"""`ssast pretrain CONFIG [key.sub=value ...]`; under a launcher: `deepspeed --module ssast.engine.pretrain CONFIG ...`,
or torchrun.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from .config import Config, list_presets, load_config
from .distributed.interrupt import STOPPED
from .distributed.launch import add_rank_options, count_ranks, launch, one_line_errors, supervised
from .distributed.ranks import be_deterministic, join_ranks, place_in_world
from .errors import UserError
from .model.adapt import build_model, resize, unshared_parts
from .model.config import ModelCard
from .model.ssast import SSAST
from .model.weights import load_model
from .process import leave
from .training.checkpoint import checkpoint_steps
from .training.rundir import check_run_dir, is_finished, locked, measured_statistics, prepare_run_dir, settle_precision
from .training.runlog import read_rows

if TYPE_CHECKING:
    from .data.dataset import Dataset
    from .distributed.interrupt import StopRequest
    from .training.schedule import Progress


def main(argv: list[str] | None = None) -> int:
    """Command-line entry; returns the exit status."""
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    return one_line_errors(lambda: _start(arguments))


def _start(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    place = place_in_world()
    ranks = count_ranks(arguments.ranks) if place is None else place.world_size
    config.batch_sizes(ranks)
    if arguments.dry_run:
        from .dry_run import describe_run
        from .training.backends import choose_backend

        choose_backend(config.step.engine).check(config)
        print(describe_run(config, ranks))
        return 0
    if place is None:
        check_run_dir(config)
        if ranks > 1:
            command = [arguments.config, *arguments.overrides]
            status = launch(ranks, "ssast.engine.pretrain", command, engine=config.step.engine)
            return status if status is not None else _status_after_stop(config)
    return run(config)


def run(config: Config) -> int:
    """Pretrain on the ranks that there are. 0 when finished, `STOPPED` when asked to stop and saved."""
    return supervised(lambda stop_request: _train(config, stop_request))


def _train(config: Config, stop_request: StopRequest) -> int:
    from .data.dataset import check_reachable, open_dataset
    from .training.auto_batch import find_auto_batch, with_micro_batch
    from .training.backends import choose_backend
    from .training.pretraining import Pretraining
    from .training.trainer import Trainer

    ranks = join_ranks()
    choose_backend(config.step.engine).check(config)
    config = ranks.once(lambda: settle_precision(config))
    if config.run.deterministic:
        be_deterministic()
    if ranks.once(lambda: is_finished(config)):
        if ranks.is_first:
            print(f"{config.run_dir}: already finished; the report is {config.run_dir / 'report.html'}")
        return 0
    bins, samples = config.model.num_mel_bins, config.num_samples
    data = ranks.once(lambda: open_dataset(config.data, bins, samples, measured_statistics(config)))
    check_reachable(data)
    resumes = bool(checkpoint_steps(config.run_dir))
    say = print if ranks.is_first else lambda text: None
    model = build_model(config.architecture) if resumes else start_model(config, say)
    model.card = ModelCard(config.data.sample_rate, data.mean, data.std)
    with contextlib.ExitStack() as stack:
        ranks.once(lambda: stack.enter_context(locked(config.run_dir)))
        ranks.once(lambda: prepare_run_dir(config, data, ranks.world_size))
        if config.step.auto_batch:
            sizes = find_auto_batch(config, ranks)
            if ranks.is_first:
                print(sizes)
            config = with_micro_batch(config, sizes, ranks.world_size)
        trainer = Trainer(config, data, model, ranks, Pretraining(config, data, ranks))
        with stop_request:
            done = trainer.train(stop_request)
        ranks.once(lambda: _finish(config, data, trainer.progress, done))  # a launcher ends all when the first leaves
    return 0 if done else STOPPED


def start_model(config: Config, say: Callable[[str], object] = print) -> SSAST:
    """A fresh model, or the weights of `model.init_from` fitted to this config's input and kind of model; `say` is told
    which of its parts are fresh, and which of the file's are left behind.

    Raises:
        UserError: weights that do not fit.
    """
    architecture = config.architecture
    if config.model.init_from is None:
        return build_model(architecture, config.run.seed)
    model = load_model(config.model.init_from, heads=architecture.heads)
    if not model.config.pretraining_heads:
        raise UserError(
            f"{config.model.init_from}: is a fine-tuned model without pretraining heads; it cannot be pretrained on"
        )
    try:
        started = resize(model, architecture)
    except ValueError as error:
        raise UserError(f"{config.model.init_from}: does not fit model.*: {error} (file: {model.config})") from None
    fresh, left = unshared_parts(started, model), unshared_parts(model, started)
    if fresh or left:
        kinds = f"encoder_tokens {model.config.encoder_tokens} -> {architecture.encoder_tokens}"
        say(
            f"{config.model.init_from}: the encoder's weights are taken ({kinds}); freshly initialised: "
            f"{', '.join(fresh) or 'nothing'}; left behind: {', '.join(left) or 'nothing'}"
        )
    return started


def _finish(config: Config, data: Dataset, progress: Progress, done: bool) -> None:
    from .report.run import write_report
    from .training.preview import write_preview

    write_preview(config, data, config.run_dir, progress.step)
    report = write_report(config.run_dir)
    if done:
        print(f"finished {progress.step} steps; report: {report}")
    else:
        where = progress.at(progress.step)
        print(f"stopped at {where}, saved; run the same command to resume; report so far: {report}")


def _status_after_stop(config: Config) -> int:
    """By the last thing that the run wrote down before it left."""
    rows = read_rows(config.run_dir / "metrics.jsonl")
    status = {"stop": STOPPED, "done": 0}.get(rows[-1].get("event", "") if rows else "")
    if status is not None:
        return status
    print("ssast: stopped without saving; the last checkpoint, if there is one, is whole", file=sys.stderr)
    return 1


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ssast pretrain",
        description="Pretrain an audio spectrogram transformer on unlabeled audio.",
        epilog=f"presets: {', '.join(list_presets())}",
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file or the name of a preset")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="changes to the config, e.g. data.train=/audio train.steps=1000",
    )
    add_rank_options(parser)
    parser.add_argument(
        "--auto-batch",
        action="store_true",
        help="cut the batch into as few micro-batches as fit into memory (step.auto_batch=true)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved config, parameters, FLOPs and memory, and stop"
    )
    arguments = parser.parse_intermixed_args(argv)
    if arguments.auto_batch:
        arguments.overrides.append("step.auto_batch=true")
    return arguments


if __name__ == "__main__":
    leave(main())
