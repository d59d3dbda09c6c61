import json
import threading

import numpy as np
import pytest
import torch

from ssast.benchmarks.throughput.step_baselines import Compiled, Eager, OfficialModel, OfficialWay, step_baselines
from ssast.engine import load_model
from ssast.engine.config import Config, load_config
from ssast.engine.errors import UserError
from ssast.engine.model.adapt import build_model
from ssast.engine.model.ssast import SSAST
from ssast.kernels import fbank

CPU = torch.device("cpu")
STATS = {"mean": -4.3, "std": 4.6}
# 8 x 4 or 1 x 32 patches
TINY = [
    "model.depth=1",
    "model.input_frames=64",
    "mask.num_masked=20",
    "objective.recon_weight=10",
]
KINDS = {"patches": ["mask.cluster=[3,4]"], "frames": ["model.patch_shape=[128,2]", "mask.cluster=null"]}
BF16 = "deepspeed.bf16={enabled: true}"


@pytest.fixture(params=KINDS)
def config(request) -> Config:
    return load_config("demo", [*TINY, *KINDS[request.param]])


@pytest.fixture
def patches() -> Config:
    return load_config("demo", [*TINY, *KINDS["patches"]])


def make_model(config: Config) -> SSAST:
    """With no parameter at a value that hides it: biases are not zero, and predictions large enough for the softmax to
    matter.
    """
    model, generator = build_model(config.architecture), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def make_waveform(config: Config, batch: int = 3) -> torch.Tensor:
    """Noise, each clip of another loudness and offset."""
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(batch, config.num_samples, generator=generator)
    return (noise * torch.logspace(2, 3.5, batch)[:, None] + torch.linspace(-900, 2000, batch)[:, None]).to(torch.int16)


def make_mask(config: Config, seed: int, batch: int = 3) -> torch.Tensor:
    draw = torch.rand(batch, config.architecture.num_patches, generator=torch.Generator().manual_seed(seed))
    return draw.argsort(dim=1)[:, : config.mask.num_masked]


def make(kind, config: Config, model: SSAST | None = None, seed: int = 0, **options):
    return kind(config, (model or make_model(config)).state_dict(), CPU, **STATS, seed=seed, **options)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


# What they differ in is the order of sums in float32, and in the filter banks the square root that the official way
# takes and undoes: about 1e-6 of the loss, somewhat more of a gradient.
@pytest.mark.parametrize(
    ("kind", "options"),
    [(OfficialWay, {}), (Eager, {}), (Compiled, {"backend": "aot_eager"})],
    ids=["official way", "eager", "compiled"],
)
def test_loss_and_gradients_are_the_engines(config, kind, options):
    model, waveform = make_model(config), make_waveform(config)
    mask, recon_mask = make_mask(config, 3), make_mask(config, 4)
    baseline = make(kind, config, model, **options)
    loss = baseline.loss(waveform, mask, recon_mask)
    loss.backward()

    passes_twice = kind is OfficialWay
    features = fbank(waveform, num_frames=config.model.input_frames, **STATS)
    ours = model.pretrain(
        features, mask, recon_mask if passes_twice else None, recon_weight=config.objective.recon_weight
    )
    ours.loss.backward()
    other = model.pretrain(features, mask, softmax_over="targets").nce
    assert abs(other - ours.nce) > 0.05  # the weights are such that the softmax's direction shows
    assert baseline.loss(waveform, mask).item() == pytest.approx(
        model.pretrain(features, mask, recon_weight=config.objective.recon_weight).loss.item(), rel=1e-5
    )
    assert loss.item() == pytest.approx(ours.loss.item(), rel=1e-5)

    theirs = dict(baseline.model.named_parameters())
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert theirs.keys() == expected.keys()
    # a constant added to all predictions changes no softmax over them: rounding alone is left
    unmoved = "class_head.2.bias"
    assert theirs[unmoved].grad.norm() < 1e-4 * theirs["class_head.2.weight"].grad.norm()
    for name in expected.keys() - {unmoved}:
        assert relative(theirs[name].grad, expected[name]) < 1e-4, name


@pytest.mark.parametrize("case", ["patch16_t256_random", "patch16_t1024_trained", "frame128x2_t256_random"])
def test_official_model_gives_the_official_codes_losses(reference, case):
    facts = json.loads((reference / "model" / f"{case}.json").read_text())
    arrays = np.load(reference / "model" / f"{case}_pretrain.npz")
    ours = load_model(reference / "model" / f"{case}.pth", heads=facts["config"]["heads"])
    model = OfficialModel(ours.config).double()
    model.load_state_dict(ours.state_dict())
    features = torch.from_numpy(arrays["fbank"]).double()
    with torch.no_grad():
        nce = model.discriminative(features, torch.from_numpy(arrays["mask_mpc"]))
        mse = model.generative(features, torch.from_numpy(arrays["mask_mpg_separate"]))
    expected = facts["separate_mask"]["float64"]
    assert nce.item() == pytest.approx(expected["nce"], abs=1e-12)
    assert mse.item() == pytest.approx(expected["mse"], abs=1e-12)


@pytest.mark.parametrize("kind", [OfficialWay, Eager])
def test_features(kind, patches):
    """One quiet clip, one loud, one of digital silence; against float64."""
    waveform = make_waveform(patches)
    waveform[2] = 0
    features = make(kind, patches).features(waveform)
    expected = fbank(waveform.double() / 32768, num_frames=64, **STATS, dtype=torch.float64)
    assert features.dtype == torch.float32 and features.shape == (3, 64, 128)
    assert (features - expected).abs().max() < 1e-4


def test_bf16_is_near_fp32_and_is_not_fp32(patches):
    model, waveform, mask = make_model(patches), make_waveform(patches), make_mask(patches, 3)
    low = make(Eager, load_config("demo", [*TINY, *KINDS["patches"], BF16]), model)
    full = make(Eager, patches, model)
    assert (low.name, full.name) == ("eager bf16", "eager fp32") and "bf16" in low.what and "fp32" in full.what
    losses = [baseline.loss(waveform, mask) for baseline in (low, full)]
    for loss in losses:
        loss.backward()
    assert losses[0].dtype == torch.float32
    assert 1e-6 < abs(losses[0] / losses[1] - 1) < 1e-2  # bf16 keeps 2^-9 of each value; errors of many average out
    gradients = [torch.cat([p.grad.flatten() for p in baseline.model.parameters()]) for baseline in (low, full)]
    # scores of tens, rounded to bf16, are off by 0.06: so are the shares of a softmax
    assert relative(*gradients) < 0.1


@pytest.mark.parametrize("computes", [True, False])
def test_eager_has_the_precision_that_the_run_finds(computes, monkeypatch):
    """Where the config leaves the precision to the device, ours and eager compute alike."""
    monkeypatch.setattr("ssast.engine.config.computes_in_bf16", lambda: computes)
    left_to_the_device = load_config("demo", [*TINY, *KINDS["patches"], "step.precision=auto"])
    assert left_to_the_device.bf16 == computes
    baseline = make(Eager, left_to_the_device)
    assert baseline.precision == ("bf16" if computes else "fp32") and baseline.precision in baseline.name
    seen = []
    baseline.model.norm.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    baseline.loss(make_waveform(left_to_the_device), make_mask(left_to_the_device, 3))
    assert seen == [computes]
    assert make(OfficialWay, left_to_the_device).precision == "fp32"


def test_compiled_is_one_graph_and_compiled_once(patches):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    baseline, waveform = make(Compiled, patches, backend=backend), make_waveform(patches)
    for _ in range(3):
        baseline.step(waveform)
    assert len(graphs) == 1
    names = {str(node.target) for node in graphs[0].graph.nodes}
    assert any("scaled_dot_product" in name for name in names) and any("log_softmax" in name for name in names)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(OfficialWay, {}), (Eager, {}), (Compiled, {"backend": "aot_eager"})],
    ids=["official way", "eager", "compiled"],
)
def test_steps_learn(config, kind, options):
    baseline, waveform, mask = make(kind, config, **options), make_waveform(config), make_mask(config, 3)
    before = baseline.loss(waveform, mask).item()
    losses = [baseline.step(waveform) for _ in range(10)]
    assert all(loss.shape == () and not loss.requires_grad for loss in losses)
    assert losses[0].item() == pytest.approx(before, rel=0.25)  # before the update, under other masks
    assert baseline.loss(waveform, mask).item() < 0.85 * before


@pytest.mark.parametrize("kind", [OfficialWay, Eager])
def test_the_first_step_is_the_engines(patches, kind, monkeypatch):
    """The same masks, the optimizer of the config: the same weights after it."""
    adam = load_config(
        "demo",
        [
            *TINY,
            "deepspeed.optimizer={type: Adam, params: {lr: 1e-3, betas: [0.95, 0.999], eps: 1.0e-3, weight_decay: "
            "0.1}}",
        ],
    )
    model, waveform, mask = make_model(adam), make_waveform(adam), make_mask(adam, 3)
    baseline = make(kind, adam, model)
    monkeypatch.setattr(baseline, "draw_mask", lambda batch: mask)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.95, 0.999), eps=1e-3, weight_decay=0.1)
    for _ in range(2):
        baseline.step(waveform)
        optimizer.zero_grad()
        model.pretrain(fbank(waveform, num_frames=64, **STATS), mask).loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        # eps is large, so that gradients of nothing but rounding move nothing
        assert (dict(baseline.model.named_parameters())[name] - parameter).abs().max() < 2e-6, name
    adamw = make(kind, load_config("demo", TINY))
    assert type(baseline.optimizer) is torch.optim.Adam and type(adamw.optimizer) is torch.optim.AdamW
    assert adamw.optimizer.defaults["betas"] == (0.9, 0.98) and adamw.optimizer.defaults["weight_decay"] == 0.01


@pytest.mark.parametrize("kind", [OfficialWay, Eager])
def test_masks(config, kind):
    rows, columns = config.architecture.grid
    first, again, other = (make(kind, config, seed=seed) for seed in (0, 0, 1))
    masks = first.draw_mask(200)
    assert masks.shape == (200, 20) and masks.dtype == torch.int64
    ordered = masks.sort(dim=1).values
    assert (ordered.diff(dim=1) > 0).all() and ordered.min() >= 0 and ordered.max() < rows * columns
    assert torch.equal(masks, again.draw_mask(200)) and not torch.equal(masks, other.draw_mask(200))
    assert not torch.equal(masks, first.draw_mask(200))


@pytest.mark.parametrize("kind", [OfficialWay, Eager])
@pytest.mark.parametrize(("cluster", "low", "high"), [("null", 0.0, 0.13), ("[3]", 0.35, 1.0), ("[5]", 0.5, 1.0)])
def test_masks_come_in_squares(kind, cluster, low, high):
    """On the paper's grid, with few masked: the share of masked patches whose neighbour above is masked, too."""
    config = load_config(
        "demo", ["model.input_frames=1024", "model.depth=1", "mask.num_masked=50", f"mask.cluster={cluster}"]
    )
    masked = torch.zeros(100, 512).scatter_(1, make(kind, config).draw_mask(100), 1.0).view(100, 8, 64)
    both = masked[:, 1:] * masked[:, :-1]
    assert low <= (both.sum() / masked[:, 1:].sum()).item() <= high


def test_step_draws_a_mask_for_each_pass(patches, monkeypatch):
    for kind, passes in ((OfficialWay, 2), (Eager, 1)):
        baseline, drawn = make(kind, patches), []
        real = baseline.draw_mask
        monkeypatch.setattr(
            baseline, "draw_mask", lambda batch, real=real, drawn=drawn: drawn.append(real(batch)) or drawn[-1]
        )
        baseline.step(make_waveform(patches))
        assert len(drawn) == passes
    waveform, mask, other = make_waveform(patches), make_mask(patches, 3), make_mask(patches, 4)
    official, eager = make(OfficialWay, patches), make(Eager, patches)
    assert official.loss(waveform, mask, other) != official.loss(waveform, mask, mask)
    assert eager.loss(waveform, mask, other) == eager.loss(waveform, mask, mask)


def test_the_list(patches):
    model = make_model(patches)
    everything = step_baselines(patches, model, CPU, **STATS)
    assert [baseline.name for baseline in everything] == ["official way", "eager fp32", "torch.compile"]
    picked = step_baselines(patches, model, CPU, **STATS, names=["eager", "official way"])
    assert [type(baseline) for baseline in picked] == [Eager, OfficialWay]
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    picked[0].step(make_waveform(patches))
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())  # they train copies
    assert step_baselines(patches, model, CPU, **STATS, names=[]) == []
    with pytest.raises(UserError, match="'jax'"):
        step_baselines(patches, model, CPU, **STATS, names=["eager", "jax"])


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        (Eager, ["objective.name=generative"], "objective.name"),
        (OfficialWay, ["objective.softmax_over=targets"], "objective.softmax_over"),
        (
            OfficialWay,
            ["data.sample_rate=8000"],
            "data.sample_rate",
        ),
        (OfficialWay, ["mask.num_masked=31"], "mask.num_masked"),
    ],
)
def test_what_they_do_not_know_is_said(kind, overrides, message):
    with pytest.raises(UserError, match=message):
        make(kind, load_config("demo", [*TINY, *overrides]))


def test_eager_knows_other_rates():
    config = load_config("demo", [*TINY, "data.sample_rate=8000"])
    waveform = make_waveform(config)
    expected = fbank(waveform, sample_rate=8000, num_frames=64, **STATS)
    torch.testing.assert_close(make(Eager, config).features(waveform), expected, atol=1e-5, rtol=0)


def test_official_features_are_prepared_a_batch_ahead(patches, monkeypatch):
    baseline, mask, threads = make(OfficialWay, patches), make_mask(patches, 3), []
    real = baseline._prepare
    monkeypatch.setattr(baseline, "_prepare", lambda waveform: threads.append(threading.get_ident()) or real(waveform))
    monkeypatch.setattr(baseline, "draw_mask", lambda batch: mask)
    monkeypatch.setattr(baseline.optimizer, "step", lambda: None)
    batches = [make_waveform(patches) // divisor for divisor in (1, 30)]
    first, second = (baseline.loss(batch, mask).item() for batch in batches)
    assert abs(first - second) > 1e-3
    threads.clear()
    losses = [baseline.step(batch).item() for batch in (batches[0], batches[1], batches[1])]
    assert losses == [first, first, second]
    assert len(threads) == 3 and threading.get_ident() not in threads


def test_tf32_is_allowed_in_official_steps_only(patches, monkeypatch):
    baseline, seen = make(OfficialWay, patches), []
    real = baseline.model.generative
    monkeypatch.setattr(
        baseline.model, "generative", lambda *args: seen.append(torch.backends.cuda.matmul.allow_tf32) or real(*args)
    )
    baseline.step(make_waveform(patches))
    baseline.loss(make_waveform(patches), make_mask(patches, 3))
    assert seen == [True, False] and not torch.backends.cuda.matmul.allow_tf32
