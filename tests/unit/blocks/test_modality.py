from types import SimpleNamespace

import pytest
import torch

from lvlm_prune.blocks import modality_of_tokens, with_image_positions
from lvlm_prune.methods.modality import AUDIO, IMAGE, PADDING, TEXT, VIDEO
from tests.families import FAMILIES
from tests.family_configs import AUDIO_TOKEN, IMAGE_TOKEN, VIDEO_TOKEN

TOKENS = torch.tensor([[5, IMAGE_TOKEN, VIDEO_TOKEN, AUDIO_TOKEN, 7], [0, 0, 5, IMAGE_TOKEN, 7]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
CODES = [[TEXT, IMAGE, VIDEO, AUDIO, TEXT], [PADDING, PADDING, TEXT, IMAGE, TEXT]]
CONFIG = SimpleNamespace(image_token_id=IMAGE_TOKEN, video_token_index=VIDEO_TOKEN, audio_token_id=AUDIO_TOKEN)


def test_codes_of_a_left_padded_batch() -> None:
    codes = modality_of_tokens(CONFIG, TOKENS, MASK)
    assert codes.dtype == torch.int8
    assert codes.tolist() == CODES


def test_without_a_mask_nothing_is_padding() -> None:
    assert modality_of_tokens(CONFIG, TOKENS)[1].tolist() == [TEXT, TEXT, TEXT, IMAGE, TEXT]


def test_placeholders_in_the_padding_are_padding() -> None:
    codes = modality_of_tokens(CONFIG, torch.tensor([[IMAGE_TOKEN, IMAGE_TOKEN, 5]]), torch.tensor([[0, 1, 1]]))
    assert codes.tolist() == [[PADDING, IMAGE, TEXT]]


@pytest.mark.parametrize("additive", [False, True])
def test_four_dimensional_masks(additive: bool) -> None:
    length = TOKENS.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool).tril() & MASK[:, None, None, :].bool()
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min) if additive else allowed
    assert modality_of_tokens(CONFIG, TOKENS, mask).tolist() == CODES


def test_the_configuration_of_an_omni_model_holds_its_ids_one_level_down() -> None:
    assert modality_of_tokens(SimpleNamespace(thinker_config=CONFIG), TOKENS, MASK).tolist() == CODES


def test_a_mask_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 4\) does not fit"):
        modality_of_tokens(CONFIG, TOKENS, MASK[:, 1:])


def test_one_placeholder_for_images_and_videos_counts_as_an_image() -> None:
    config = SimpleNamespace(image_token_id=9, video_token_id=9)
    assert modality_of_tokens(config, torch.tensor([[5, 9]])).tolist() == [[TEXT, IMAGE]]


def test_images_that_take_the_place_of_any_token() -> None:
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "image_embeds_position_mask": torch.tensor([[0, 1, 0]])}
    input_ids, attention_mask = with_image_positions(SimpleNamespace(), inputs, positions=3)
    assert attention_mask is None
    assert modality_of_tokens(SimpleNamespace(), input_ids).tolist() == [[TEXT, IMAGE, TEXT]]


def test_images_in_front_of_the_text() -> None:
    config = SimpleNamespace(model_type="git")
    inputs = {"input_ids": torch.tensor([[0, 5]]), "attention_mask": torch.tensor([[0, 1]])}
    codes = modality_of_tokens(config, *with_image_positions(config, inputs, positions=4))
    assert codes.tolist() == [[IMAGE, IMAGE, PADDING, TEXT]]
    assert modality_of_tokens(config, *with_image_positions(config, inputs, positions=2)).tolist() == [[PADDING, TEXT]]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_tells_its_placeholders_from_text(family: str) -> None:
    token, code = (AUDIO_TOKEN, AUDIO) if family == "qwen2_audio" else (IMAGE_TOKEN, IMAGE)
    codes = modality_of_tokens(FAMILIES[family].config(), torch.tensor([[5, token, 7]]))
    assert codes.tolist() == [[TEXT, code, TEXT]]
