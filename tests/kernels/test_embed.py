import pytest
import torch
from law import assert_lawful, embed_order_errors

from ssast.kernels import embed_patches, embed_visible_patches
from ssast.kernels.embed import _embed_backward_op, _embed_op


def inputs(clips: int = 2, patches: int = 6, values: int = 8, width: int = 4) -> dict[str, torch.Tensor]:
    """float64, so that they run the reference."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "patches": (clips, patches, values),
        "weight": (width, values),
        "bias": (width,),
        "position": (2 + patches, width),
        "prefix": (2, width),
        "mask_token": (width,),
    }
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def test_each_token_is_what_it_should_be():
    given = inputs()
    mask = torch.tensor([[0, 3], [4, 5]])
    tokens = embed_patches(**given, mask=mask)
    for clip in range(2):
        for token in range(8):
            if token < 2:
                expected = given["prefix"][token]
            elif token - 2 in mask[clip]:
                expected = given["mask_token"]
            else:
                expected = given["weight"] @ given["patches"][clip, token - 2] + given["bias"]
            torch.testing.assert_close(tokens[clip, token], expected + given["position"][token])


def test_gradients_of_everything_learned():
    given = {name: value.requires_grad_(name != "patches") for name, value in inputs().items()}
    mask = torch.tensor([[0, 3], [4, 5]])
    learned = [name for name in given if name != "patches"]

    def embed(*values: torch.Tensor) -> torch.Tensor:
        return embed_patches(given["patches"], *values, mask=mask)

    assert torch.autograd.gradcheck(embed, [given[name] for name in learned])


def test_without_mask_nothing_is_hidden():
    given = inputs()
    plain = embed_patches(**{**given, "mask_token": None})
    torch.testing.assert_close(plain, embed_patches(**given), rtol=0, atol=0)


def test_bad_arguments():
    given = inputs()
    with pytest.raises(ValueError, match="mask_token"):
        embed_patches(**{**given, "mask_token": None}, mask=torch.zeros(2, 1, dtype=torch.int64))
    wrong = {"position": given["position"][1:], "prefix": given["prefix"][:1], "weight": given["weight"][:, 1:]}
    for name, value in {**wrong, "bias": given["bias"][1:], "mask_token": given["mask_token"][1:]}.items():
        with pytest.raises(ValueError, match=f"{name} is .* and must be"):
            embed_patches(**{**given, name: value})
    with pytest.raises(ValueError, match=r"mask is \(1, 2\)"):
        embed_patches(**given, mask=torch.zeros(1, 2, dtype=torch.int64))


def run(
    given: dict[str, torch.Tensor], mask: torch.Tensor | None, backend: str | None, upstream: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Tokens and the gradient of everything, by name."""
    leaves = {name: value.detach().requires_grad_() for name, value in given.items()}
    tokens = embed_patches(**leaves, mask=mask, backend=backend)
    used = [name for name in leaves if mask is not None or name != "mask_token"]
    grads = torch.autograd.grad(tokens, [leaves[name] for name in used], upstream.to(tokens.dtype))
    return {"tokens": tokens.detach(), **dict(zip(used, grads, strict=True))}


def draw_mask(clips: int, patches: int, masked: int) -> torch.Tensor:
    """In no order: the kernel must not count on one."""
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(patches, generator=generator)[:masked] for _ in range(clips)])


# Why each: the paper's patches; a grid and a mask that no tile divides, and a width below a tile; one clip, one masked,
# one visible; frame patches of another size with values that are no power of two, or more than one block of them; more
# clips than the sums are split into (12 in float32), and more parts than are added at a time (16).
SHAPES = [
    (2, 512, 256, 192, 400),
    (1, 20, 600, 48, 9),
    (3, 63, 256, 130, 17),
    (1, 2, 16, 16, 1),
    (2, 70, 96, 64, 69),
    (17, 5, 16, 300, 2),
]
# The paper's in bf16 only: float16 runs in the same tiles, and those of float32 are so small that the others hold
# several, whole and ragged.
CASES = [
    (*shape, dtype)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for shape in SHAPES
    if dtype == torch.bfloat16 or shape[1] < 512
]


@pytest.mark.rounding
@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize(("clips", "patches", "values", "width", "masked", "dtype"), CASES)
@pytest.mark.parametrize("backend", ["triton"])
def test_law(backend, clips, patches, values, width, masked, with_mask, dtype, device):
    given = {name: value.to(device, dtype) for name, value in inputs(clips, patches, values, width).items()}
    mask = draw_mask(clips, patches, masked).to(device) if with_mask else None
    upstream = torch.randn(
        clips, 2 + patches, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    ).to(device, dtype)
    ours = run(given, mask, backend, upstream)
    same = run(given, mask, "torch", upstream)
    exact = run({name: value.double() for name, value in given.items()}, mask, "torch", upstream.double())
    assert ours.keys() == exact.keys()
    order_errors = embed_order_errors(given, mask, upstream)
    for name in exact:
        assert_lawful(name, ours[name], same[name], exact[name], order_errors[name])


@pytest.mark.parametrize("backend", ["triton"])
def test_patches_of_any_stride(backend, device):
    given = {name: value.float().to(device) for name, value in inputs(2, 9, 16, 16).items()}
    mask = draw_mask(2, 9, 5).to(device)
    plain = embed_patches(**given, mask=mask, backend=backend)
    wide = torch.stack((given["patches"], given["patches"] + 1), dim=2)
    for view in (
        wide[:, :, 0],
        wide.permute(0, 1, 3, 2).contiguous()[..., 0],
        given["patches"].transpose(0, 1).contiguous().transpose(0, 1),
    ):
        assert torch.equal(view, given["patches"])
        assert torch.equal(embed_patches(**{**given, "patches": view}, mask=mask, backend=backend), plain)


@pytest.mark.parametrize("backend", ["triton"])
def test_runs_are_bit_equal(backend, device):
    given = {name: value.float().to(device) for name, value in inputs(5, 20, 16, 40).items()}
    mask, upstream = draw_mask(5, 20, 8).to(device), torch.randn(5, 22, 40).to(device)
    first, second = run(given, mask, backend, upstream), run(given, mask, backend, upstream)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.rounding
@pytest.mark.parametrize("backend", ["triton"])
def test_autocast_rounds_the_projection_only(backend, device):
    """fp32 parameters under bf16 autocast: a bf16 product, added to float32 positions, float32 gradients."""
    given = {name: value.float().to(device) for name, value in inputs(2, 9, 16, 16).items()}
    mask, upstream = draw_mask(2, 9, 4).to(device), torch.randn(2, 11, 16).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        ours, same = run(given, mask, backend, upstream), run(given, mask, "torch", upstream)
    exact = run({name: value.double() for name, value in given.items()}, mask, "torch", upstream.double())
    order_errors = embed_order_errors(given, mask, upstream)
    for name in exact:
        assert ours[name].dtype == torch.float32
        assert_lawful(name, ours[name], same[name], exact[name], order_errors[name])


@pytest.mark.parametrize("backend", ["triton"])
def test_compiles_into_one_graph(backend, device):
    given = {
        name: value.float().to(device).requires_grad_(name != "patches") for name, value in inputs(2, 9, 16, 16).items()
    }
    mask = draw_mask(2, 9, 4).to(device)

    def loss(given: dict[str, torch.Tensor]) -> torch.Tensor:
        return (
            embed_patches(**given, mask=mask, backend=backend).square().sum()
            + embed_patches(**given, backend=backend).sum()
        )

    learned = [given[name] for name in given if name != "patches"]
    eager = torch.autograd.grad(loss(given), learned)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(given), learned)
    for name, one, other in zip([name for name in given if name != "patches"], eager, compiled, strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_an_empty_batch(device):
    given = {name: value.float().to(device).requires_grad_() for name, value in inputs(0, 9, 16, 16).items()}
    tokens = embed_patches(**given, mask=torch.zeros(0, 4, dtype=torch.int64, device=device), backend="triton")
    assert tokens.shape == (0, 11, 16)
    tokens.sum().backward()
    assert (given["weight"].grad == 0).all() and (given["mask_token"].grad == 0).all()


# --- visible patches only ---------------------------------------------------------------------------------------------


def visible_inputs(clips: int = 2, patches: int = 6, values: int = 8, width: int = 4) -> dict[str, torch.Tensor]:
    given = inputs(clips, patches, values, width)
    del given["mask_token"]
    return given


def run_visible(
    given: dict[str, torch.Tensor], mask: torch.Tensor, backend: str | None, upstream: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Tokens and the gradient of everything, by name."""
    leaves = {name: value.detach().requires_grad_() for name, value in given.items()}
    tokens, _ = embed_visible_patches(**leaves, mask=mask, backend=backend)
    grads = torch.autograd.grad(tokens, list(leaves.values()), upstream.to(tokens.dtype))
    return {"tokens": tokens.detach(), **dict(zip(leaves, grads, strict=True))}


def visible_order_errors(
    given: dict[str, torch.Tensor], mask: torch.Tensor, upstream: torch.Tensor
) -> dict[str, torch.Tensor | float]:
    """Those of `embed_patches` whose masked tokens get no gradient."""
    clips, patches = given["patches"].shape[:2]
    is_visible = torch.ones(clips, patches, dtype=torch.bool, device=mask.device).scatter_(1, mask, False)
    whole = torch.zeros(clips, 2 + patches, upstream.shape[2], dtype=torch.float64, device=mask.device)
    whole[:, :2], whole[:, 2:][is_visible] = upstream[:, :2].double(), upstream[:, 2:].double().flatten(0, 1)
    errors = embed_order_errors(given, mask, whole)
    return {**errors, "tokens": errors["tokens"].max().item()}


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_visible_tokens_are_those_of_all_in_order(backend, device):
    given = {name: value.float().to(device) for name, value in visible_inputs(2, 7).items()}
    mask = torch.tensor([[5, 0, 3], [1, 6, 2]], device=device)
    tokens, slot = embed_visible_patches(**given, mask=mask, backend=backend)
    assert slot.tolist() == [[-1, 0, 1, -1, 2, -1, 3], [0, -1, -1, 1, 2, 3, -1]] and slot.dtype == torch.int32
    every = embed_patches(**given, backend=backend)
    for clip, visible in enumerate(([1, 2, 4, 6], [0, 3, 4, 5])):
        torch.testing.assert_close(tokens[clip], every[clip, [0, 1, *(2 + number for number in visible)]])


def test_gradients_of_visible_patches():
    given = {name: value.requires_grad_() for name, value in visible_inputs().items()}
    mask = torch.tensor([[3, 0], [4, 5]])
    assert torch.autograd.gradcheck(lambda *values: embed_visible_patches(*values, mask=mask)[0], tuple(given.values()))


@pytest.mark.parametrize(("clips", "patches", "values", "width", "masked", "dtype"), CASES)
@pytest.mark.parametrize("backend", ["triton"])
def test_law_of_visible_patches(backend, clips, patches, values, width, masked, dtype, device):
    given = {name: value.to(device, dtype) for name, value in visible_inputs(clips, patches, values, width).items()}
    mask = draw_mask(clips, patches, masked).to(device)
    generator = torch.Generator().manual_seed(2)
    upstream = torch.randn(clips, 2 + patches - masked, width, generator=generator, dtype=torch.float64)
    upstream = upstream.to(device, dtype)
    ours = run_visible(given, mask, backend, upstream)
    same = run_visible(given, mask, "torch", upstream)
    exact = run_visible({name: value.double() for name, value in given.items()}, mask, "torch", upstream.double())
    order_errors = visible_order_errors(given, mask, upstream)
    for name in exact:
        assert_lawful(name, ours[name], same[name], exact[name], order_errors[name])
    if dtype == torch.float32:
        again = run_visible(given, mask, backend, upstream)
        assert all(torch.equal(ours[name], again[name]) for name in ours)


@pytest.mark.parametrize("backend", ["triton"])
def test_visible_patches_under_autocast_and_compiled(backend, device):
    given = {name: value.float().to(device) for name, value in visible_inputs(2, 9, 16, 16).items()}
    mask, upstream = draw_mask(2, 9, 4).to(device), torch.randn(2, 7, 16).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        ours, same = (run_visible(given, mask, each, upstream) for each in (backend, "torch"))
        compiled = torch.compile(embed_visible_patches, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(**given, mask=mask, backend=backend)[0], ours["tokens"])
    exact = run_visible({name: value.double() for name, value in given.items()}, mask, "torch", upstream.double())
    order_errors = visible_order_errors(given, mask, upstream)
    for name in exact:
        assert ours[name].dtype == torch.float32
        assert_lawful(name, ours[name], same[name], exact[name], order_errors[name])


@pytest.mark.parametrize("visible_only", [True, False])
def test_operators_keep_the_rules_of_torch_library(visible_only, device):
    given = {name: value.float().to(device).requires_grad_(name != "patches") for name, value in inputs(2, 7).items()}
    if visible_only:
        given["mask_token"] = None
    mask = draw_mask(2, 7, 3).to(device)
    arguments = (*given.values(), mask, visible_only, torch.float32)
    torch.library.opcheck(_embed_op, arguments)
    tokens, visible, slot = _embed_op(*arguments)
    learned = [None if value is None else value.detach() for value in given.values()]
    torch.library.opcheck(
        _embed_backward_op, (torch.randn_like(tokens), *learned, visible, slot, visible_only, torch.float32)
    )


def test_bad_arguments_of_visible_patches():
    given = visible_inputs()
    with pytest.raises(ValueError, match=r"position is .* and must be"):
        embed_visible_patches(**{**given, "position": given["position"][1:]}, mask=torch.zeros(2, 1, dtype=torch.int64))
    for masked in (0, 6):
        with pytest.raises(ValueError, match=rf"mask is \(2, {masked}\) for 2 clips of 6 patches"):
            embed_visible_patches(**given, mask=torch.zeros(2, masked, dtype=torch.int64))


def test_visible_patches_of_an_empty_batch(device):
    given = {name: value.float().to(device).requires_grad_() for name, value in visible_inputs(0, 9, 16, 16).items()}
    mask = torch.zeros(0, 4, dtype=torch.int64, device=device)
    tokens, slot = embed_visible_patches(**given, mask=mask, backend="triton")
    assert tokens.shape == (0, 7, 16) and slot.shape == (0, 9)
    tokens.sum().backward()
    assert (given["weight"].grad == 0).all()
