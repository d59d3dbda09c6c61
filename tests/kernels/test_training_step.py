"""The operators where they are used: a whole training step launches the kernels, in one graph, and learns what the
references learn.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from ssast.engine.model.adapt import build_model
from ssast.engine.model.config import ModelConfig
from ssast.engine.model.ssast import SSAST
from ssast.kernels import fbank, sample_patch_mask

CONFIG = ModelConfig(width=32, depth=1, heads=2, num_mel_bins=32, input_frames=64)  # 2 x 4 patches
CONFIGS = {"all": CONFIG, "visible": replace(CONFIG, encoder_tokens="visible", decoder_depth=1, decoder_width=16)}
KERNELS = {
    "fbank": {"_fbank_kernel"},
    "sample_patch_mask": {"_mask_kernel"},
    "embed_patches": {
        "_partition_kernel",
        "_embed_kernel",
        "_token_sums_kernel",
        "_weight_sums_kernel",
        "_sum_parts_kernel",
    },
    "mspm_loss": {"_scores_kernel", "_finish_kernel", "_gradients_kernel"},
}
INSERTION = {"insert_mask_tokens": {"_insert_kernel", "_insert_gradients_kernel"}}
KERNELS_OF = {"all": KERNELS, "visible": KERNELS | INSERTION}


def step(model: SSAST, waveform: torch.Tensor, forward: Callable) -> tuple[torch.Tensor, ...]:
    """Waveform to gradients, as the trainer does it; what the loss says."""
    patches = fbank(waveform, num_mel_bins=32, num_frames=64, mean=-4.0, std=4.0, patch=CONFIG.patch_shape)
    mask = sample_patch_mask(
        len(waveform), grid=CONFIG.grid, num_masked=5, cluster=(2,), seed=1, device=waveform.device
    )
    losses = forward(patches, mask)
    losses.loss.backward()
    return tuple(value.detach() for value in losses)


def gradients(model: SSAST) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.fixture
def waveform(device) -> torch.Tensor:
    return 0.1 * torch.randn(3, 10_800, generator=torch.Generator().manual_seed(0)).to(device)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_step_launches_every_kernel_and_equals_the_references(device, waveform, launches, monkeypatch, kind):
    model = build_model(CONFIGS[kind]).to(device)
    ours, by_kernels = step(model, waveform, model.pretrain_patches), gradients(model)
    for operator, names in KERNELS_OF[kind].items():
        assert names <= set(launches), f"{operator}: {names - set(launches)} not launched"

    launches.clear()
    model.zero_grad()
    for module in (
        "fbank",
        "patch_mask",
        "embed",
        "mask_tokens",
        "mspm_loss",
    ):  # their names in ssast.kernels are those of the functions
        monkeypatch.setattr(sys.modules[f"ssast.kernels.{module}"], "resolve_backend", lambda *_: "torch")
    reference = step(model, waveform, model.pretrain_patches)
    assert not launches
    for name, one, other in zip(("loss", "nce", "mse", "accuracy"), ours, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=name)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(
            by_kernels[name], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()) + 1e-7, msg=name
        )


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_compiled_step_is_one_graph(device, waveform, launches, kind):
    """No graph break in forward or backward, and the kernels are still what runs."""
    torch._dynamo.reset()
    model = build_model(CONFIGS[kind]).to(device)
    eager, expected = step(model, waveform, model.pretrain_patches), gradients(model)
    launches.clear()
    model.zero_grad()
    compiled = step(model, waveform, torch.compile(model.pretrain_patches, fullgraph=True, backend="aot_eager"))
    assert set().union(*KERNELS_OF[kind].values()) <= set(launches)
    torch.testing.assert_close(compiled, eager)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], msg=name)


@pytest.mark.skipif(os.environ.get("SSAST_TEST_DEVICE") != "cuda", reason="needs a GPU: SSAST_TEST_DEVICE=cuda")
@pytest.mark.parametrize("kind", CONFIGS)
def test_trace_of_a_step_on_a_gpu(device, waveform, kind):
    """What the GPU itself reports: our kernels, and none of what the references would launch in their place."""
    model = build_model(CONFIGS[kind]).to(device, torch.bfloat16)

    def forward(patches: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return model.pretrain_patches(patches.to(torch.bfloat16), mask)

    step(model, waveform, forward)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(model, waveform, forward)
        torch.cuda.synchronize()
    # Memory operations are no kernels, and "Memset" holds "mse".
    names = [event.key for event in profile.key_averages() if not event.key.startswith(("Memset", "Memcpy"))]
    for kernel in set().union(*KERNELS_OF[kind].values()):
        assert any(kernel in name for name in names), f"{kernel} not in the trace"
    for foreign in ("fft", "log_softmax", "CatArrayBatched", "sort", "mse", "masked_fill"):
        assert not any(foreign.lower() in name.lower() for name in names), f"{foreign} in the trace: {names}"
