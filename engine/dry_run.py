"""What a run would be: its resolved config and what it costs, for `ssast pretrain --dry-run`."""

from __future__ import annotations

from .config import Config, dump_config
from .model.adapt import build_model
from .model.cost import count_parameters, flop_formula, flops_per_clip, memory_estimate, stacks


def describe_run(config: Config, world_size: int = 1) -> str:
    """The resolved config and what it costs on so many ranks, without touching data or devices."""
    model_config = config.architecture
    parameters = count_parameters(build_model(model_config))
    passes = 2 if config.objective.masks == "separate" else 1
    flops = flops_per_clip(model_config, config.mask.num_masked, objective=config.objective.name, passes=passes)
    micro_batch, accumulation = config.batch_sizes(world_size)
    memory = memory_estimate(
        model_config,
        parameters,
        num_masked=config.mask.num_masked,
        micro_batch=micro_batch,
        bf16=config.bf16,
        stage=config.zero_stage,
        world_size=world_size,
    )
    grid = model_config.grid
    lines = [
        dump_config(config).rstrip(),
        "",
        f"parameters      {parameters:,}",
        f"tokens          {model_config.num_patches + 2} ({grid[0]}x{grid[1]} patches + 2), {config.mask.num_masked} "
        "masked, "
        f"{config.valid_num_masked} in validation",
        f"blocks          {describe_stacks(config)}",
        f"precision       {'bf16' if config.bf16 else 'fp32'}"
        + (" (auto: what this device does best)" if config.step.precision == "auto" else ""),
        f"window          {config.num_samples} samples, {config.num_samples / config.data.sample_rate:.2f} s",
        f"FLOPs per clip  forward {flops.forward / 1e9:.2f} G, training {flops.train / 1e9:.2f} G",
        f"                {flop_formula(model_config)}",
        f"memory          {sum(memory.values()) / 2**30:.2f} GiB on each of {world_size} device(s), "
        f"micro-batch {micro_batch} x {accumulation}: "
        + ", ".join(f"{name} {value / 2**30:.2f}" for name, value in memory.items()),
    ]
    return "\n".join(lines)


def describe_stacks(config: Config) -> str:
    """The transformer blocks that a clip passes through, and how many of its tokens each of them reads."""
    names = ("encoder", "decoder")
    parts = zip(names, stacks(config.architecture, config.mask.num_masked), strict=False)
    return ", ".join(f"{name} {part.depth} of width {part.width} on {part.tokens} tokens" for name, part in parts)
