"""Fixtures of all tests. `shared/` beside the checkout holds golden values of the official code and real audio; tests that need it are
skipped, with a notice, where it is absent."""

import os
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"  # the tests are the same on every machine
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared_path(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"no {path}: checks against the official code's values and real audio are left out")
    return path


@pytest.fixture(scope="session")
def reference() -> Path:
    """Golden values of the official implementation."""
    return shared_path("reference")


@pytest.fixture(scope="session")
def real_audio() -> Path:
    return shared_path("audio")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic corpus; the manifest's path."""
    from ssast.engine.data.synth import write_corpus

    return write_corpus(tmp_path_factory.mktemp("corpus"), clips=40, progress=False)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
