"""The head of a model card: what the hub reads of a checkpoint, merged with what the dense model's card says.

dense card    license, language, pipeline tag, tags ──► kept
              model-index, new_version              ──► left out: they speak of the dense model
this run      base_model, base_model_relation, library_name, tags ──► written
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

# Results, and the successor, of the dense model; what the card is about has others, or none.
_OF_THE_DENSE_MODEL = ("model-index", "new_version", "base_model_relation", "base_model")


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """Metadata and text of a card; of one whose head cannot be read all is text.

    Example:
        >>> split_card("---\\nlicense: mit\\n---\\nA model.")
        ({'license': 'mit'}, 'A model.')
    """
    try:
        with _in_silence():
            card = ModelCard(text, ignore_metadata_errors=True)
        metadata = {name: value for name, value in card.data.to_dict().items() if name != "model-index"}
    except (ValueError, TypeError, AttributeError, yaml.YAMLError):
        return {}, text.strip()
    return metadata, card.text.strip()


@contextmanager
def _in_silence() -> Iterator[None]:
    """What the library has to say of somebody else's card is of no use to the user of this one."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def merged_metadata(
    earlier: Mapping[str, Any],
    base_model: str | None,
    relation: str,
    library: str,
    tags: Sequence[str],
    keeps_base: bool = False,
) -> ModelCardData:
    """The head of a card.

    Args:
        earlier: Metadata of the card of the model that this one was made from.
        base_model: Its name on the hub; None where it has none.
        relation: How this model comes from it, in the hub's words: `finetune`, `adapter`.
        library: Name of the library that loads this model, `transformers` for example.
        tags: In addition to the earlier ones.
        keeps_base: Whether the earlier card's `base_model` is this model's too, where no other is known.

    Returns:
        The same for the same arguments, in a fixed order.
    """
    kept = {name: value for name, value in earlier.items() if name not in (*_OF_THE_DENSE_MODEL, "tags")}
    if base_model is None and keeps_base:
        base_model = earlier.get("base_model")
    known = earlier.get("tags") or []
    merged = [*([known] if isinstance(known, str) else map(str, known)), *tags]
    written: dict[str, Any] = {"library_name": library, "tags": list(dict.fromkeys(merged))}
    if base_model is not None:
        written |= {"base_model": base_model, "base_model_relation": relation}
    return ModelCardData(**{**kept, **written}, ignore_metadata_errors=True)
