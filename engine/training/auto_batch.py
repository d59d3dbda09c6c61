"""The largest micro-batch that fits: tried on a GPU, reckoned from one clip's activations on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from ssast.engine.config import Config
from ssast.engine.distributed.ranks import Ranks
from ssast.engine.errors import UserError
from ssast.engine.model.adapt import build_model
from ssast.engine.model.config import LossConfig
from ssast.engine.model.cost import memory_estimate
from ssast.engine.model.ssast import SSAST

GRAIN = 8  # clips; matrix products like multiples of it
# Activations and state get this fraction of free memory; fragments, collectives' buffers and the loader get the rest.
FRACTION = 0.9
MOST = 1 << 16


@dataclass(frozen=True)
class AutoBatch:
    """How the batch of a step is cut into micro-batches."""

    largest: int
    """Clips of a micro-batch that fit on one device."""
    used: int
    """The largest of those that divide the batch."""
    accumulation: int

    def __str__(self) -> str:
        return f"micro-batch {self.used} x {self.accumulation} (up to {self.largest} clips fit)"


def find_auto_batch(config: Config, ranks: Ranks) -> AutoBatch:
    """The batch of a step stays what the config says: what is found is into how few micro-batches it can be cut.

    Without torch.compile, which needs less; the same on every rank, as found on the first.

    Raises:
        UserError: not even one clip fits.
    """
    micro_batch, accumulation = config.batch_sizes(ranks.world_size)
    rank_batch = micro_batch * accumulation  # of the batch, on one rank
    largest = ranks.once(lambda: largest_micro_batch(config, ranks))
    used = max(size for size in range(1, rank_batch + 1) if rank_batch % size == 0 and size <= largest)
    return AutoBatch(largest, used, rank_batch // used)


def with_micro_batch(config: Config, sizes_that_fit: AutoBatch, world_size: int) -> Config:
    """The config with the sizes that were measured."""
    sizes = {
        "train_batch_size": sizes_that_fit.used * sizes_that_fit.accumulation * world_size,
        "train_micro_batch_size_per_gpu": sizes_that_fit.used,
        "gradient_accumulation_steps": sizes_that_fit.accumulation,
    }
    return config.model_copy(update={"deepspeed": {**config.deepspeed, **sizes}})


def largest_micro_batch(config: Config, ranks: Ranks) -> int:
    """Clips of the largest micro-batch for which this rank's device, or its part of this machine's memory, has room.

    Raises:
        UserError: not even one clip fits.
    """
    device = ranks.device
    model = build_model(config.architecture).to(device)
    model.checkpoint_activations(config.step.activation_checkpointing)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    state = memory_estimate(
        config.architecture,
        parameters,
        num_masked=config.mask.num_masked,
        micro_batch=0,
        bf16=config.bf16,
        stage=config.zero_stage,
        world_size=ranks.world_size,
    )
    if device.type == "cuda":
        free = (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
        reserved = int(sum(state.values()) + (1 - FRACTION) * free)
        largest = _try_sizes(model, config, device, reserved)
        torch.cuda.empty_cache()
    else:
        per_clip = activation_bytes(model, config, device, 2) - activation_bytes(model, config, device, 1)
        ranks_here = ranks.world_size  # of one machine, as a rule: a CPU is for trying things out
        largest = int((FRACTION * psutil.virtual_memory().available / ranks_here - sum(state.values())) // per_clip)
    if largest < 1:
        raise UserError(
            "step.auto_batch: not even one clip fits into memory; take step.activation_checkpointing=block, a shorter "
            "model.input_frames, or a smaller model"
        )
    return min(largest, MOST) // GRAIN * GRAIN or largest


def activation_bytes(model: SSAST, config: Config, device: torch.device, clips: int) -> int:
    """What a forward pass keeps for the backward pass, parameters not counted; every piece of memory once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    bytes_by_address: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            bytes_by_address[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # freed, its address would be given away again
        return tensor

    alive: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _forward(model, config, device, clips)
    return sum(bytes_by_address.values())


def _try_sizes(model: SSAST, config: Config, device: torch.device, reserved: int) -> int:
    """Doubling until it does not fit, then halving the gap; `reserved` bytes are held meanwhile for what a run holds
    besides.
    """
    ballast = torch.empty(reserved, dtype=torch.uint8, device=device)
    fits, too_many = 0, None
    size = GRAIN
    while too_many is None or too_many - fits > GRAIN:
        if _fits(model, config, device, size):
            fits = size
        else:
            too_many = size
        if fits >= MOST:
            break
        size = 2 * size if too_many is None else (fits + too_many) // 2 // GRAIN * GRAIN
        if size in (0, fits):
            break
    if fits == 0:
        fits = next((size for size in range(GRAIN - 1, 0, -1) if _fits(model, config, device, size)), 0)
    del ballast
    return fits


def _fits(model: SSAST, config: Config, device: torch.device, clips: int) -> bool:
    try:
        _forward(model, config, device, clips).backward()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()


def _forward(model: SSAST, config: Config, device: torch.device, clips: int) -> torch.Tensor:
    shape = config.architecture
    patches = torch.randn(clips, shape.num_patches, shape.patch_values, device=device)
    mask = torch.arange(config.mask.num_masked, device=device).expand(clips, -1)
    recon_mask = mask if config.objective.masks == "separate" else None
    with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
        if config.bf16:
            patches = patches.bfloat16()
        return model.pretrain_patches(patches, mask, recon_mask, LossConfig(config.objective.name)).loss
