"""What a model costs, against a hand count and DeepSpeed's profiler."""

import pytest
import torch

from ssast.engine.model.adapt import build_model
from ssast.engine.model.config import ModelConfig
from ssast.engine.model.cost import flops_per_clip

BASE = ModelConfig(width=768, heads=12)


def test_flops_of_the_base_model_by_hand():
    """512 patches of 256 values, 514 tokens, width 768, 12 blocks, 400 masked patches; 2 a multiply-add."""
    block = (
        2 * 514 * 768 * 3 * 768  # q, k, v
        + 2 * 2 * 514 * 514 * 768  # scores, and the sum of values
        + 2 * 514 * 768 * 768  # projection
        + 2 * 2 * 514 * 768 * 3072  # MLP
    )
    heads = 2 * (2 * 400 * 768 * 768 + 2 * 400 * 768 * 256)
    by_hand = 2 * 512 * 256 * 768 + 12 * block + heads + 2 * 400 * 400 * 256
    flops = flops_per_clip(BASE, 400)
    assert flops.forward == by_hand and flops.train == 3 * by_hand
    assert flops.train / 1e12 == pytest.approx(0.296, abs=5e-4), "TFLOP a clip, as the documentation says"


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(
    ("shape", "num_masked"),
    [
        (ModelConfig(width=768, heads=12, depth=2), 400),
        (ModelConfig(depth=3, input_frames=256), 100),
        (ModelConfig(depth=2, patch_shape=(128, 2), stride=(128, 2), input_frames=256), 100),
    ],
    ids=["base", "tiny", "frame"],
)
def test_flops_agree_with_deepspeeds_profiler(shape, num_masked, passes):
    """Within 2%: it also counts elementwise work."""
    from deepspeed.profiling.flops_profiler import FlopsProfiler

    model = build_model(shape)
    clips = 2
    patches, mask = torch.randn(clips, shape.num_patches, 256), torch.arange(num_masked).expand(clips, -1)
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    model.pretrain_patches(patches, mask, mask if passes == 2 else None)
    profiler.stop_profile()
    counted = profiler.get_total_flops() / clips
    profiler.end_profile()
    assert counted == pytest.approx(flops_per_clip(shape, num_masked, passes=passes).forward, rel=0.02)
