"""The law has teeth: with room for another order of summation it still fails a product that loses precision."""

import os

import numpy as np
import pytest
import test_attention
import test_embed
import test_mspm_loss
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from ssast.kernels.law import summation_error

FP32 = torch.float32
pytestmark = pytest.mark.rounding
in_the_interpreter = pytest.mark.skipif(
    os.environ.get("SSAST_TEST_DEVICE") == "cuda", reason="replaces the interpreter's product"
)


def keep_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """float32 rounded to `bits` bits of significand (TF32 has 11, bf16 has 8), the hidden one included."""
    significand, exponent = np.frexp(values.astype(np.float32))
    return np.ldexp(np.round(significand * 2.0**bits) / 2.0**bits, exponent).astype(np.float32)


def loss_case(device: torch.device) -> None:
    class_pred, recon_pred, target, mask = test_mspm_loss.inputs(device, 3, 70, None, 256, FP32, FP32, FP32)
    test_mspm_loss.assert_all_lawful(class_pred, recon_pred, target, mask=mask)


def attention_case(device: torch.device) -> None:
    test_attention.test_kernel_keeps_the_law("triton", FP32, "a whole tile and a tail, three clips", device)


def embed_case(device: torch.device) -> None:
    test_embed.test_law("triton", 3, 63, 256, 130, 17, True, FP32, device)


CASES = {"loss": loss_case, "attention": attention_case, "embed": embed_case}


@in_the_interpreter
@pytest.mark.parametrize("operator", CASES)
@pytest.mark.parametrize("bits", [8, 11, 24], ids=["bf16", "TF32", "fp32"])
def test_a_product_of_fewer_bits_breaks_the_law(bits, operator, device, monkeypatch):
    dot = InterpreterBuilder.create_dot

    def coarse_dot(self: object, a: TensorHandle, b: TensorHandle, *rest: object) -> TensorHandle:
        a, b = (TensorHandle(keep_bits(x.data, bits), x.dtype) for x in (a, b))
        return dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", coarse_dot)
    if bits == 24:
        CASES[operator](device)
    else:
        with pytest.raises(AssertionError, match=r"error .*, allowed"):
            CASES[operator](device)


@in_the_interpreter
@pytest.mark.parametrize("operator", ["loss", "embed"])
def test_sums_kept_in_fewer_bits_break_the_law(operator, device, monkeypatch):
    """Products as they should be, their sum rounded to TF32's 11 bits after every block."""
    dot = InterpreterBuilder.create_dot

    def coarse_sum(self: object, *args: object) -> TensorHandle:
        result = dot(self, *args)
        return TensorHandle(keep_bits(result.data, 11), result.dtype)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", coarse_sum)
    with pytest.raises(AssertionError, match=r"error .*, allowed"):
        CASES[operator](device)


@pytest.mark.parametrize("length", [16, 256, 4096])
def test_any_order_of_summation_is_within_its_error(length):
    """Forwards, backwards, in four lanes, smallest first, and pairwise; both of random signs and of one sign."""
    generator = np.random.default_rng(0)
    for a in (generator.standard_normal((64, length)), generator.uniform(0, 1, (64, length))):
        a, b = a.astype(np.float32), generator.uniform(0.5, 1, (64, length)).astype(np.float32)
        products = a * b  # [64, K], rounded to float32
        exact = (a.astype(np.float64) * b).sum(axis=1)
        allowed = summation_error(torch.from_numpy(a)[:, None], torch.from_numpy(b)[:, :, None]).flatten().numpy()
        lanes = products.reshape(64, -1, 4)
        ascending = np.take_along_axis(products, np.abs(products).argsort(axis=1), axis=1)
        sums = {
            "forwards": np.cumsum(products, axis=1)[:, -1],
            "backwards": np.cumsum(products[:, ::-1], axis=1)[:, -1],
            "lanes": np.cumsum(lanes, axis=1)[:, -1].sum(axis=1),
            "smallest first": np.cumsum(ascending, axis=1)[:, -1],
            "pairwise": products.sum(axis=1),
        }
        for name, each in sums.items():
            assert each.dtype == np.float32 and (np.abs(each - exact) <= allowed).all(), name
