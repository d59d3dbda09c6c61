"""The processes of a run: joining them, and having one do what must be done once."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from ssast.engine.environment import settle_accelerator
from ssast.engine.errors import UserError, first_line

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among the others of the run."""

    rank: int
    world_size: int
    device: torch.device
    patient_group: dist.ProcessGroup
    """A group on the CPU whose operations wait for a day: a check of millions of files outlasts the default half
    hour."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def once(self, work: Callable[[], T]) -> T:
        """The result of `work`, done on rank 0 and given to all; a UserError there is raised everywhere."""
        outcome: list[T | UserError | None] = [None]
        if self.is_first:
            try:
                outcome = [work()]
            except UserError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome, src=0, group=self.patient_group)
        if isinstance(outcome[0], UserError):
            raise outcome[0]
        return cast("T", outcome[0])  # rank 0 has put its result in the place of None


@dataclass(frozen=True)
class Place:
    """Which process of a run this is, by a launcher's environment."""

    rank: int = 0
    local_rank: int = 0
    """Among the processes of this machine."""
    world_size: int = 1


def place_in_world() -> Place | None:
    """What a launcher (deepspeed, torchrun) has written into the environment; None if there was none.

    Raises:
        UserError: variables that are missing, no numbers, or contradict each other.
    """
    variables = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if os.environ.get(name)}
    if not variables or variables == {"WORLD_SIZE": "1"}:
        return None
    place = Place(**{name.lower(): _number(name) for name in variables})
    required = ["RANK", "WORLD_SIZE"]
    if place.world_size > 1:
        required += ["LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]
    if missing := [name for name in required if not os.environ.get(name)]:
        settings = ", ".join(f"{name}={value}" for name, value in variables.items())
        raise UserError(
            f"the environment has {settings} but no {', '.join(missing)}: a launcher (deepspeed, torchrun) sets them "
            "all; unset them to train with one process, or with several by --ranks",
            every_rank=True,
        )
    if place.rank >= place.world_size or place.local_rank >= place.world_size:
        raise UserError(
            f"the environment has RANK={place.rank}, LOCAL_RANK={place.local_rank} of WORLD_SIZE={place.world_size}: "
            "ranks count from 0 to below it",
            every_rank=True,
        )
    if place.world_size > 1 and not 0 < _number("MASTER_PORT") < 1 << 16:
        raise UserError(f"MASTER_PORT={os.environ['MASTER_PORT']}: is no port", every_rank=True)
    return place


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isascii() or not text.isdecimal() or (name == "WORLD_SIZE" and int(text) < 1):
        raise UserError(f"the environment has {name}={text}, which is no number of a process", every_rank=True)
    return int(text)


def join_ranks() -> Ranks:
    """Join the processes that a launcher (deepspeed, torchrun) has started; without one, a world of this process alone.

    Raises:
        UserError: an environment that `place_in_world` does not take, more processes than GPUs, or a port that another
            program has.
    """
    # what libraries plan to change is their users' concern, and would be said once a rank
    warnings.filterwarnings("ignore", category=FutureWarning)
    on_gpu = settle_accelerator() == "cuda"
    place = place_in_world() or Place()
    for key, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }.items():
        os.environ.setdefault(key, value)
    if on_gpu:
        if place.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK={place.local_rank}: there are {torch.cuda.device_count()} GPUs here", every_rank=True
            )
        torch.cuda.set_device(place.local_rank)
        device = torch.device("cuda", place.local_rank)
    else:
        device = torch.device("cpu")
    try:
        if not dist.is_initialized():
            _init_processes("nccl" if on_gpu else "gloo", place, device)
    except dist.DistNetworkError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"the processes cannot meet at {where} (MASTER_ADDR, MASTER_PORT): {first_line(error)}", every_rank=True
        ) from None
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    return Ranks(dist.get_rank(), dist.get_world_size(), device, patient)


def _init_processes(communication: str, place: Place, device: torch.device) -> None:
    if place.world_size == 1:  # one process meets nobody: no port, which another program might have
        dist.init_process_group(communication, store=dist.HashStore(), rank=0, world_size=1)
        return
    bound = device if device.type == "cuda" else None  # NCCL need not guess each process's GPU
    dist.init_process_group(communication, timeout=timedelta(minutes=30), device_id=bound)


def be_deterministic() -> None:
    """Only kernels that repeat to the bit; called before the first product on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def speaks_for_its_node() -> bool:
    """Whether this process is the first of its machine, as the launcher's environment says before anything is
    joined.
    """
    return os.environ.get("LOCAL_RANK", "0") == "0"
