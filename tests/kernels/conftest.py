"""Kernels are tested where they run: in Triton's interpreter on the CPU, or compiled on a GPU
(SSAST_TEST_DEVICE=cuda).
"""

import os
from collections.abc import Iterator

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

ON_GPU = os.environ.get("SSAST_TEST_DEVICE") == "cuda"
if not ON_GPU:
    import interpreter_bf16  # noqa: F401  the interpreter computes on the bit patterns of bf16 otherwise


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(autouse=True)
def _kernels_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr("ssast.kernels.backend.INTERPRETED", True)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the Triton kernels launched so far in this test, in order."""
    names = []

    def record(kind: type) -> None:
        run = kind.run

        def recorded(self: object, *args: object, **options: object) -> object:
            names.append(self.fn.__name__)
            return run(self, *args, **options)

        monkeypatch.setattr(kind, "run", recorded)

    record(InterpretedFunction)
    record(JITFunction)
    return names


@pytest.fixture(autouse=True)
def _no_silent_fallback(request: pytest.FixtureRequest, launches: list[str]) -> Iterator[None]:
    """A test of backend="triton" that launches no kernel has tested PyTorch."""
    yield
    if "callspec" in vars(request.node) and request.node.callspec.params.get("backend") == "triton":
        assert launches, "no Triton kernel was launched"


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN (or the type's lowest number), so that an element which a kernel forgets to write cannot
    pass.
    """

    def poison(owner: object, name: str) -> None:
        make = getattr(owner, name)

        def poisoned(*args: object, **options: object) -> torch.Tensor:
            tensor = make(*args, **options)
            with torch.no_grad():  # one that requires a gradient is a leaf, and takes nothing in place otherwise
                if tensor.is_floating_point():
                    return tensor.fill_(float("nan"))
                return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).min)

        monkeypatch.setattr(owner, name, poisoned)

    poison(torch, "empty")
    poison(torch, "empty_like")
    poison(torch.Tensor, "new_empty")
