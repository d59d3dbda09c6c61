"""The processes of a run: joining them, and having one do what must be done once."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

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
        return outcome[0]  # type: ignore[return-value]


def join_ranks(engine: str = "deepspeed") -> Ranks:
    """Join the processes that a launcher (deepspeed, torchrun) has started; without one, a world of this process alone.

    Raises:
        UserError: `engine` is "deepspeed" and DeepSpeed is not installed.
    """
    on_gpu = settle_accelerator() == "cuda"
    for key, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }.items():
        os.environ.setdefault(key, value)
    local_rank = int(os.environ["LOCAL_RANK"])
    if on_gpu:
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
    backend = "nccl" if on_gpu else "gloo"
    if engine == "deepspeed":
        _init_deepspeed(backend)
    elif not dist.is_initialized():
        dist.init_process_group(backend)
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    return Ranks(dist.get_rank(), dist.get_world_size(), device, patient)


def _init_deepspeed(backend: str) -> None:
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise UserError(
            f"DeepSpeed cannot be imported ({first_line(error)}): pip install deepspeed, or set step.engine=ddp"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed would compile a shared-memory all-reduce with g++ for a minute; gloo gives the same sums at once
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def be_deterministic() -> None:
    """Only kernels that repeat to the bit; called before the first product on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def speaks_for_its_node() -> bool:
    """Whether this process is the first of its machine, as the launcher's environment says before anything is
    joined.
    """
    return os.environ.get("LOCAL_RANK", "0") == "0"


def leave(status: int) -> NoReturn:
    """End this process, whose work is done, with that exit status.

    Exit handlers run; the interpreter is not taken down, because the threads that gloo and others still have now and
    then abort the process while that happens, and a status of -6 would be all that a caller sees.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError):  # closed, or nobody reads it
            stream.flush()
    os._exit(status)
