import pytest
import torch
from law import assert_lawful

from ssast.kernels import embed_visible_patches, insert_mask_tokens
from ssast.kernels.law import summation_error
from ssast.kernels.mask_tokens import _insert_backward_op, _insert_op

# Clips, patches, width, masked. Why each: the paper's patches; a grid that no tile divides and a width above one; all
# but one masked; one masked; none masked.
SHAPES = [(2, 512, 192, 400), (3, 63, 130, 17), (2, 70, 64, 69), (1, 20, 48, 1), (2, 5, 16, 0)]


def draw(clips: int, patches: int, width: int, masked: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs in float64, so that they run the reference, and the slots of a random mask."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "encoded": (clips, 2 + patches - masked, width),
        "mask_token": (width,),
        "position": (2 + patches, width),
    }
    slot = torch.full((clips, patches), -1, dtype=torch.int32)
    for clip in range(clips):
        visible = torch.randperm(patches, generator=generator)[masked:].sort().values
        slot[clip, visible] = torch.arange(patches - masked, dtype=torch.int32)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}, slot


def run(
    given: dict[str, torch.Tensor], slot: torch.Tensor, backend: str | None, upstream: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Tokens and the gradient of everything, by name."""
    leaves = {name: value.detach().requires_grad_() for name, value in given.items()}
    tokens = insert_mask_tokens(**leaves, slot=slot, backend=backend)
    grads = torch.autograd.grad(tokens, list(leaves.values()), upstream.to(tokens.dtype))
    return {"tokens": tokens.detach(), **dict(zip(leaves, grads, strict=True))}


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_each_token_is_what_it_should_be(backend, device):
    given, slot = draw(2, 6, 4, 3)
    given = {name: value.float().to(device) for name, value in given.items()}
    tokens = insert_mask_tokens(**given, slot=slot.to(device), backend=backend)
    for clip in range(2):
        for token in range(8):
            if token < 2:
                expected = given["encoded"][clip, token]
            elif (place := slot[clip, token - 2]) < 0:
                expected = given["mask_token"]
            else:
                expected = given["encoded"][clip, 2 + place]
            torch.testing.assert_close(tokens[clip, token], expected + given["position"][token])


def test_gradients():
    given, slot = draw(2, 6, 4, 3)
    leaves = tuple(value.requires_grad_() for value in given.values())
    assert torch.autograd.gradcheck(lambda *values: insert_mask_tokens(*values, slot), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("clips", "patches", "width", "masked"), SHAPES)
@pytest.mark.parametrize("backend", ["triton"])
def test_law(backend, clips, patches, width, masked, dtype, device):
    given, slot = draw(clips, patches, width, masked)
    given, slot = {name: value.to(device, dtype) for name, value in given.items()}, slot.to(device)
    generator = torch.Generator().manual_seed(2)
    upstream = torch.randn(clips, 2 + patches, width, generator=generator, dtype=torch.float64).to(device, dtype)
    ours, same = run(given, slot, backend, upstream), run(given, slot, "torch", upstream)
    exact = run({name: value.double() for name, value in given.items()}, slot, "torch", upstream.double())
    ones, gradient = torch.ones(1, clips * (2 + patches), device=device), upstream.double()
    order_errors = {
        "mask_token": summation_error(ones, gradient.flatten(0, 1)),
        "position": summation_error(ones[:, :clips], gradient.flatten(1)),
    }
    for name in exact:
        assert_lawful(name, ours[name], same[name], exact[name], order_errors.get(name, 0.0))
    if dtype == torch.float32:
        again = run(given, slot, backend, upstream)
        assert all(torch.equal(ours[name], again[name]) for name in ours)


@pytest.mark.parametrize("backend", ["triton"])
def test_law_with_more_clips_than_the_sums_are_split_into(backend, device, monkeypatch):
    monkeypatch.setattr("ssast.kernels.mask_tokens._PROGRAMS", 3)
    test_law(backend, 8, 5, 16, 2, torch.float32, device)


@pytest.mark.parametrize("backend", ["triton"])
def test_low_precision_tokens_with_float32_positions(backend, device):
    """As under autocast: float32 tokens, and a gradient in the dtype of what came in."""
    given, slot = draw(2, 9, 16, 4)
    given = {name: value.float().to(device) for name, value in given.items()}
    given["encoded"] = given["encoded"].bfloat16()
    ours, same = (
        run(given, slot.to(device), each, torch.ones(2, 11, 16, device=device)) for each in (backend, "torch")
    )
    assert {name: value.dtype for name, value in ours.items()} == {name: value.dtype for name, value in same.items()}
    assert ours["tokens"].dtype == torch.float32 and ours["encoded"].dtype == torch.bfloat16
    for name in ours:
        assert_lawful(name, ours[name], same[name], same[name])


@pytest.mark.parametrize("backend", ["triton"])
def test_one_launch_forward(backend, device, launches):
    given, slot = draw(2, 9, 16, 4)
    insert_mask_tokens(**{name: value.float().to(device) for name, value in given.items()}, slot=slot.to(device))
    assert launches == ["_insert_kernel"]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_takes_the_slots_of_embed_visible_patches(backend, device):
    """There and back: what is not masked comes out as it went in, plus its positions."""
    generator = torch.Generator().manual_seed(3)
    patches, mask = torch.randn(2, 6, 4, generator=generator).to(device), torch.tensor([[4, 0], [5, 2]], device=device)
    zeros = {"bias": torch.zeros(4), "position": torch.zeros(8, 4), "prefix": torch.zeros(2, 4)}
    zeros = {name: value.to(device) for name, value in zeros.items()}
    tokens, slot = embed_visible_patches(patches, torch.eye(4, device=device), **zeros, mask=mask, backend=backend)
    back = insert_mask_tokens(tokens, zeros["bias"], zeros["position"], slot, backend=backend)
    expected = patches.clone()
    expected[torch.arange(2)[:, None], mask.cpu()] = 0
    torch.testing.assert_close(back[:, 2:], expected)


def test_operators_keep_the_rules_of_torch_library(device):
    given, slot = draw(2, 7, 8, 3)
    given = {name: value.float().to(device).requires_grad_() for name, value in given.items()}
    torch.library.opcheck(_insert_op, (*given.values(), slot.to(device)))
    _, mask_token, position = (value.detach() for value in given.values())
    arguments = torch.randn(2, 9, 8, device=device), mask_token, position, slot.to(device), 4, torch.float32
    torch.library.opcheck(_insert_backward_op, arguments)


def test_bad_arguments():
    given, slot = draw(2, 6, 4, 3)
    wrong = {"mask_token": given["mask_token"][1:], "position": given["position"][1:]}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"{name} is .* and must be"):
            insert_mask_tokens(**{**given, name: value}, slot=slot)
    with pytest.raises(ValueError, match=r"slot is .* and must be"):
        insert_mask_tokens(**given, slot=slot[:1])
    with pytest.raises(ValueError, match="encoded has 2 tokens"):
        insert_mask_tokens(**{**given, "encoded": given["encoded"][:, :2]}, slot=slot)


def test_an_empty_batch(device):
    given, slot = draw(2, 6, 4, 3)
    given = {name: value.float().to(device) for name, value in given.items()}
    leaves = {**given, "encoded": given["encoded"][:0]}
    leaves = {name: value.requires_grad_() for name, value in leaves.items()}
    insert_mask_tokens(**leaves, slot=slot[:0].to(device), backend="triton").sum().backward()
    assert (leaves["mask_token"].grad == 0).all() and (leaves["position"].grad == 0).all()
