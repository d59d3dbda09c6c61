import pytest
import torch

from ssast.kernels import embed_patches


def inputs(clips: int = 2, patches: int = 6, values: int = 8, width: int = 4) -> dict[str, torch.Tensor]:
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
    with pytest.raises(ValueError, match="position has 7 rows"):
        embed_patches(**{**given, "position": given["position"][1:]})
