"""The encoder of visible patches only, against an oracle in float64 that is written from its description."""

import math

import pytest
import torch

from ssast.engine.model.adapt import build_model, resize, unshared_parts
from ssast.engine.model.config import ModelConfig
from ssast.engine.model.cost import flops_per_clip, main_attention, memory_estimate
from ssast.engine.model.ssast import SSAST
from ssast.kernels import sample_patch_mask

ALL = {"width": 32, "depth": 2, "heads": 2, "num_mel_bins": 32, "input_frames": 64}  # 2 x 4 patches
VISIBLE = {**ALL, "encoder_tokens": "visible"}


def model_of(**changes: object) -> SSAST:
    """In float64, with biases and norms that are not zero and one."""
    model = build_model(ModelConfig(**{**VISIBLE, **changes})).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def draw_features(clips: int = 3) -> torch.Tensor:
    return torch.randn(clips, 64, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def draw_mask(masked: int, clips: int = 3) -> torch.Tensor:
    """In no order."""
    generator = torch.Generator().manual_seed(3)
    return torch.stack([torch.randperm(8, generator=generator)[:masked] for _ in range(clips)])


# --- the oracle: one clip at a time, nothing of the engine or its kernels ---------------------------------------------


def linear(w: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    return centred / (variance + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def block(w: dict[str, torch.Tensor], name: str, x: torch.Tensor, heads: int) -> torch.Tensor:
    """Pre-norm: x [N, D] -> [N, D]."""
    size = x.shape[1] // heads
    q, k, v = linear(w, f"{name}.attn.qkv", norm(w, f"{name}.norm1", x)).chunk(3, dim=1)
    columns = [slice(head * size, (head + 1) * size) for head in range(heads)]
    mixed = [((q[:, c] @ k[:, c].T) / math.sqrt(size)).softmax(dim=1) @ v[:, c] for c in columns]
    x = x + linear(w, f"{name}.attn.proj", torch.cat(mixed, dim=1))
    hidden = linear(w, f"{name}.mlp.fc1", norm(w, f"{name}.norm2", x))
    return x + linear(w, f"{name}.mlp.fc2", hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))


def cut(features: torch.Tensor) -> torch.Tensor:
    """[T, F] -> [P, 256]: patch = row of mel * 4 + column of time; value = mel * 16 + frame."""
    tiles = [features[16 * t : 16 * t + 16, 16 * f : 16 * f + 16].T.reshape(256) for f in range(2) for t in range(4)]
    return torch.stack(tiles)


def oracle(
    w: dict[str, torch.Tensor], config: ModelConfig, features: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, InfoNCE, MSE) of the joint objective, lambda 10, softmax over predictions."""
    nce, mse = [], []
    for clip, hidden in zip(features, mask.tolist(), strict=True):
        patches = cut(clip)
        seen = [number for number in range(len(patches)) if number not in hidden]
        # the encoder: visible patches only
        x = patches[seen] @ w["embedding.weight"].T + w["embedding.bias"] + w["embedding.position"][2:][seen]
        x = torch.cat((w["embedding.prefix"] + w["embedding.position"][:2], x))
        for number in range(config.depth):
            x = block(w, f"blocks.{number}", x, config.heads)
        x = linear(w, "decoder.embed", norm(w, "norm", x))
        # scattered to their places, mask tokens elsewhere, positions once more
        rows = [*x[:2], *([w["decoder.mask_token"]] * len(patches))]
        for row, number in zip(x[2:], seen, strict=True):
            rows[2 + number] = row
        x = torch.stack(rows) + w["decoder.position"]
        for number in range(config.decoder_depth):
            x = block(w, f"decoder.blocks.{number}", x, x.shape[1] // (config.width // config.heads))
        x = norm(w, "decoder.norm", x)[2:][hidden]
        predictions = {
            head: linear(w, f"{head}.2", linear(w, f"{head}.0", x).relu()) for head in ("class_head", "recon_head")
        }
        targets = patches[hidden]
        scores = targets @ predictions["class_head"].T  # [target, prediction]
        nce.append(-(scores.diagonal() - scores.logsumexp(dim=1)))
        mse.append((predictions["recon_head"] - targets).square())
    nce, mse = torch.cat(nce).mean(), torch.cat(mse).mean()
    return nce + 10 * mse, nce, mse


@pytest.mark.parametrize(("masked", "decoder_width", "decoder_depth"), [(5, None, 2), (7, 16, 1), (1, 48, 3)])
def test_losses_and_every_gradient(masked, decoder_width, decoder_depth):
    model = model_of(decoder_width=decoder_width, decoder_depth=decoder_depth)
    features, mask = draw_features(), draw_mask(masked)
    ours = model.pretrain(features, mask)
    ours.loss.backward()
    weights = {name: value.detach().requires_grad_() for name, value in model.named_parameters()}
    loss, nce, mse = oracle(weights, model.config, features, mask)
    loss.backward()
    for name, one, other in (("loss", ours.loss, loss), ("nce", ours.nce, nce), ("mse", ours.mse, mse)):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
    for name, parameter in model.named_parameters():
        expected = weights[name].grad
        if masked > 1 and not name.endswith("qkv.bias") and name != "class_head.2.bias":  # theirs are zero in theory
            assert expected.abs().max() > 1e-6, f"{name}: the test says nothing of it"
        torch.testing.assert_close(
            parameter.grad, expected, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_mask_of_each_loss_has_a_pass_of_its_own():
    model, features = model_of(), draw_features()
    mask, recon_mask = draw_mask(5), draw_mask(6)
    ours = model.pretrain(features, mask, recon_mask)
    weights = dict(model.named_parameters())
    torch.testing.assert_close(ours.nce, oracle(weights, model.config, features, mask)[1])
    torch.testing.assert_close(ours.mse, oracle(weights, model.config, features, recon_mask)[2])


@pytest.mark.parametrize("masked", [4, 7])
def test_the_order_of_a_mask_is_of_no_account(masked):
    model, features, mask = model_of(), draw_features(), draw_mask(masked)
    shuffled = torch.stack([row[torch.randperm(masked)] for row in mask])
    for one, other in zip(model.pretrain(features, mask), model.pretrain(features, shuffled), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    one, other = (model.reconstruct(features, each)[0] for each in (mask, shuffled))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_with_all_patches_visible_it_is_the_same_encoder():
    """To the bit, in float32: fine-tuning, embeddings and exports know one kind of model."""
    ssast = build_model(ModelConfig(**ALL))
    visible = resize(ssast, ModelConfig(**VISIBLE))
    features = draw_features().float()
    assert torch.equal(visible.encode(features), ssast.encode(features))


def test_the_encoder_reads_visible_tokens_only():
    """What is hidden cannot reach it, and it gives no token for it."""
    model, features, mask = model_of(), draw_features(), draw_mask(5)
    tokens = model.encode(features, mask)
    assert tokens.shape == (3, 2 + 3, 32)
    loud = features.clone()
    for clip, hidden in enumerate(mask.tolist()):
        for number in hidden:
            f, t = divmod(number, 4)
            loud[clip, 16 * t : 16 * t + 16, 16 * f : 16 * f + 16] += 100
    assert torch.equal(model.encode(loud, mask), tokens)


def test_weights_of_either_kind_start_the_other():
    ssast, narrow = build_model(ModelConfig(**ALL), seed=1), ModelConfig(**VISIBLE, decoder_width=16)
    started = resize(ssast, narrow)
    assert unshared_parts(started, ssast) == ["decoder", "class_head", "recon_head"]
    assert unshared_parts(ssast, started) == ["embedding.mask_token", "class_head", "recon_head"]
    for name, value in started.state_dict().items():
        if name.startswith(("embedding", "blocks", "norm")):
            assert torch.equal(value, ssast.state_dict()[name]), name

    back = resize(started, ModelConfig(**ALL))
    assert unshared_parts(back, started) == ["embedding.mask_token", "class_head", "recon_head"]
    wide = resize(ssast, ModelConfig(**VISIBLE))
    assert unshared_parts(wide, ssast) == ["decoder"] and torch.equal(
        wide.class_head[0].weight, ssast.class_head[0].weight
    )


def test_a_longer_input_resizes_both_positions():
    model = model_of()
    longer = resize(model, ModelConfig(**{**VISIBLE, "input_frames": 96})).double()
    assert longer.decoder.position.shape == longer.embedding.position.shape == (2 + 12, 32)
    deeper = resize(model, ModelConfig(**{**VISIBLE, "decoder_depth": 3}))
    assert unshared_parts(deeper, model) == ["decoder.blocks.2"] and unshared_parts(model, deeper) == []


def test_without_pretraining_heads_there_is_no_decoder():
    tuned = resize(model_of(), ModelConfig(**VISIBLE, num_classes=3, pretraining_heads=False))
    assert tuned.decoder is None and tuned.config.encoder_tokens == "visible"
    assert not [name for name, _ in tuned.named_parameters() if "decoder" in name or "mask_token" in name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_depth": 0}, "decoder_depth 0: mask tokens need at least one block"),
        ({"decoder_width": 40}, "decoder_width 40 is not a multiple of 16, the width of a head"),
        ({"encoder_tokens": "some"}, "encoder_tokens must be 'all' or 'visible'"),
    ],
)
def test_impossible_shapes(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**VISIBLE, **changes})


def test_a_mask_must_leave_something_visible():
    with pytest.raises(ValueError, match=r"mask is \(3, 8\) for 3 clips of 8 patches"):
        model_of().pretrain(draw_features(), draw_mask(8))


@pytest.mark.parametrize("kind", ["selective", "block"])
def test_activation_checkpointing_changes_nothing(kind):
    features, mask = draw_features().float(), draw_mask(5)
    gradients = []
    for each in ("none", kind):
        model = build_model(ModelConfig(**VISIBLE))
        model.checkpoint_activations(each)
        assert all(block.activation_checkpointing == each for block in model.decoder.blocks)
        model.pretrain(features, mask).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("regions", ["encoder", "blocks"])
def test_compiles_without_breaks(regions):
    features, mask = draw_features().float(), draw_mask(5)
    model = build_model(ModelConfig(**VISIBLE, decoder_width=16))
    eager = model.pretrain(features, mask).loss
    torch._dynamo.reset()
    model.compile_regions(regions, fullgraph=True, dynamic=False, backend="aot_eager")
    compiled = model.pretrain(features, mask).loss
    torch.testing.assert_close(compiled, eager)
    for one, other in zip(
        torch.autograd.grad(compiled, list(model.parameters())),
        torch.autograd.grad(eager, list(model.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    with torch.compiler.set_stance("fail_on_recompile"):
        model.pretrain(features, mask.flip(1)).loss.backward()


# --- cost -------------------------------------------------------------------------------------------------------------

BASE = ModelConfig(width=768, heads=12, encoder_tokens="visible")


def block_flops(tokens: int, width: int) -> int:
    """By hand: q, k, v and projection, scores and the sum of values, MLP; 2 a multiply-add."""
    return 2 * tokens * width * 4 * width + 2 * 2 * tokens * tokens * width + 2 * 2 * tokens * width * 4 * width


@pytest.mark.parametrize(("width", "tflop"), [(768, 0.113), (384, 0.075)])
def test_flops_by_hand(width, tflop):
    """112 of 512 patches are visible; 12 blocks read 114 tokens, 2 more 514."""
    by_hand = (
        2 * 112 * 256 * 768  # projection
        + 12 * block_flops(114, 768)
        + 2 * 114 * 768 * width  # between encoder and decoder
        + 2 * block_flops(514, width)
        + 2 * (2 * 400 * width * width + 2 * 400 * width * 256)  # heads
        + 2 * 400 * 400 * 256  # InfoNCE
    )
    flops = flops_per_clip(ModelConfig(width=768, heads=12, encoder_tokens="visible", decoder_width=width), 400)
    assert flops.forward == by_hand
    assert flops.train / 1e12 == pytest.approx(tflop, abs=5e-4)


def test_flops_agree_with_deepspeeds_profiler():
    """Within 2%: it also counts elementwise work."""
    from deepspeed.profiling.flops_profiler import FlopsProfiler

    shape = ModelConfig(width=384, heads=6, depth=2, input_frames=256, encoder_tokens="visible", decoder_width=192)
    patches, mask = torch.randn(2, 128, 256), sample_patch_mask(2, grid=shape.grid, num_masked=100)
    model = build_model(shape)
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    model(lambda model: model.pretrain_patches(patches, mask))
    profiler.stop_profile()
    counted = profiler.get_total_flops() / 2
    profiler.end_profile()
    assert counted == pytest.approx(flops_per_clip(shape, 100).forward, rel=0.02)


def test_memory_and_the_attention_to_measure():
    options = {"num_masked": 400, "micro_batch": 8, "bf16": True, "stage": 1, "world_size": 1}
    ours = memory_estimate(BASE, 10**8, **options)["activations (estimate)"]
    whole = memory_estimate(ModelConfig(width=768, heads=12), 10**8, **options)["activations (estimate)"]
    assert ours / whole == pytest.approx((12 * 114 + 2 * 514) / (12 * 514))
    assert main_attention(BASE, 400) == (12, 514), "two blocks on all tokens, against twelve on 114"
    assert main_attention(BASE, 100) == (12, 414)
