import functools
import math
import os
import re
import sys
import types
from collections.abc import Callable

import pytest
import torch
from law import assert_lawful, attention_order_errors
from torch._subclasses.fake_tensor import FakeTensorMode

from ssast.kernels import AttentionChoice, attention, available_attention, choose_attention
from ssast.kernels.attention import BACKENDS, _backward_op, _flash_attn_obstacle, _forward_op, _launches, _tail
from ssast.kernels.choose_attention import _disagreement, _example

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
kernel = functools.partial(attention, backend="triton")
on_gpu = pytest.mark.skipif(os.environ.get("SSAST_TEST_DEVICE") != "cuda", reason="needs a GPU: SSAST_TEST_DEVICE=cuda")


def definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(dim=3) @ v


def projection(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    """[B, N, 3, H, d], of which the model's q, k and v are views."""
    B, H, N, d = shape
    return torch.randn(B, N, 3, H, d, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def split(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return qkv.permute(2, 0, 3, 1, 4).unbind()


def train(
    function: Callable, qkv: torch.Tensor, dout: torch.Tensor, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Output and gradients by name; `dout` is [B, N, H, d], as it comes back to the model's joined heads."""
    qkv = qkv.detach().to(dtype or qkv.dtype).requires_grad_()
    out = function(*split(qkv))
    out.backward(dout.to(out.dtype).transpose(1, 2))
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *split(qkv.grad)), strict=True))


def assert_right(function: Callable, qkv: torch.Tensor, dout: torch.Tensor) -> None:
    exact, same_dtype = train(definition, qkv, dout, torch.float64), train(definition, qkv, dout)
    order_errors = attention_order_errors(*split(qkv), dout.transpose(1, 2))
    for name, actual in train(function, qkv, dout).items():
        assert_lawful(name, actual, same_dtype[name], exact[name], order_errors[name])


def test_equals_the_definition():
    q, k, v = torch.randn(3, 2, 3, 130, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = ((q @ k.transpose(2, 3)) / 8.0).softmax(dim=3) @ v
    torch.testing.assert_close(attention(q, k, v), expected)


SHAPES = {
    "the model's length and head, two heads": (1, 2, 514, 64),
    "no tail": (1, 1, 512, 64),
    "no tail, an odd number of whole tiles": (1, 1, 640, 64),
    "fewer tokens than the smallest tile": (3, 1, 2, 32),
    "one smallest tile, two clips of two heads": (2, 2, 16, 64),
    "one token more than the smallest tile": (1, 2, 17, 128),
    "one less than a whole tile of keys": (3, 1, 63, 32),
    "a whole tile and a tail, three clips": (3, 1, 130, 16),
    "the widest head, whole tile and tail": (1, 1, 130, 128),
    "a tail of more than half a tile": (1, 1, 200, 64),
}
# The long ones in bf16 only: fp16 runs in the same tiles, and those of fp32 are so small that 130 tokens are whole
# tiles and a tail.
CASES = [
    (dtype, why) for why, shape in SHAPES.items() for dtype in (BF16, FP16, FP32) if dtype == BF16 or shape[2] <= 200
]


@pytest.mark.rounding
@pytest.mark.parametrize(("dtype", "why"), CASES)
@pytest.mark.parametrize("backend", ["triton"])
def test_kernel_keeps_the_law(backend, dtype, why, device):
    B, H, N, d = SHAPES[why]
    qkv = projection((B, H, N, d), dtype, device)
    dout = torch.randn(B, N, H, d, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    assert_right(kernel, qkv, dout)


@pytest.mark.parametrize("backend", ["triton"])
def test_one_token_attends_to_itself(backend, device):
    """The softmax of one logit is constant: its gradient is zero, and rounding errors are all that may be there."""
    qkv = projection((2, 1, 1, 16), FP32, device)
    result = train(kernel, qkv, torch.ones(2, 1, 1, 16, device=device))
    assert torch.equal(result["out"], split(qkv)[2]) and torch.equal(result["dv"], torch.ones_like(result["dv"]))
    assert result["dq"].abs().max() < 1e-5 and result["dk"].abs().max() < 1e-5


# Why each: large logits of both signs overflow an exponential without its peak taken off; logits that are all far below
# zero lie far below those of the zeros that fill the tail tile.
@pytest.mark.rounding
@pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning"
)  # in rows past N, which are not stored
@pytest.mark.parametrize("sign", ["both", "negative"])
@pytest.mark.parametrize("backend", ["triton"])
def test_extreme_logits(backend, sign, device):
    qkv = projection((1, 1, 146, 64), BF16, device)
    if sign == "both":
        qkv[:, :, :2] *= 30  # logits up to some thousands
    else:
        qkv[:, :, 0], qkv[:, :, 1] = qkv[:, :, 0].abs() + 10, -qkv[:, :, 1].abs() - 10
    dout = torch.randn(1, 146, 1, 64, generator=torch.Generator().manual_seed(1)).to(device, BF16)
    assert_right(kernel, qkv, dout)


@pytest.mark.parametrize("backend", ["triton"])
def test_any_strides(backend, device):
    """Strides of three kinds at once, rows that are not contiguous, one input as all three, a gradient of broadcast
    ones: the bits are those of contiguous copies.
    """
    shape = (2, 2, 34, 16)
    q, k, v = split(projection(shape, BF16, device))
    mixed = (q.contiguous(), k.transpose(1, 2).contiguous().transpose(1, 2), v)
    scattered = (q, k.transpose(2, 3).contiguous().transpose(2, 3), v[:, :, :, :1].expand(shape))
    for inputs in (mixed, scattered, (q, q, q)):
        results = []
        for each in (inputs, [x.clone(memory_format=torch.contiguous_format) for x in inputs]):
            leaves = [x.detach().requires_grad_() for x in each]
            out = kernel(*leaves)
            results.append((out, *torch.autograd.grad(out.sum(), leaves)))
        assert all(map(torch.equal, *results))


@pytest.mark.parametrize("backend", ["triton"])
def test_joined_heads_are_a_view_and_bits_repeat(backend, device):
    qkv = projection((2, 2, 50, 32), BF16, device)
    dout = torch.randn(2, 50, 2, 32, generator=torch.Generator().manual_seed(1)).to(device, BF16)
    first, second = train(kernel, qkv, dout), train(kernel, qkv, dout)
    assert first["out"].transpose(1, 2).is_contiguous()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", ["triton"])
def test_compiled_equals_eager(backend, device, launches):
    qkv = projection((2, 2, 18, 16), BF16, device)
    dout = torch.randn(2, 18, 2, 16, generator=torch.Generator().manual_seed(1)).to(device, BF16)
    torch.compiler.reset()
    compiled = train(torch.compile(kernel, fullgraph=True, backend="aot_eager"), qkv, dout)
    assert launches == ["_forward_kernel", "_dq_kernel", "_dkv_kernel"]
    eager = train(kernel, qkv, dout)
    assert all(torch.equal(compiled[name], eager[name]) for name in eager)


@pytest.mark.parametrize("backend", ["triton"])
def test_operators_are_sound(backend, device):
    """Schema, fake outputs (shapes, strides, dtypes) and tracing with symbolic shapes, as PyTorch checks them."""
    qkv = projection((1, 2, 18, 16), BF16, device)
    inputs = split(qkv)
    torch.library.opcheck(_forward_op, tuple(split(qkv.clone().requires_grad_())))
    out, lse = _forward_op(*inputs)
    torch.library.opcheck(_backward_op, (torch.randn_like(out), *inputs, out, lse))

    mode = FakeTensorMode()
    fake_inputs = [mode.from_tensor(x) for x in inputs]
    with mode:
        fake_out, fake_lse = _forward_op(*fake_inputs)
        fake_grad = _backward_op(fake_out, *fake_inputs, fake_out, fake_lse)
    for fake, real in ((fake_out, out), (fake_lse, lse), (fake_grad, _backward_op(out, *inputs, out, lse))):
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_empty_batch(device):
    assert kernel(*torch.zeros(3, 0, 2, 514, 64, device=device)).shape == (0, 2, 514, 64)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("name", ["forward", "dq", "dkv"])
def test_tiles_cover_every_row_and_only_tails_reach_beyond(name, dtype):
    for N in [*range(1, 300), 512, 514, 640]:
        for d in (64, 128):
            covered = 0
            for launch in _launches(name, N, d, dtype):
                assert launch.first == covered < N and launch.warps > 0
                covered += launch.tiles * launch.own
                assert launch.is_tail or covered <= N
            assert covered >= N


def test_share_of_the_tiles_that_is_used():
    """What the module says: at 514 tokens 528 x 528 logits are computed, in every kernel."""
    for name in ("forward", "dq", "dkv"):
        computed = 0
        for launch in _launches(name, 514, 64, BF16):
            computed += launch.tiles * launch.own * (514 // launch.other * launch.other + _tail(514 % launch.other))
        assert computed == 528**2


@pytest.mark.parametrize("name", ["torch", "math", "flash"])
def test_pytorch_backends_agree(name):
    assert _disagreement(name, *_example((2, 2, 34, 16), FP32, torch.device("cpu"))) is None


def test_wrong_or_failing_backends_are_found(monkeypatch):
    example = _example((2, 1, 34, 16), FP32, torch.device("cpu"))

    def fails(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory\nmore")

    for wrong, reason in [
        (lambda q, k, v: definition(q, k, v) * 1.001, "output is off"),
        (lambda q, k, v: definition(q, k.detach(), v) + (k - k.detach()), "dk is off"),
        (lambda q, k, v: definition(q, k, v) * float("nan"), "output is off by nan"),
        (fails, "^raised RuntimeError: out of memory$"),
    ]:
        monkeypatch.setitem(BACKENDS, "math", wrong)
        assert re.search(reason, _disagreement("math", *example))


def test_flash_attn_is_known_by_its_function(monkeypatch):
    """Generation 4 alone makes `import flash_attn` work, without generation 2's function; the layouts and outputs of
    theirs are fitted.
    """
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    assert _flash_attn_obstacle("flash-attn-2", (9, 0), BF16) == "is not installed (flash_attn has no flash_attn_func)"
    assert "compute capability 10.0" in _flash_attn_obstacle("flash-attn-3", (10, 0), BF16)
    assert "bf16 and fp16" in _flash_attn_obstacle("flash-attn-2", (8, 0), FP32)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    assert "is not installed" in _flash_attn_obstacle("flash-attn-3", (9, 0), BF16)

    def flash_attn_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, None]:
        return definition(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2), None

    module = types.ModuleType("flash_attn_interface")
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    assert _flash_attn_obstacle("flash-attn-3", (9, 0), BF16) is None
    q, k, v = torch.randn(3, 2, 3, 5, 8)
    torch.testing.assert_close(BACKENDS["flash-attn-3"](q, k, v), definition(q, k, v))


def test_choice_on_the_cpu():
    assert choose_attention((2, 3, 514, 64), BF16, "cpu") == AttentionChoice("torch", {}, {})
    assert choose_attention((2, 3, 514, 64), FP32, "cpu", name="math").name == "math"
    with pytest.raises(ValueError, match="'cudnn' needs a CUDA device; available: torch, math, flash"):
        choose_attention((2, 3, 514, 64), BF16, "cpu", name="cudnn")


def test_none_is_pytorchs_choice_and_never_the_kernel(device, launches):
    q, k, v = split(projection((1, 1, 2, 16), FP32, device))
    assert torch.equal(attention(q, k, v), attention(q, k, v, backend="torch"))
    assert not launches


def test_bad_arguments():
    q = torch.zeros(1, 1, 4, 64)
    for tensors, backend, message in [
        ((q, q, q), "cuda", "attention backend 'cuda' is unknown; available: torch, math, flash"),
        ((q, q, q), "cudnn", "'cudnn' needs a CUDA device; available: torch, math, flash"),
        ((q, q, q), "flash-attn-3", "'flash-attn-3' needs a CUDA device"),
        ((q.double(),) * 3, "triton", "takes bf16, fp16 and fp32 .* not torch.float64"),
        ((q[..., :24],) * 3, "triton", "head dimension in .* with 24"),
        ((q, q[:, :, :2], q), None, "one shape"),
        ((q, q, q.bfloat16()), None, "one shape and dtype"),
        ((q[0], q[0], q[0]), None, "must be .B, H, N, d."),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            attention(*tensors, backend=backend)
        assert "\n" not in str(caught.value)


@on_gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_every_backend_on_the_gpu_agrees(dtype):
    names = available_attention("cuda", dtype, 64)
    example = _example((4, 12, 514, 64), dtype, torch.device("cuda"))
    assert {name: _disagreement(name, *example) for name in names} == dict.fromkeys(names)
    assert {"torch", "math", "triton"} <= set(names)


@on_gpu
def test_the_fastest_is_chosen_on_the_gpu():
    choice = choose_attention((4, 12, 514, 64), BF16, "cuda", compiled=True)
    assert choice.milliseconds.keys() | choice.left_out.keys() == BACKENDS.keys()
    assert (
        choice.name == min(choice.milliseconds, key=choice.milliseconds.get) and min(choice.milliseconds.values()) > 0
    )
