"""What a model refuses although its processor accepts it: found when a sample is encoded, before anything runs.

On a GPU a token id without a row in the embedding ends the process, and names nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lvlm_prune.data.conversation import Conversation
from lvlm_prune.errors import RunError

_FEW = 16  # images, which are decoded in no time

# Names under which configurations of transformers keep the tokens that stand for an image, a video or a sound.
_PLACEHOLDERS = tuple(f"{kind}_token_{ending}" for kind in ("image", "video", "audio") for ending in ("id", "index"))


@dataclass(frozen=True)
class ModelLimits:
    """What the inputs of a model must keep to.

    Args:
        vocabulary: Number of rows of its token embedding; None: not known.
        context_length: The most tokens that it takes; None: not known.
        placeholders: Token ids that stand for an image, a video or a sound.

    Example:
        >>> limits = ModelLimits(vocabulary=100, context_length=8)
        >>> limits.refuse({"input_ids": torch.tensor([[5, 120]])})
        Traceback (most recent call last):
        ...
        lvlm_prune.errors.RunError: has the token id 120, the model's vocabulary ends at 99
        >>> limits.padding(128)
        0
    """

    vocabulary: int | None = None
    context_length: int | None = None
    placeholders: frozenset[int] = frozenset()

    @classmethod
    def of(cls, model: Any) -> ModelLimits:
        """The limits of a transformers model, which may be on the meta device."""
        config = model.config
        text = config.get_text_config(decoder=True)
        try:
            embedding = model.get_input_embeddings()
        except NotImplementedError:
            embedding = None
        rows = getattr(getattr(embedding, "weight", None), "shape", [None])[0]
        ids = {getattr(part, name, None) for part in (config, text) for name in _PLACEHOLDERS}
        return cls(
            rows or getattr(text, "vocab_size", None),
            getattr(text, "max_position_embeddings", None),
            frozenset(token for token in ids if isinstance(token, int)),
        )

    def refuse(self, inputs: Mapping[str, Tensor]) -> None:
        """Refuse model inputs of one sample.

        Args:
            inputs: `input_ids` of shape (1, T), and whatever else the processor makes.

        Raises:
            RunError: They are longer than the context, or a token id has no row in the embedding.
        """
        ids = inputs["input_ids"]
        if self.context_length is not None and ids.shape[-1] > self.context_length:
            raise RunError(f"has {ids.shape[-1]} tokens, the model's context is {self.context_length}; shorten it")
        if self.vocabulary is None:
            return
        # Families whose placeholder is no word of the vocabulary replace it before they look it up.
        known = torch.tensor(sorted(self.placeholders), dtype=ids.dtype, device=ids.device)
        outside = ids[((ids < 0) | (ids >= self.vocabulary)) & ~torch.isin(ids, known)]
        if len(outside):
            problem = f"has the token id {int(outside[0])}, the model's vocabulary ends at {self.vocabulary - 1}"
            raise RunError(problem)

    def refuse_media(self, processor: Any, sample: Any) -> None:
        """Refuse so many images, videos and sounds that no context holds them, before the first of them is decoded.

        Each takes a token at least; many images take what the processor says that pictures of their sizes take.

        Args:
            processor: From `load_processor`.
            sample: A sample of any kind.

        Raises:
            RunError: They are too many.
        """
        media = len(sample.images) + len(sample.videos) + len(sample.audios) if isinstance(sample, Conversation) else 0
        if self.context_length is None or not media:
            return
        least = media
        if _FEW < len(sample.images) <= self.context_length:
            # What goes wrong here is told once they are decoded; not every processor can say how many tokens there are.
            with suppress(Exception):
                sizes = [_size(image)[::-1] for image in sample.images]
                least = max(sum(processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]), media)
        if least > self.context_length:
            what = f"{media} images, videos and sounds, which take {least} tokens at least"
            raise RunError(f"has {what}, the model's context is {self.context_length}")

    def padding(self, token: int) -> int:
        """A token id to pad with: the one asked for if the model has it; padding is masked, so any one will do."""
        return token if self.vocabulary is None or 0 <= token < self.vocabulary else 0


def _size(image: Image.Image | Path) -> tuple[int, int]:
    """Width and height, from the head of a file."""
    if isinstance(image, Image.Image):
        return image.size
    with Image.open(image) as opened:
        return opened.size


NO_LIMITS = ModelLimits()
