"""The model against the official code: its own checkpoints, features and masks, its tokens, losses, gradients, logits
and Adam steps.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from ssast.engine import SSAST, ModelConfig, load_model, save_model
from ssast.engine.errors import UserError
from ssast.engine.model.official import from_official, to_official
from ssast.engine.training.step import build_optimizer

CASES = ["frame128x2_t256_random", "patch16_t1024_trained", "patch16_t256_random", "quirk_patch16_f64_t256"]


class Golden:
    def __init__(self, reference: Path, name: str) -> None:
        self.path = reference / "model" / f"{name}.pth"
        self.facts = json.loads(self.path.with_suffix(".json").read_text())
        self.arrays = np.load(reference / "model" / f"{name}_pretrain.npz")
        self.heads = self.facts["config"]["heads"]
        self.features = torch.from_numpy(self.arrays["fbank"])
        self.mask = torch.from_numpy(self.arrays["mask_mpc"])
        self.recon_mask = torch.from_numpy(self.arrays["mask_mpg_separate"])

    def model(self, dtype: torch.dtype = torch.float64) -> SSAST:
        return load_model(self.path, heads=self.heads).to(dtype)


@pytest.fixture(params=CASES)
def golden(request, reference) -> Golden:
    return Golden(reference, request.param)


def official_names(model: SSAST, gradients: bool = False) -> dict[str, torch.Tensor]:
    """Weights, or their gradients, under the official names."""
    if gradients:
        copy = SSAST(model.config).double()
        copy.load_state_dict({name: parameter.grad for name, parameter in model.named_parameters()})
        model = copy
    return to_official(model, prefix="")


@pytest.mark.rounding
def test_tokens(golden):
    tokens = golden.model(torch.float32).encode(golden.features, golden.mask)
    np.testing.assert_allclose(tokens.detach().numpy(), golden.arrays["tokens_same_mask_f32"], atol=6e-6)


@pytest.mark.rounding
@pytest.mark.parametrize(
    ("masks", "dtype", "tolerance"), [("same", "64", 1e-12), ("separate", "64", 1e-12), ("same", "32", 5e-6)]
)
def test_losses_and_accuracy(golden, masks, dtype, tolerance):
    precision = getattr(torch, f"float{dtype}")
    recon_mask = golden.recon_mask if masks == "separate" else None
    loss = golden.model(precision).pretrain(golden.features.to(precision), golden.mask, recon_mask)
    expected = golden.facts[f"{masks}_mask"]["float64"]
    assert loss.nce.item() == pytest.approx(expected["nce"], abs=tolerance)
    assert loss.mse.item() == pytest.approx(expected["mse"], abs=tolerance)
    assert loss.loss.item() == pytest.approx(expected["loss"], abs=10 * tolerance)
    assert loss.accuracy.item() == pytest.approx(expected["acc"], abs=1e-7)


@pytest.mark.rounding
def test_both_directions_of_the_softmax(golden):
    forms = golden.facts["infonce_forms_from_float64_predictions"]
    for direction, key in (("predictions", "nce_code_form"), ("targets", "nce_paper_eq1_form")):
        loss = golden.model().pretrain(golden.features.double(), golden.mask, softmax_over=direction)
        assert loss.nce.item() == pytest.approx(forms[key], abs=1e-12)
    by_target = golden.model().pretrain(golden.features.double(), golden.mask, softmax_over="targets").accuracy.item()
    assert by_target == pytest.approx(forms["acc_argmax_over_targets_per_prediction"], abs=1e-9)


@pytest.mark.rounding
@pytest.mark.parametrize("masks", ["same", "separate"])
def test_gradient_of_every_parameter(golden, masks):
    model = golden.model()
    recon_mask = golden.recon_mask if masks == "separate" else None
    model.pretrain(golden.features.double(), golden.mask, recon_mask).loss.backward()
    gradients = official_names(model, gradients=True)
    norms = golden.facts[f"{masks}_mask"]["grad_l2_norm_float64"]
    assert len(norms) == len(list(model.named_parameters())) + 1  # theirs has cls and dist apart
    for name, norm in norms.items():
        ours = gradients[name].norm().item()
        assert ours == pytest.approx(norm, rel=1e-9, abs=1e-12), name
    stored = [key for key in golden.arrays.files if key.startswith(f"grad_{masks}_mask_ref64/")]
    assert stored or "quirk" in golden.path.name  # which keeps the norms alone
    for key in stored:
        expected = golden.arrays[key]
        difference = np.abs(gradients[key.split("/")[1]].numpy() - expected).max()
        assert difference <= 1e-6 * np.abs(expected).max() + 1e-12, key


def test_official_file_comes_back_bit_for_bit(golden, tmp_path):
    save_model(golden.model(torch.float32), tmp_path / "again.pth", format="official")
    theirs = torch.load(golden.path, weights_only=True)
    ours = torch.load(tmp_path / "again.pth", weights_only=True)
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert torch.equal(ours[key], value) and ours[key].dtype == value.dtype, key


def finetune_cases(reference: Path) -> list[tuple[str, str]]:
    return [(name, case) for name in CASES for case in Golden(reference, name).facts["finetune"]]


@pytest.mark.rounding
def test_finetune_logits_positions_and_gradients(reference):
    cases = finetune_cases(reference)
    assert len(cases) >= 17
    for name, case in cases:
        golden = Golden(reference, name)
        facts, arrays = golden.facts["finetune"][case], np.load(reference / "model" / f"{name}_ft_{case}.npz")
        model = load_model(
            golden.path,
            heads=golden.heads,
            num_classes=facts["label_dim"],
            input_frames=facts["input_tdim"],
            input_bins=facts["input_fdim"],
            stride=(facts["fstride"], facts["tstride"]),
            position_resize="official",
        )
        assert model.config.grid == (facts["f_dim"], facts["t_dim"])
        classifier = {
            key.removeprefix("mlp_head."): torch.from_numpy(arrays[key])
            for key in arrays.files
            if key.startswith("mlp_head.")
        }
        model.classifier.load_state_dict(classifier)
        # Bilinear weights are fractions of coordinates of up to 128 patches, computed in float32 (u = 2^-24), for which
        # each processor has code of its own: 128 u of the values' largest difference, and a few u of themselves.
        expected = arrays["pos_embed"][0]
        position, atol = model.embedding.position.data, (2 * 128 + 4) * 2.0**-24 * np.abs(expected).max()
        np.testing.assert_allclose(position.numpy(), expected, rtol=0, atol=atol, err_msg=case)
        position.copy_(torch.from_numpy(expected))
        features = torch.from_numpy(arrays["fbank"])
        for pool, key in (("mean", "ft_avgtok"), ("cls", "ft_cls")):
            exact = model.double().classify(features.double(), pool).detach().numpy()
            np.testing.assert_allclose(exact, arrays[f"logits_{key}_f64"], atol=1e-7, err_msg=f"{name} {case} {key}")
            single = model.float().classify(features, pool).detach().numpy()
            np.testing.assert_allclose(single, arrays[f"logits_{key}_f64"], atol=5e-6, err_msg=f"{name} {case} {key}")
        model = model.double()
        labels = torch.from_numpy(arrays["labels"]).double()
        bce = torch.nn.functional.binary_cross_entropy_with_logits(model.classify(features.double()), labels)
        assert bce.item() == pytest.approx(float(arrays["bce_f64"]), abs=1e-7)
        bce.backward()
        for key in [key for key in arrays.files if key.startswith("bce_grad_ref64/mlp_head.")]:
            ours = model.classifier.get_parameter(key.split("mlp_head.")[1]).grad.numpy()
            np.testing.assert_allclose(ours, arrays[key], atol=1e-6 * np.abs(arrays[key]).max(), err_msg=key)


def test_exact_resize_differs_only_where_the_official_one_is_wrong(reference):
    differing = []
    for name, case in finetune_cases(reference):
        golden = Golden(reference, name)
        facts = golden.facts["finetune"][case]
        options = {
            "heads": golden.heads,
            "num_classes": 5,
            "input_frames": facts["input_tdim"],
            "input_bins": facts["input_fdim"],
            "stride": (facts["fstride"], facts["tstride"]),
        }
        exact, official = (
            load_model(golden.path, **options, position_resize=method) for method in ("exact", "official")
        )
        if not torch.allclose(exact.embedding.position, official.embedding.position, atol=1e-6):
            differing.append(case)
    assert sorted(differing) == ["f10t10_F64_T300", "f16t16_F64_T256_same_but_smoothed"]


def test_official_resize_fails_where_the_official_code_fails(reference):
    """`edge_outcomes.json`: a grid that the official code accepts or refuses, and which window it keeps."""
    golden = Golden(reference, "patch16_t256_random")
    checked = 0
    for row in json.loads((reference / "model" / "edge_outcomes.json").read_text()):
        words = row["case"].replace("=", " ").split()
        if "fine-tune stride 16x16, input_fdim" not in row["case"] or "128 mel x 256 frames, 16x16" not in row["case"]:
            continue
        bins, frames = int(words[words.index("input_fdim") + 1]), int(words[words.index("input_tdim") + 1])
        options = {"heads": golden.heads, "num_classes": 5, "input_frames": frames, "input_bins": bins, "stride": 16}
        if row["outcome"] == "ok":
            load_model(golden.path, **options, position_resize="official")
        else:
            with pytest.raises(UserError, match="use 'exact'"):
                load_model(golden.path, **options, position_resize="official")
        assert load_model(golden.path, **options).config.grid == (bins // 16, frames // 16)
        checked += 1
    assert checked >= 20


def test_finetuned_checkpoints_reload(reference):
    """Which the official code itself cannot do."""
    files = sorted((reference / "model").glob("*_ft_*.pth"))
    assert files
    for file in files:
        arrays = np.load(file.with_suffix(".npz"))
        name = file.stem.split("_ft_")[0]
        model = load_model(file, heads=Golden(reference, name).heads)
        features = torch.from_numpy(arrays["fbank"])
        assert model.config.input_frames == features.shape[1]
        logits = model.classify(features).detach().numpy()
        np.testing.assert_allclose(logits, arrays["logits_ft_avgtok_f64"], atol=5e-6)


@pytest.mark.rounding
def test_adam_steps(reference):
    files = sorted((reference / "model").glob("*_adam.npz"))
    assert files
    for file in files:
        _check_adam_steps(Golden(reference, file.stem.removesuffix("_adam")), np.load(file))


def _check_adam_steps(golden: Golden, arrays: np.lib.npyio.NpzFile) -> None:
    facts = golden.facts["adam_trajectory"]
    model = golden.model().train()
    optimizer, _ = build_optimizer(
        [{"params": list(model.parameters())}],
        {
            "type": "Adam",
            "params": {
                "lr": facts["lr"],
                "betas": facts["betas"],
                "eps": facts["eps"],
                "weight_decay": facts["weight_decay_l2"],
            },
        },
        "torch",
        torch.device("cpu"),
    )
    for masks, expected in zip(torch.from_numpy(arrays["masks"]), arrays["losses_f64"], strict=True):
        loss = model.pretrain(golden.features.double(), masks[0], masks[1])
        got = [loss.accuracy.item(), loss.nce.item(), loss.mse.item(), loss.loss.item()]
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)
        optimizer.zero_grad()
        loss.loss.backward()
        optimizer.step()
    final, width = official_names(model), golden.facts["config"]["embed_dim"]
    for key in [key for key in arrays.files if key.startswith("final_f64/")]:
        parameter = key.split("/")[1]
        if parameter.startswith("cpredlayer") and parameter.endswith("bias"):
            continue  # moved by rounding noise alone, which Adam magnifies
        ours, expected = final[parameter].numpy(), arrays[key]
        if parameter.endswith("qkv.bias"):  # so is the K third
            ours, expected = np.delete(ours, slice(width, 2 * width)), np.delete(expected, slice(width, 2 * width))
        np.testing.assert_allclose(ours, expected, atol=2e-6, err_msg=parameter)


def test_real_size_tiny_by_recipe(reference):
    """Weights rebuilt from the recipe; 12 blocks, 3 heads, 400 masked patches, and its fine-tuned head."""
    facts = json.loads((reference / "model" / "recipe_real_tiny_patch16.json").read_text())
    arrays = np.load(reference / "model" / "recipe_real_tiny_patch16.npz")
    features = torch.from_numpy(
        np.load(reference / "model" / "patch16_t1024_trained_pretrain.npz")["fbank"][:1]
    ).double()
    model = SSAST(ModelConfig())
    seed = facts["weight_recipe_base_seed"]
    tensors = {
        key: recipe(key, value.shape, seed)
        for key, value in to_official(model, prefix="").items()
        if value.is_floating_point()
    }
    for key, check in facts["weight_check"].items():
        assert tensors[key].double().sum().item() == pytest.approx(check["sum_float64"], abs=1e-6), key
    model.load_state_dict(from_official(tensors))
    model = model.double()
    mask, recon_mask = torch.from_numpy(arrays["mask_mpc"]), torch.from_numpy(arrays["mask_mpg"])
    loss = model.pretrain(features, mask, recon_mask)
    expected = facts["float64"]
    assert loss.nce.item() == pytest.approx(expected["nce"], abs=1e-9) and loss.mse.item() == pytest.approx(
        expected["mse"], abs=1e-9
    )
    assert loss.accuracy.item() == pytest.approx(expected["acc"], abs=1e-9)
    tokens = model.encode(features, mask)[0].detach().numpy()
    np.testing.assert_allclose(tokens[:16], arrays["tokens_mpc_first16_f64"], atol=1e-6)
    np.testing.assert_allclose(tokens[-4:], arrays["tokens_mpc_last4_f64"], atol=1e-6)
    loss.loss.backward()
    gradients = official_names(model, gradients=True)
    for name, norm in facts["grads"].items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-6, abs=1e-9), name


def recipe(name: str, shape: torch.Size, base_seed: int) -> torch.Tensor:
    """The weight recipe of the reference's README."""
    r = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()) ^ base_seed)).standard_normal(tuple(shape))
    if name.endswith("pos_embed"):
        value = 0.15 * r
    elif name.endswith(("mask_embed", "_token")):
        value = 0.3 * r
    elif "norm" in name or "mlp_head.0" in name:
        value = 1 + 0.15 * r if name.endswith("weight") else 0.1 * r
    elif name.endswith("bias"):
        value = 0.05 * r
    elif name.endswith("patch_embed.proj.weight"):
        value = 0.08 * r
    elif name.endswith("predlayer.2.weight"):
        value = 0.8 / np.sqrt(shape[1]) * r
    else:
        value = r / np.sqrt(shape[1])
    return torch.from_numpy(value.astype(np.float32))


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
@pytest.mark.parametrize("kind", ["patch16", "frame128x2"])
def test_real_sizes_have_the_official_tensors(reference, size, kind):
    """Names, shapes, order, parameter counts and initial spread of the published models, pretraining and
    fine-tuning.
    """
    from ssast.engine.model.adapt import build_model
    from ssast.engine.model.config import WIDTHS

    listing = json.loads((reference / "parameter_listing.json").read_text())
    shape, strides = ((16, 16), (10, 10)) if kind == "patch16" else ((128, 2), (128, 1))
    width = WIDTHS[size]
    options = {"width": width, "heads": width // 64, "patch_shape": shape}
    stages = {
        "pretrain": ModelConfig(**options, stride=shape),
        "finetune": ModelConfig(**options, stride=strides, num_classes=527, pretraining_heads=False),
    }
    for stage, config in stages.items():
        expected = listing[f"{size}/{kind}/{stage}"]
        model = build_model(config)
        tensors = to_official(model)
        assert [
            [key, list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in tensors.items()
        ] == expected["state_dict"]
        assert sum(value.numel() for value in tensors.values()) == expected["total_parameters"]
        for name, (_, spread, _) in expected.get("initial_values_mean_std_maxabs", {}).items():
            ours = tensors.get(f"module.{name}")
            if ours is not None and ours.numel() > 1000 and ".head" not in name:
                assert ours.std(correction=0).item() == pytest.approx(spread, rel=0.06, abs=1e-6), name
