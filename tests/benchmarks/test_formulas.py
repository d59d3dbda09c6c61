"""What the formulas count is what the benchmark's own cases hand over and multiply: bytes are measured on tensors,
floating-point operations by PyTorch's counter, which knows matrix products.
"""

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from ssast.benchmarks import cases, formulas
from ssast.benchmarks.cases import OPERATORS
from ssast.benchmarks.gate import as_tuple

CPU = torch.device("cpu")


def all_cases(operator):
    return list(OPERATORS[operator].cases(cases.Setting(CPU, torch.float32, False, False, False)))


def nbytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def flop_of(compute):
    with FlopCounterMode(display=False) as counter:
        compute()
    return counter.get_total_flops()


@pytest.mark.parametrize("operator", ["fbank", "mask", "attention"])
def test_bytes_are_those_of_the_tensors(operator):
    for case in all_cases(operator):
        inputs = case.make_inputs(0)
        output = as_tuple(case.providers[0].run(**inputs))[0]
        assert case.needs["forward"].bytes == nbytes([*inputs.values(), output])
        if case.learned:  # inputs and the output's gradient in, a gradient of each input out
            assert case.needs["backward"].bytes == 2 * nbytes(inputs.values()) + nbytes([output])
            assert case.needs["both"].bytes == 2 * nbytes(inputs.values()) + 2 * nbytes([output])


def test_bytes_of_the_loss():
    """Three tensors of the masked patches in, two gradients out; where targets are gathered, the mask is read, and of
    all patches only the masked ones.
    """
    for case in all_cases("loss"):
        inputs = case.make_inputs(0)
        read = nbytes([inputs["class_pred"], inputs["recon_pred"], inputs["class_pred"]])
        index = nbytes([inputs["mask"]]) if "mask" in inputs else 0
        gradients = nbytes([inputs["class_pred"], inputs["recon_pred"]])
        assert case.needs["forward"].bytes == read + index
        assert case.needs["both"].bytes == case.needs["backward"].bytes == read + index + gradients


def test_bytes_and_flop_of_the_embedding():
    """Only the visible patches are read and projected, and only parameters are learned."""
    for case in all_cases("embed"):
        inputs = case.make_inputs(0)
        parameters = nbytes(inputs[name] for name in case.learned)
        tokens = case.providers[0].run(**inputs)
        visible = torch.ones(inputs["patches"].shape[:2], dtype=torch.bool).scatter(1, inputs["mask"], False)
        patches, weight = inputs["patches"][visible], inputs["weight"].detach().requires_grad_()
        needs = case.needs
        assert needs["forward"].bytes == nbytes([patches, inputs["mask"], tokens]) + parameters
        assert needs["both"].bytes == needs["forward"].bytes + parameters + nbytes([tokens])
        assert needs["forward"].flop == flop_of(
            lambda patches=patches, weight=weight: functional.linear(patches, weight)
        )
        assert needs["both"].flop == flop_of(
            lambda patches=patches, weight=weight: functional.linear(patches, weight).sum().backward()
        )


def test_bytes_of_visible_patches_and_of_what_puts_them_back():
    """As the embedding's, without tokens of masked patches, and with the slots that the one writes and the other
    reads.
    """
    (case,) = all_cases("embed_visible")
    inputs = case.make_inputs(0)
    visible = torch.ones(inputs["patches"].shape[:2], dtype=torch.bool).scatter(1, inputs["mask"], False)
    tokens, slot = case.providers[0].run(**inputs)
    parameters = nbytes(inputs[name] for name in case.learned)
    patches = inputs["patches"][visible]
    assert case.needs["forward"].bytes == nbytes([patches, inputs["mask"], slot, tokens]) + parameters
    assert case.needs["both"].bytes == case.needs["forward"].bytes + parameters + nbytes([tokens])
    assert case.needs["forward"].flop == flop_of(lambda: functional.linear(patches, inputs["weight"]))

    (case,) = all_cases("mask_tokens")
    inputs = case.make_inputs(0)
    out = case.providers[0].run(**inputs)
    learned = [inputs[name] for name in case.learned]
    assert case.needs["forward"].bytes == case.needs["backward"].bytes == nbytes([*inputs.values(), out])
    assert case.needs["both"].bytes == nbytes([*inputs.values(), out, *learned, out])


def test_flop_of_attention_and_loss():
    batch, heads, tokens, width = 2, 3, 5, 8
    q, k, v = torch.randn(3, batch, heads, tokens, width, requires_grad=True).unbind()

    def attend():
        return (q @ k.transpose(2, 3)).softmax(dim=3) @ v

    needs = formulas.attention(batch, heads, tokens, width, 4)
    assert needs["forward"].flop == flop_of(attend)
    assert needs["both"].flop == flop_of(lambda: attend().sum().backward())
    assert needs["backward"].flop == needs["both"].flop - needs["forward"].flop

    prediction, target = torch.randn(2, 7, 5, requires_grad=True), torch.randn(2, 7, 5)

    def nce():
        return torch.bmm(target, prediction.transpose(1, 2)).log_softmax(dim=2)

    needs = formulas.loss(2, 7, 5, 4, gathered=False)
    assert needs["forward"].flop == flop_of(nce)
    assert needs["both"].flop == flop_of(lambda: nce().sum().backward())


def test_flop_of_a_frame():
    """No counter knows an FFT. Of a frame of 400 samples: 2,000 for its mean, pre-emphasis and window, 11,520 = 2.5 x
    512 x 9 for the FFT, 768 for power, 1,024 for the mel filters and 384 for logarithm and scaling.
    """
    six_frames = formulas.fbank(B=2, S=720, T=8, F=128, in_size=2, out_size=4)["forward"]
    assert six_frames.flop == 6 * 15_696
    two_frames = formulas.fbank(B=2, S=720, T=1, F=128, in_size=2, out_size=4)["forward"]
    assert two_frames.flop == 2 * 15_696, "frames that the output has no room for are not needed"


def test_ceilings():
    assert formulas.copy(100)["forward"].bytes == 200
    a = torch.randn(10, 10)
    assert formulas.matmul(10, a.element_size())["forward"] == formulas.Need(3 * nbytes([a]), flop_of(lambda: a @ a))
