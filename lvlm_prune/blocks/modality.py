"""Which modality each token belongs to."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lvlm_prune.methods.modality import IMAGE, MODALITIES, PADDING, TEXT

_SUBCONFIGS = ("thinker_config", "text_config", "vision_config", "audio_config")

# Stands among token ids for a position that holds features of an image and has no placeholder token.
IMAGE_POSITION = -1
# Families that put the features of an image in front of the text.
_IMAGE_FIRST = frozenset({"git"})
# Model input that is 1 wherever features take the place of a token, whatever token (Kosmos-2).
_IMAGE_PLACES = "image_embeds_position_mask"


def modality_of_tokens(config: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Modality code of each token.

    A token is of a modality other than text when its id is the placeholder id that the model's configuration gives for
    it (`image_token_id`, `video_token_index`, ...). A token that no query may attend to is padding, whatever its id.

    Args:
        config: Configuration of the model.
        input_ids: Token ids, integer, of shape (B, S).
        attention_mask: None (no padding), (B, S) with 0 for padding, or (B, heads or 1, queries, S), boolean with True
            for "may attend" or additive floating-point.

    Returns:
        int8 of shape (B, S), on the device of `input_ids`: TEXT, IMAGE, VIDEO, AUDIO or PADDING.

    Raises:
        ValueError: The mask does not fit the token ids.

    Example:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(image_token_id=9)
        >>> modality_of_tokens(config, torch.tensor([[5, 9, 9, 0]]), torch.tensor([[1, 1, 1, 0]]))
        tensor([[ 0,  1,  1, -1]], dtype=torch.int8)
    """
    codes = torch.full(input_ids.shape, TEXT, dtype=torch.int8, device=input_ids.device)
    codes[input_ids == IMAGE_POSITION] = IMAGE
    # Where one placeholder stands for images and for frames of videos, it counts as an image's.
    for modality in ("audio", "video", "image"):
        for token_id in placeholder_ids(config, modality):
            codes[input_ids == token_id] = MODALITIES[modality]
    if attention_mask is not None:
        codes[~attended(attention_mask, input_ids)] = PADDING
    return codes


def tokens_by_modality(config: Any, inputs: Mapping[str, Any]) -> dict[str, int]:
    """Number of tokens of each modality that model inputs have, padding left out.

    Args:
        config: Configuration of the model.
        inputs: What the model is called with.

    Example:
        >>> from types import SimpleNamespace
        >>> tokens_by_modality(SimpleNamespace(image_token_id=9), {"input_ids": torch.tensor([[5, 9, 9]])})
        {'text': 1, 'image': 2}
    """
    input_ids, attention_mask = with_image_positions(config, inputs)
    assert input_ids is not None
    modality = modality_of_tokens(config, input_ids, attention_mask)
    counts = torch.bincount(modality[modality >= 0], minlength=len(MODALITIES)).tolist()
    return {name: count for name, count in zip(MODALITIES, counts) if count}


def with_image_positions(
    config: Any, inputs: Mapping[str, Any], positions: int | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Token ids and attention mask of model inputs, with `IMAGE_POSITION` where an image has no placeholder tokens.

    Args:
        config: Configuration of the model.
        inputs: What the model is called with.
        positions: How many positions its decoder sees, P, where that is known.

    Returns:
        Both of shape (B, P), None where the inputs have none; most families' are the ones of the inputs.
    """
    input_ids, attention_mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if input_ids is None:
        return None, attention_mask
    if (places := inputs.get(_IMAGE_PLACES)) is not None:
        input_ids = input_ids.masked_fill(places.bool(), IMAGE_POSITION)
    if positions is not None and getattr(config, "model_type", None) in _IMAGE_FIRST:
        front = (positions - input_ids.shape[1], 0)
        input_ids = pad(input_ids, front, value=IMAGE_POSITION)
        attention_mask = None if attention_mask is None else pad(attention_mask, front, value=1)
    return input_ids, attention_mask


def placeholder_ids(config: Any, modality: str) -> set[int]:
    """Ids of the tokens that stand for visual or audio features of one modality; the outermost configuration counts.

    Args:
        config: Configuration of the model.
        modality: `image`, `video` or `audio`.
    """
    for level in _levels(config):
        for suffix in ("token_id", "token_index"):
            value = getattr(level, f"{modality}_{suffix}", None)
            if value is not None:
                return {int(item) for item in value} if isinstance(value, (list, tuple)) else {int(value)}
    return set()


def _levels(config: Any) -> Iterator[Any]:
    """The configuration, then the ones inside it."""
    yield config
    for name in _SUBCONFIGS:
        subconfig = getattr(config, name, None)
        if subconfig is not None:
            yield from _levels(subconfig)


def attended(attention_mask: Tensor, tokens: Tensor) -> Tensor:
    """Whether any query may attend to a token.

    Args:
        attention_mask: As for `modality_of_tokens`.
        tokens: Any tensor of shape (B, S), for its shape and device.

    Returns:
        Boolean (B, S).

    Raises:
        ValueError: The mask does not fit.
    """
    if attention_mask.ndim == 4:
        if attention_mask.is_floating_point():
            allowed = attention_mask > torch.finfo(attention_mask.dtype).min / 2
        else:
            allowed = attention_mask.bool()
        seen = allowed.any(dim=1).any(dim=1)
    else:
        seen = attention_mask.bool()
    if seen.ndim != 2 or seen.shape[-1] != tokens.shape[-1] or len(seen) not in (1, len(tokens)):
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} does not fit tokens of shape {tuple(tokens.shape)}"
        )
    return seen.expand(tokens.shape).to(tokens.device)
