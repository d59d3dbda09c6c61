"""FP8 products: the reference anywhere, torch._scaled_mm in PyTorch's emulation on the CPU, and for real with
SSAST_TEST_DEVICE=cuda.
"""

import contextlib
import math

import pytest
import torch
from torch._dynamo.testing import AotEagerAndRecordGraphs

from ssast.kernels.fp8 import E4M3, E5M2, fp8_linear, fp8_obstacle

NAMES = ("y", "dx", "dweight", "dbias")


@pytest.fixture(params=["torch", "scaled_mm"])
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    if request.param == "scaled_mm" and device.type == "cuda" and (obstacle := fp8_obstacle(device)):
        pytest.skip(f"FP8 {obstacle}")
    return request.param


def gaussian(
    device: torch.device, rows: int = 260, width_in: int = 256, width_out: int = 192
) -> tuple[torch.Tensor, ...]:
    """x, weight, bias and the gradient of y, in float32."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, width_in), (width_out, width_in), (width_out,), (rows, width_out))
    scales = (1.0, 0.02, 0.1, 1e-6)  # of a model in training
    return tuple(
        (torch.randn(shape, generator=generator) * scale).to(device)
        for shape, scale in zip(shapes, scales, strict=True)
    )


def run(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dy: torch.Tensor, backend: str | None
) -> dict[str, torch.Tensor]:
    leaves = [each.detach().requires_grad_() for each in (x, weight, bias)]
    y = fp8_linear(*leaves, backend=backend)
    return dict(zip(NAMES, (y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))), strict=True))


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """Nothing quantised, in float64."""
    x, weight, bias, dy = (each.double() for each in (x, weight, bias, dy))
    return dict(zip(NAMES, (x @ weight.T + bias, dy @ weight, dy.T @ x, dy.sum(0)), strict=True))


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).square().mean() / expected.square().mean()).sqrt().item()


def rounding_noise(tensor: torch.Tensor, dtype: torch.dtype) -> float:
    """RMS, relative to the tensor's, of rounding to nearest: an error evenly spread over one step of the format has 1 /
    sqrt(12) of it.
    """
    tensor = tensor.double()
    scaled = tensor * (torch.finfo(dtype).max / tensor.abs().max())
    steps = torch.finfo(dtype).eps * 2.0 ** scaled.abs().log2().floor()
    return math.sqrt(steps.square().mean() / 12 / scaled.square().mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_those_of_rounding_the_factors(backend, dtype, device):
    """Of independent factors the noises add in squares: 3.7% in y, 5.9% in the gradients; no more, and no less, as bf16
    would err.
    """
    x, weight, bias, dy = (each.to(dtype) for each in gaussian(device))
    bias = torch.zeros_like(bias)
    ours, truth = run(x, weight, bias, dy, backend), exact(x, weight, bias, dy)
    noise_x, noise_weight, noise_dy = rounding_noise(x, E4M3), rounding_noise(weight, E4M3), rounding_noise(dy, E5M2)
    expected = {"y": (noise_x, noise_weight), "dx": (noise_dy, noise_weight), "dweight": (noise_dy, noise_x)}
    for name, noises in expected.items():
        assert relative_rms(ours[name], truth[name]) == pytest.approx(math.hypot(*noises), rel=0.1), name
    assert relative_rms(ours["dbias"], truth["dbias"]) < (1e-6 if dtype == torch.float32 else 2**-8)


def test_each_stored_value_is_within_half_a_step(backend, device):
    """Multiplied by the identity, which quantises exactly, the stored values come out: relative precision of 2^-4 and
    2^-3 down to 2^-14 (e4m3) and 2^-29 (e5m2) of the largest, which is what keeps rows beside an outlier alive.
    """
    generator = torch.Generator().manual_seed(0)
    for name, precision, octaves in (("y", 2**-4, 14), ("dx", 2**-3, 29)):
        given = 2.0 ** -torch.rand(64, 32, generator=generator).mul(octaves).to(device)
        given[3] = 1.0
        identity = torch.eye(32, device=device)
        stored = run(given, identity, torch.zeros(32, device=device), given, backend)[name]
        error = ((stored - given) / given).abs().max().item()
        assert precision / 2 < error <= precision * (1 + 1e-6), name
        torch.testing.assert_close(stored[3], given[3], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(
    "rows", [1, 16, 37]
)  # below a multiple of 16, one, and above: dweight is summed over padded rows
def test_exact_where_the_values_are(backend, rows, device):
    """Integers up to 7 are stored exactly under a scale of 7 / 448 or 7 / 57344, powers of two, and so are their
    products and sums.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, 48), (32, 48), (32,), (rows, 32))
    given = [torch.randint(-7, 8, shape, generator=generator).float().to(device) for shape in shapes]
    for each in given:
        each.view(-1)[0] = 7.0
    ours, truth = run(*given, backend), exact(*given)
    for name in NAMES:
        assert ours[name].dtype == torch.float32
        assert torch.equal(ours[name].double(), truth[name]), name


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
@pytest.mark.parametrize("backend", ["scaled_mm"], indirect=True)
def test_scaled_mm_multiplies_what_the_reference_does(backend, dtypes, device):
    """dtypes: of x and of the weights. The oracle quantises the same values and multiplies them in float64."""
    x, weight, bias, dy = gaussian(device, rows=37)
    given = (x.to(dtypes[0]), weight.to(dtypes[1]), bias.to(dtypes[1]), dy.to(dtypes[0]))
    ours, same, oracle = run(*given, backend), run(*given, "torch"), run(*(each.double() for each in given), "torch")
    # of float32 sums; Hopper's matrix units keep some 14 bits of theirs
    least = 1e-6 if device.type == "cpu" else 2**-8
    for name in NAMES:
        assert ours[name].dtype == same[name].dtype, name
        assert relative_rms(ours[name], oracle[name]) < max(least, torch.finfo(ours[name].dtype).eps), name
        assert relative_rms(same[name], oracle[name]) < max(1e-6, torch.finfo(same[name].dtype).eps), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 37])
def test_a_gpus_rules_are_kept(rows, dtype, monkeypatch):
    """The emulation on the CPU takes anything. Of tensors without memory PyTorch checks what it checks of a GPU's:
    layouts, and sizes that are multiples of 16; not the rules about the bias and e5m2.
    """
    calls, scaled_mm = [], torch._scaled_mm

    def as_on_a_gpu(a: torch.Tensor, b: torch.Tensor, *scales: torch.Tensor, **options: object) -> None:
        shadows = (
            torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device="meta") for each in (a, b, *scales)
        )
        scaled_mm(*shadows, **{**options, "bias": None})
        assert not a.dtype == b.dtype == E5M2
        assert options["bias"] is None or options["bias"].dtype == options["out_dtype"] == torch.bfloat16

    def checked(*args: torch.Tensor, **options: object) -> torch.Tensor:
        as_on_a_gpu(*args, **options)
        calls.append(options["use_fast_accum"])
        return scaled_mm(*args, **options)

    one, square = torch.ones(()), torch.ones(16, 32).to(E4M3)
    with pytest.raises(RuntimeError, match="col_major"):
        as_on_a_gpu(square, square.t().contiguous(), one, one, bias=None, out_dtype=dtype)
    monkeypatch.setattr(torch, "_scaled_mm", checked)
    x, weight, bias, dy = gaussian(torch.device("cpu"), rows=rows)
    run(x.to(dtype).T.contiguous().T, weight.T.contiguous().T, bias, dy.T.contiguous().T, "scaled_mm")
    assert calls == [True, False, False]


def test_zeros(backend, device):
    """A largest magnitude of zero: the bias alone, gradients of zero, and no NaN."""
    given = gaussian(device, rows=5)
    for factor, vanishing in ((0, ("dweight",)), (1, ("dx",)), (3, ("dx", "dweight", "dbias"))):
        ours = run(*(torch.zeros_like(each) if i == factor else each for i, each in enumerate(given)), backend)
        assert factor == 3 or torch.equal(ours["y"], given[2].expand(5, -1)), factor
        for name in NAMES:
            assert ours[name].isfinite().all(), (factor, name)
            assert ours[name].any() != (name in vanishing), (factor, name)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows(backend, value, device):
    """As NaN all over each result that a spoilt factor enters; the others stay as they are."""
    given = gaussian(device, rows=20)
    sound = run(*given, backend)
    for factor, spoilt in ((0, ("y", "dweight")), (1, ("y", "dx")), (3, ("dx", "dweight", "dbias"))):
        wrong = [each.clone() for each in given]
        wrong[factor][2, 3] = value
        ours = run(*wrong, backend)
        for name in NAMES:
            if name == "dbias" and name in spoilt:
                assert not ours[name][3].isfinite()
            elif name in spoilt:
                assert ours[name].isnan().all(), (factor, name)
            else:
                assert torch.equal(ours[name], sound[name]), (factor, name)


def test_tensors_of_any_stride_and_shape(backend, device):
    given = gaussian(device, rows=24)
    plain = run(*given, backend)
    x, weight, bias, dy = given
    strided = run(
        x.T.contiguous().T, weight.T.contiguous().T, torch.stack((bias, bias), 1)[:, 0], dy.T.contiguous().T, backend
    )
    batched = run(x.reshape(2, 3, 4, -1), weight, bias, dy.reshape(2, 3, 4, -1), backend)
    assert batched["y"].shape == (2, 3, 4, 192) and batched["dx"].shape == (2, 3, 4, 256)
    for name in NAMES:
        assert torch.equal(batched[name].reshape(plain[name].shape), plain[name]), name
        if name == "dbias":  # a sum in another order
            torch.testing.assert_close(strided[name], plain[name])
        else:
            assert torch.equal(strided[name], plain[name]), name
    without = fp8_linear(x, weight, backend=backend)
    assert torch.equal(without, fp8_linear(x, weight, torch.zeros_like(bias), backend=backend))


def test_autocast(backend, device):
    """fp32 in, bf16 out, fp32 gradients, as nn.Linear; and multiplied no less exactly than without."""
    x, weight, bias, dy = gaussian(device, rows=24)
    with torch.autocast(device.type, torch.bfloat16):
        ours = run(x, weight, bias, dy, backend)
    same = run(x.bfloat16(), weight, bias, dy, backend)
    assert [ours[name].dtype for name in NAMES] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    for name in NAMES:
        assert torch.equal(ours[name], same[name].to(ours[name].dtype)), name


@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd")  # of the recorder
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_into_one_graph_that_shows_the_casts(backend, autocast, device):
    *leaves, dy = gaussian(device, rows=37)
    leaves = [each.requires_grad_() for each in leaves]
    recorder = AotEagerAndRecordGraphs()

    def layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return fp8_linear(x, weight, bias, backend=backend)

    with torch.autocast(device.type, torch.bfloat16) if autocast else contextlib.nullcontext():
        eager, compiled = layer(*leaves), torch.compile(layer, fullgraph=True, backend=recorder)(*leaves)
    assert torch.equal(compiled, eager)
    grads = [torch.autograd.grad(each, leaves, dy.to(each.dtype)) for each in (eager, compiled)]
    for name, one, other in zip(NAMES[1:], *grads, strict=True):
        assert torch.equal(one, other), name
    for graphs, factors in ((recorder.fw_graphs, 2), (recorder.bw_graphs, 1)):
        (graph,) = graphs
        assert sum(node.target is torch.ops.aten.amax.default for node in graph.graph.nodes) == 2 * factors


def test_refusals(device):
    x, weight, bias, _ = gaussian(device, rows=4)
    with pytest.raises(ValueError, match="multiples of 16"):
        fp8_linear(x[:, :40], weight[:, :40], bias)
    with pytest.raises(ValueError, match="multiples of 16"):
        fp8_linear(x, weight[:40], bias[:40])
    with pytest.raises(ValueError, match="at least one row"):
        fp8_linear(x[:0], weight, bias)
    for wrong in ((x[:, :32], weight, bias), (x, weight[0], bias), (x, weight, bias[:16])):
        with pytest.raises(ValueError, match=r"must be \[\.\.\., in\]"):
            fp8_linear(*wrong)
    with pytest.raises(ValueError, match="backend must be"):
        fp8_linear(x, weight, bias, backend="triton")
    with pytest.raises(ValueError, match="float64"):
        fp8_linear(x.double(), weight, bias, backend="scaled_mm")


def test_where_fp8_runs(monkeypatch):
    assert "NVIDIA" in fp8_obstacle(torch.device("cpu"))
    for capability, runs in (((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True), ((10, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        obstacle = fp8_obstacle(torch.device("cuda"))
        assert (obstacle is None) == runs
        assert runs or f"{capability[0]}.{capability[1]}" in obstacle
