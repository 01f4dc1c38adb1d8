"""The picture that a page shows is the one that the model saw, and its tokens cover it in reading order."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lvlm_prune.data.picture import picture_of

GRADIENT = torch.linspace(-2, 2, 16)[:, None] * torch.ones(16) + torch.linspace(0, 0.5, 16)[None]
PIXELS = GRADIENT.expand(3, 16, 16).contiguous()
IDS = torch.zeros(1, 8, dtype=torch.int64)


def as_bytes(pixels):
    low, high = pixels.min(), pixels.max()
    return ((pixels - low) / (high - low) * 255).round().permute(1, 2, 0).byte().numpy()


def test_a_square_image_has_a_square_grid():
    found = picture_of({"input_ids": IDS, "pixel_values": PIXELS[None]}, 0, 5, 16, SimpleNamespace())
    assert found.sample == 5
    assert found.grid == (4, 4)
    np.testing.assert_array_equal(np.asarray(found.image), as_bytes(PIXELS))


def test_patches_in_windows_are_put_together_as_the_processor_took_them_apart():
    """Order of Qwen2-VL's image processor: windows of 2 x 2 patches, in each patch colour, frame, row, column."""
    image = PIXELS[:, :12]
    patch, merge, frames = 2, 2, 2
    rows, columns = 12 // patch, 16 // patch
    patches = (
        image[None]
        .expand(frames, 3, 12, 16)
        .reshape(1, frames, 3, rows // merge, merge, patch, columns // merge, merge, patch)
    )
    flat = patches.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(rows * columns, 3 * frames * patch * patch)
    config = SimpleNamespace(vision_config=SimpleNamespace(patch_size=patch, spatial_merge_size=merge))
    other = torch.zeros(4, flat.shape[1])
    inputs = {
        "input_ids": IDS.expand(2, 8),
        "pixel_values": torch.cat([other, flat]),
        "image_grid_thw": torch.tensor([[1, 2, 2], [1, rows, columns]]),
    }
    found = picture_of(inputs, 1, 0, 12, config)
    assert found.grid == (3, 4)
    np.testing.assert_array_equal(np.asarray(found.image), as_bytes(image))


def test_the_first_tile_of_a_large_image_is_the_whole_image():
    """LLaVA-NeXT: tokens of the whole image come first, then those of tiles, with row ends between them."""
    config = SimpleNamespace(image_token_id=7, vision_config=SimpleNamespace(image_size=16, patch_size=4))
    tiles = torch.cat([PIXELS[None], torch.randn(4, 3, 16, 16)])[None]
    ids = torch.tensor([[1, 2, *[7] * 36, 3]])
    inputs = {"input_ids": ids, "pixel_values": tiles, "image_sizes": torch.tensor([[32, 32]])}
    found = picture_of(inputs, 0, 3, 36, config)
    assert (found.sample, found.grid) == (3, (4, 4))
    np.testing.assert_array_equal(np.asarray(found.image), as_bytes(PIXELS))
    twice = {"pixel_values": tiles.expand(2, -1, -1, -1, -1), "image_sizes": torch.tensor([[32, 32], [32, 32]])}
    assert picture_of(inputs | twice, 0, 3, 72, config) is None, "two images of one sample"
    one_without = torch.cat([ids, torch.ones_like(ids)])
    assert picture_of(inputs | twice | {"input_ids": one_without}, 0, 3, 72, config) is None


@pytest.mark.parametrize(
    ("inputs", "tokens"),
    [
        ({"pixel_values": torch.zeros(1, 5, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]])}, 16),  # tiles
        ({"pixel_values": torch.zeros(1, 3, 16, 16)}, 15),
        ({"pixel_values": torch.zeros(2, 3, 16, 16)}, 16),  # two images
        ({}, 0),
    ],
)
def test_tokens_without_a_known_grid_are_not_drawn(inputs, tokens):
    assert picture_of({"input_ids": IDS} | inputs, 0, 0, tokens, SimpleNamespace()) is None
