"""One measurement of the training step, in processes of its own: `python -m ssast.benchmarks.throughput.measure OUT
CONFIG ...`, started by `ssast profile`, by hand or by a launcher. Rank 0 writes OUT, a JSON file.

The step is the trainer's own, `Trainer.run_step`, with its data path and its collectives. It is timed without any
instrument; then traced by torch.profiler for a few steps; then fed from the device's memory (what the model alone could
do); then the loader is drained without a model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ssast.benchmarks.machine import DeviceWatch, device_name, gpu_facts, peak_tflops
from ssast.engine.config import Config, load_config
from ssast.engine.data.clips import Clips
from ssast.engine.data.dataset import Dataset, open_dataset
from ssast.engine.data.loader import Batch
from ssast.engine.data.texts import Texts
from ssast.engine.distributed.launch import one_line_errors
from ssast.engine.distributed.ranks import Ranks, join_ranks
from ssast.engine.files import write_whole
from ssast.engine.model.adapt import build_model
from ssast.engine.model.cost import flop_formula, flops_per_clip
from ssast.engine.process import leave
from ssast.engine.training.auto_batch import activation_bytes, find_auto_batch, with_micro_batch
from ssast.engine.training.pretraining import Pretraining
from ssast.engine.training.trainer import Trainer
from ssast.kernels import NUM_PREFIX

from .ceilings import ceiling_rates
from .timeline import floor_seconds, read_trace, step_parts, top_kernels

TRACED_STEPS = 4  # on a GPU the last only marks the end of the one before
TOP_KERNELS = 15
BATCHES_IN_MEMORY = 4
LOUDNESS = 2000  # of the noise that stands for sound, of 32767


def main(argv: list[str] | None = None) -> int:
    """One rank of a measurement; exit status 0, or that of a mistake in the config."""
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    return in_scratch(arguments, lambda config, ranks, folder: measure(config, ranks, arguments, folder))


def in_scratch(arguments: argparse.Namespace, work: Callable[[Config, Ranks, Path], Any]) -> int:
    """The exit status of a measurement `work`, with the config of the command line, the ranks that there are and a
    folder that is gone afterwards; rank 0 writes what it returns. Of an interruption `ssast profile` tells.
    """

    def run() -> int:
        config: Config = load_config(arguments.config, arguments.overrides)
        ranks = join_ranks()
        with tempfile.TemporaryDirectory() as folder:
            measured = work(config, ranks, Path(folder))
        if ranks.is_first:
            write_whole(arguments.out, json.dumps(measured))
        dist.barrier()
        return 0

    return one_line_errors(run, on_interrupt="")


def measure(config: Config, ranks: Ranks, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What profile.json says of one run; with `arguments.quick` only "setup" and "steps"."""
    asked, feeds_from_files = config, bool(config.data.train) and not arguments.synthetic
    fitting = find_auto_batch(config, ranks) if config.step.auto_batch else None
    if fitting:
        config = with_micro_batch(config, fitting, ranks.world_size)
    config = undisturbed(config, folder)
    bins, samples = config.model.num_mel_bins, config.num_samples
    data = ranks.once(lambda: open_dataset(config.data, bins, samples)) if feeds_from_files else nothing_to_read(config)
    trainer = pretrainer(config, data, ranks)
    memory = in_memory(trainer, ranks.device if not feeds_from_files else torch.device("cpu"))
    loader = trainer.train_loader() if feeds_from_files else None
    batches = loader or iter(memory)
    try:
        run_steps(trainer, batches, arguments.warmup)
        if ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with DeviceWatch(ranks.device) as watch:
            seconds, waits = run_steps(trainer, batches, arguments.steps)
        measured = {
            "setup": describe(trainer, feeds_from_files),
            "steps": {"warmup": arguments.warmup, "seconds": seconds, "data_wait_seconds": waits},
            "memory": memory_split(trainer),
            "auto_batch": {"largest": fitting.largest, "used": fitting.used} if fitting else None,
        }
        if arguments.quick:
            return measured
        trace = trace_steps(trainer, batches, arguments.out.parent / "traces")
    finally:
        if loader is not None:
            loader.close()
    resident = in_memory(trainer, ranks.device)
    run_steps(trainer, iter(resident), 2)
    seconds, _ = run_steps(trainer, iter(resident), arguments.steps)
    ceilings = {"model only": {"clips_per_s": trainer.training_step.clips * len(seconds) / sum(seconds)}}
    if feeds_from_files:
        ceilings["loader only"] = {
            "clips_per_s": drain_loader(trainer, arguments.steps * trainer.training_step.accumulation)
        }
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()  # what the steps have left, the ceilings may use
    rates = ceiling_rates(ranks.device)
    shape = config.architecture
    passes = 2 if config.objective.masks == "separate" else 1
    flops = flops_per_clip(shape, config.mask.num_masked, objective=config.objective.name, passes=passes)
    timeline = read_trace(trace)
    parts = step_parts(timeline)
    return {
        **measured,
        "config": asked.model_dump(mode="json"),
        "gpu": gpu_facts(ranks.device),
        "flops": {"formula": flop_formula(shape), "forward_per_clip": flops.forward, "train_per_clip": flops.train},
        "peak": peak_tflops(ranks.device),
        "ceiling_rates": rates,
        "parts": {"steps": parts.steps, "step_seconds": parts.step_seconds, "seconds": parts.seconds},
        "kernels": [
            {
                "name": row.name,
                "calls": row.calls,
                "seconds": row.seconds,
                "share": row.share,
                "floor_seconds": floor_seconds(row, rates["matmul_tflops"], rates["copy_gb_per_s"]),
                "part": row.part,
            }
            for row in top_kernels(timeline, TOP_KERNELS)
        ],
        "ceilings": ceilings,
        "device_state": watch.samples,
        "trace": str(trace.relative_to(arguments.out.parent)),
    }


def pretrainer(config: Config, data: Dataset, ranks: Ranks) -> Trainer:
    """Of a fresh model."""
    model = build_model(config.architecture, config.run.seed)
    return Trainer(config, data, model, ranks, Pretraining(config, data, ranks))


def run_steps(trainer: Trainer, batches: Iterator[Batch], count: int) -> tuple[list[float], list[float]]:
    """(seconds of each step, seconds that the host waited for data in each)."""
    clock, waits = trainer.new_clock(), [0.0]

    def step() -> None:
        trainer.run_step(batches, clock)
        waits.append(clock.waited)

    seconds = time_steps(step, count, trainer.ranks.device)
    return seconds, [after - before for before, after in itertools.pairwise(waits)]


def time_steps(step: Callable[[], object], count: int, device: torch.device) -> list[float]:
    """Seconds of each of so many steps. On a GPU from one step's end to the next one's, by events, so that nothing
    waits for the device before the last step is done.
    """
    on_gpu = device.type == "cuda"
    marks = [_mark(on_gpu)]
    for _ in range(count):
        step()
        marks.append(_mark(on_gpu))
    if on_gpu:
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(marks)]
    return [after - before for before, after in itertools.pairwise(marks)]


def trace_steps(trainer: Trainer, batches: Iterator[Batch], folder: Path) -> Path:
    """Record a few steps; every rank writes a trace of its own. The path of this rank's."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank{trainer.ranks.rank}.json.gz"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if trainer.ranks.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=TRACED_STEPS, repeat=1)
    with torch.profiler.profile(
        activities=activities,
        record_shapes=True,
        schedule=schedule,
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
    ) as profiler:
        clock = trainer.new_clock()
        for _ in range(1 + TRACED_STEPS):  # one after another as in training: no wait for the device between them
            trainer.run_step(batches, clock)
            profiler.step()
    return path


def drain_loader(trainer: Trainer, count: int) -> float:
    """Clips a second, of all ranks at once, that the loader delivers when nothing else is done; the batches that it had
    ready when the clock began are not counted.
    """
    loader = trainer.train_loader()
    try:
        for _ in range(trainer.config.data.prefetch + 2):
            next(loader)
        began = time.perf_counter()
        for _ in range(count):
            next(loader)
        rate = count * trainer.training_step.micro_batch / (time.perf_counter() - began)
    finally:
        loader.close()
    total = torch.tensor([rate], device=trainer.ranks.device)
    dist.all_reduce(total)
    return float(total)


def memory_split(trainer: Trainer) -> dict[str, Any]:
    """Bytes on this device, after some steps. Weights and optimizer state, master weights among it, are counted tensor
    by tensor.

    On a GPU the peak is the allocator's. Gradients are those that are held between steps, or, where they are freed, one
    of each weight, out of what memory rises by within a step; the rest of that rise is activations. Other is what else
    is held between steps: batches, workspaces, the engine's buffers. On a CPU, which counts no allocations, gradients
    are one of each weight in fp32 and activations what a forward pass keeps, measured on micro-batches of one and two
    clips.
    """
    model, optimizer = trainer.engine.module, trainer.engine.optimizer
    parameters = _storage_bytes(model.parameters())
    state = _storage_bytes(_tensors(optimizer)) - _shared_bytes(model, optimizer)
    if trainer.ranks.device.type == "cuda":
        allocated, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        kept = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        kept += getattr(optimizer, "fp32_groups_gradients_flat", [])  # DeepSpeed's, at ZeRO 1 in bf16
        gradients = _storage_bytes(kept)
        other = max(allocated - parameters - state - gradients, 0)
        gradients = gradients or sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        activations = peak - parameters - state - gradients - other
        split = {"parameters": parameters, "gradients": gradients, "optimizer state": state, "activations": activations}
        source = (
            "allocator: peak of the timed steps; other: batches, workspaces and buffers that are held between steps"
        )
        return {**split, "other": other, "peak": peak, "source": source}
    gradients = 4 * sum(parameter.numel() for parameter in model.parameters())
    config = trainer.config
    assert isinstance(config, Config)
    plain = build_model(config.architecture)
    plain.checkpoint_activations(config.step.activation_checkpointing)
    one, two = (activation_bytes(plain, config, trainer.ranks.device, clips) for clips in (1, 2))
    activations = one + (two - one) * (trainer.training_step.micro_batch - 1)
    split = {
        "parameters": parameters,
        "gradients": gradients,
        "optimizer state": state,
        "activations": activations,
        "other": 0,
    }
    return {
        **split,
        "peak": sum(split.values()),
        "source": "counted: the tensors themselves, gradients in fp32, what a forward pass keeps",
    }


def describe(trainer: Trainer, feeds_from_files: bool) -> dict[str, Any]:
    """What was measured, as the report shows it."""
    config = trainer.config
    assert isinstance(config, Config)
    shape = config.architecture
    step = trainer.training_step.describe()
    grid, patch = shape.grid, shape.patch_shape
    return {
        "device": trainer.ranks.device.type,
        "device_name": device_name(trainer.ranks.device),
        "world_size": trainer.ranks.world_size,
        "model": f"{config.model.size}, depth {shape.depth}, {grid[0]} x {grid[1]} patches of {patch[0]} x {patch[1]}"
        + (f", decoder {shape.decoder_depth} x {shape.head_width}" if shape.has_decoder else ""),
        "parameters": trainer.engine.num_parameters(),
        "tokens": NUM_PREFIX + shape.num_patches,
        "num_masked": config.mask.num_masked,
        "seconds_per_clip": config.num_samples / config.data.sample_rate,
        "micro_batch": trainer.training_step.micro_batch,
        "accumulation": trainer.training_step.accumulation,
        "clips_per_step": trainer.training_step.clips,
        "source": "audio files" if feeds_from_files else "noise, in memory",
        **{key: value for key, value in step.items() if key != "mlp"},
        "fp8_mlp": config.step.fp8_mlp,
    }


class InMemory:
    """Batches of noise on a device, in turn and for ever, each at a position of its own."""

    def __init__(self, waveforms: list[torch.Tensor], lengths: torch.Tensor, stride: int) -> None:
        self.waveforms, self.lengths, self.stride = waveforms, lengths, stride

    def __iter__(self) -> Iterator[Batch]:
        position = 0
        while True:
            for waveform in self.waveforms:
                yield Batch(waveform, self.lengths, position, torch.zeros_like(self.lengths))
                position += self.stride


def in_memory(trainer: Trainer, device: torch.device) -> InMemory:
    """Noise of the run's shape on the device, the same for each rank and seed."""
    generator = torch.Generator().manual_seed(trainer.config.run.seed + trainer.ranks.rank)
    shape = (trainer.training_step.micro_batch, trainer.config.num_samples)
    waveforms = [
        (LOUDNESS * torch.randn(shape, generator=generator)).round().clamp(-32768, 32767).to(torch.int16)
        for _ in range(BATCHES_IN_MEMORY)
    ]
    lengths = torch.full((trainer.training_step.micro_batch,), trainer.config.num_samples)
    if device.type == "cuda":
        waveforms, lengths = [waveform.to(device) for waveform in waveforms], lengths.to(device)
    elif (
        trainer.ranks.device.type == "cuda"
    ):  # pinned, as the loader's batches are: other copies would wait for the device
        waveforms, lengths = [waveform.pin_memory() for waveform in waveforms], lengths.pin_memory()
    return InMemory(waveforms, lengths, trainer.training_step.micro_batch * trainer.ranks.world_size)


def nothing_to_read(config: Config) -> Dataset:
    """Stands for a corpus where steps are fed from memory; features are normalised with the paper's constants unless
    the config says.
    """
    import numpy as np

    from ssast.engine.model.config import PAPER_MEAN, PAPER_STD

    texts, counts, rates = Texts([]), np.zeros(0, np.int64), np.zeros(0, np.int32)
    none = Clips(texts, texts, texts, texts, counts, rates, rates, counts)
    mean = PAPER_MEAN if isinstance(config.data.mean, str) else config.data.mean
    std = PAPER_STD if isinstance(config.data.std, str) else config.data.std
    return Dataset(none, none, [], mean, std, [])


def undisturbed(config: Config, folder: Path) -> Config:
    """In a run folder of its own, without rows, validations and checkpoints between the steps."""
    never = 10**9
    train = config.train.model_copy(
        update={
            "steps": never,
            "log_every": never,
            "valid_every": never,
            "checkpoint_every": never,
            "schedule": "constant",
        }
    )
    return config.model_copy(update={"run": config.run.model_copy(update={"folder": str(folder)}), "train": train})


def _mark(on_gpu: bool) -> Any:
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _storages(tensors: Any) -> dict[int, int]:
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def _storage_bytes(tensors: Any) -> int:
    return sum(_storages(tensors).values())


def _shared_bytes(model: torch.nn.Module, optimizer: Any) -> int:
    """Of the optimizer's own parameters where they are the model's."""
    own, states = _storages(model.parameters()), _storages(_tensors(optimizer))
    return sum(size for pointer, size in states.items() if pointer in own)


def _tensors(optimizer: Any) -> list[torch.Tensor]:
    """What an optimizer updates and what it keeps for that; DeepSpeed's hold another inside."""
    inner = getattr(optimizer, "optimizer", optimizer)
    tensors = [tensor for group in inner.param_groups for tensor in group["params"]]
    # ZeRO 3 lends its masters to the groups during a step only
    tensors += getattr(optimizer, "fp32_partitioned_groups_flat", [])
    for state in inner.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return tensors


def measurement_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """Of a module here that measures one config: where to write what it finds, and of which config."""
    parser = argparse.ArgumentParser(prog=f"python -m ssast.benchmarks.throughput.{module}", description=description)
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    return parser


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = measurement_parser("measure", __doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="time the steps, and no more")
    parser.add_argument("--synthetic", action="store_true", help="feed noise from memory, whatever data.train says")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    leave(main())
