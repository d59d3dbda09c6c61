"""Fixtures of all tests. Golden values of filter banks and masks are in tests/golden; `shared/` beside the checkout
holds those of whole models, and real audio: tests that need these are skipped, with a notice, where it is absent.

Triton kernels are tested on CPU tensors in Triton's interpreter, which must be chosen before triton is imported: here.
SSAST_TEST_DEVICE=cuda tests them compiled, on a GPU. All other tests are the same on every machine: CPU and PyTorch
operators; training in the interpreter would take hours.
"""

import os
from pathlib import Path

ON_GPU = os.environ.get("SSAST_TEST_DEVICE") == "cuda"
if not ON_GPU:
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

import ssast.kernels.backend  # noqa: E402

os.environ.pop("TRITON_INTERPRET", None)  # processes that a test starts do not inherit it,
ssast.kernels.backend.INTERPRETED = False  # and tests/kernels switches it on for itself

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared_path(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"no {path}: checks against the official code's values and real audio are left out")
    return path


@pytest.fixture(scope="session")
def golden_values() -> Path:
    """`fbank/` and `masks/` of other programs: see the README there."""
    return Path(__file__).resolve().parent / "golden"


@pytest.fixture(scope="session")
def reference() -> Path:
    """Golden values of the official implementation's models."""
    return shared_path("reference")


@pytest.fixture(scope="session")
def real_audio() -> Path:
    return shared_path("audio")


@pytest.fixture(scope="session")
def cases() -> Path:
    """Small inputs, each with a README of what is right."""
    return shared_path("cases")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic corpus; the manifest's path."""
    from ssast.engine.data.synth import write_corpus

    return write_corpus(tmp_path_factory.mktemp("corpus"), clips=40, progress=False)


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
