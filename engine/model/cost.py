"""What a model costs: parameters, floating-point operations, memory. One formula each, written out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ssast.kernels import NUM_PREFIX

from .config import PATCH_VALUES, ModelConfig
from .ssast import SSAST

FLOP_FORMULA = (
    "forward per clip = 2 P K D (projection) + L (24 N D^2 + 4 N^2 D) (blocks) + heads * 2 M (D^2 + K D) + 2 M^2 K "
    "(InfoNCE); "
    "backward = 2 x forward; a multiply-add counts 2"
)
VISIBLE_FLOP_FORMULA = (
    "forward per clip = 2 V K D + 2 (2 + V) D D' (projections) + L (24 N D^2 + 4 N^2 D) of N = 2 + V tokens (encoder) "
    "and of 2 + P tokens of width D' (decoder) + heads * 2 M (D'^2 + K D') + 2 M^2 K (InfoNCE); "
    "backward = 2 x forward; a multiply-add counts 2"
)


class Stack(NamedTuple):
    """Transformer blocks of one width that read as many tokens."""

    depth: int
    tokens: int
    width: int
    heads: int


def stacks(model: ModelConfig, num_masked: int) -> tuple[Stack, ...]:
    """What a clip passes through in pretraining: the encoder, and the decoder where there is one."""
    whole = NUM_PREFIX + model.num_patches
    if not model.has_decoder:
        return (Stack(model.depth, whole, model.width, model.heads),)
    encoder = Stack(model.depth, whole - num_masked, model.width, model.heads)
    return encoder, Stack(model.decoder_depth, whole, model.head_width, model.decoder_heads)


def main_attention(model: ModelConfig, num_masked: int) -> tuple[int, int]:
    """(heads, tokens) where attention costs most in pretraining."""
    stack = max(stacks(model, num_masked), key=lambda each: each.depth * each.tokens**2 * each.width)
    return stack.heads, stack.tokens


def flop_formula(model: ModelConfig) -> str:
    """What `flops_per_clip` counts, in letters."""
    return VISIBLE_FLOP_FORMULA if model.has_decoder else FLOP_FORMULA


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one clip, forward only."""

    projection: int
    blocks: int
    heads: int
    info_nce: int

    @property
    def forward(self) -> int:
        """Of a clip's forward pass."""
        return self.projection + self.blocks + self.heads + self.info_nce

    @property
    def train(self) -> int:
        """Forward and backward: each product's backward is two of its size."""
        return 3 * self.forward


def flops_per_clip(model: ModelConfig, num_masked: int, *, objective: str = "joint", passes: int = 1) -> Flops:
    """`passes`: forward passes of the encoder in a step, 2 with separate masks."""
    patches = model.num_patches - (num_masked if model.has_decoder else 0)
    projection = 2 * patches * PATCH_VALUES * model.width
    if model.has_decoder:
        projection += 2 * (NUM_PREFIX + patches) * model.width * model.head_width
    blocks = sum(
        depth * ((8 + 4 * model.mlp_ratio) * tokens * width**2 + 4 * tokens**2 * width)
        for depth, tokens, width, _ in stacks(model, num_masked)
    )
    width = model.head_width
    heads = (2 if objective == "joint" else 1) * 2 * num_masked * (width**2 + PATCH_VALUES * width)
    info_nce = 0 if objective == "generative" else 2 * num_masked**2 * PATCH_VALUES
    return Flops(passes * projection, passes * blocks, heads, info_nce)


def count_parameters(model: SSAST) -> int:
    """Numbers that the model holds, trained or not."""
    return sum(parameter.numel() for parameter in model.parameters())


def memory_estimate(
    model: ModelConfig,
    parameters: int,
    *,
    num_masked: int,
    micro_batch: int,
    bf16: bool,
    stage: int,
    world_size: int,
) -> dict[str, int]:
    """Bytes on each device: weights, gradients and optimizer state as the ZeRO stage holds them, without DeepSpeed's
    buffers.

    Activations are an estimate: 17 values of the width for each token and block (inputs of the norms and products, q,
    k, v, both sides of the GELU), attention weights not stored.
    """
    masters = bf16 and stage > 0  # without ZeRO the weights themselves are fp32
    low = 2 if bf16 else 4
    state = 12 if masters else 8  # fp32 master weights, and Adam's two moments
    values = sum(depth * tokens * width for depth, tokens, width, _ in stacks(model, num_masked))
    return {
        "weights": (2 if masters else 4) * parameters // (world_size if stage == 3 else 1),
        "gradients (fp32)": 4 * parameters // (world_size if stage >= 2 else 1),
        "optimizer state": state * parameters // (world_size if stage >= 1 else 1),
        "activations (estimate)": 17 * values * micro_batch * low,
    }
