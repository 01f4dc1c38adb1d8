"""From conversations to model inputs, through the model's own processor and chat template.

    Conversation --- chat template ---> text with placeholders --+
         |                                                       +-- processor --> input_ids, pixel_values, ...
         +---------- images, opened; sounds, read; videos -------+

Every sample is encoded on its own; padding is added when a batch is put together. So a sample's inputs depend neither
on the batch size nor on its neighbours.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lvlm_prune.data.conversation import MEDIA, Conversation, Document, Message, load_image, shrink
from lvlm_prune.data.media import library_needed, load_sound, refuse_without_videos
from lvlm_prune.data.processor_sizes import absurd_size
from lvlm_prune.data.templates import coming_to_an_end, refuse_unread, refuse_unusable
from lvlm_prune.errors import InputError, LVLMPruneError, RunError, first_line, shortened

log = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")
_IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
_SAVED_LENGTHS = ("max_length", "truncation", "padding", "stride", "pad_to_multiple_of", "return_overflowing_tokens")
# What stands for an image, a video or a sound, or before one.
_WORDS = (*(f"{kind}_token" for kind in MEDIA), "boi_token", "boa_token")
_WAY_OUT = "copy them from the original model, or use data.source TensorSource, which needs none"


def load_processor(folder: str | Path, trust_remote_code: bool = False) -> Any:
    """The processor of a checkpoint folder (a tokenizer, if the model takes only text).

    Without torchvision transformers has no *video* processors, and refuses the whole processor of a model that takes
    images and videos. Then the processor is loaded without its video part.

    Raises:
        InputError: The folder has no tokenizer or no processor, they cannot be loaded, or no sample can be made with
            the sizes in its files.
    """
    from transformers import AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin
    from transformers.utils import is_torchvision_available

    folder = Path(folder)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise InputError("model.path", folder, f"has no tokenizer files (tokenizer.json, ...); {_WAY_OUT}")
    loader: Any = AutoProcessor
    try:
        if not is_torchvision_available() and takes_videos(folder):
            loader = _without_video(_processor_class(folder))
        processor = loader.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except ImportError as error:
        problem = f"its processor needs a library that is not installed ({first_line(error)})"
        raise InputError("model.path", folder, problem) from error
    except Exception as error:  # files of the user's, read by many libraries
        raise InputError("model.path", folder, _why_not_loaded(folder, error)) from error
    if isinstance(processor, PreTrainedTokenizerBase) and takes_images(folder):
        problem = f"has a tokenizer but no processor files (preprocessor_config.json, ...); {_WAY_OUT}"
        raise InputError("model.path", folder, problem)
    if not isinstance(processor, (PreTrainedTokenizerBase, ProcessorMixin)):
        raise InputError("model.path", folder, f"holds a {type(processor).__name__} but no processor; {_WAY_OUT}")
    _refuse_absurd_sizes(processor, folder)
    if getattr(tokenizer_of(processor), "chat_template", None) == "":
        log.warning("the chat template of %s is empty: as without one, the turns of a sample are lines of text", folder)
    _forget_saved_lengths(tokenizer_of(processor))
    return processor


def _refuse_absurd_sizes(processor: Any, folder: Path) -> None:
    by_area = "image_grid_thw" in getattr(processor, "model_input_names", ())
    for file in _IMAGE_FILES:
        size = absurd_size(entries_of(folder / file), by_area)
        if size is not None:
            raise InputError("model.path", folder, f"no sample can be made with {shortened(size)} of its {file}")


def _forget_saved_lengths(tokenizer: Any) -> None:
    """Neither cut nor pad: a tokenizer that was saved after training does what it did there, and says nothing."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    for name in _SAVED_LENGTHS:
        tokenizer.init_kwargs.pop(name, None)


@contextmanager
def refusals(processor: Any) -> Iterator[None]:
    """What a processor, its tokenizer, its chat template or a decoder raises about a sample becomes one line.

    They are written by others and by the model's authors: templates raise errors of their own for turns that they do
    not take, image processors any exception there is.

    Raises:
        RunError: Any of it.
    """
    try:
        yield
    except LVLMPruneError:
        raise
    except MemoryError as error:  # of all samples, or of a template that writes without end: none to be skipped
        problem = "a sample takes more memory than there is as its processor and chat template read it"
        raise InputError("", type(processor).__name__, problem) from error
    except Exception as error:
        raise RunError(f"{type(processor).__name__} refuses it: {first_line(error)}") from error


def encode(
    processor: Any,
    sample: Conversation | Document,
    add_generation_prompt: bool = False,
    max_pixels: int | None = None,
) -> dict[str, Tensor]:
    """Model inputs of one sample: `input_ids` of shape (1, T) and what else the processor makes.

    For calibration that is the user's turn and the whole answer. Without a chat template (base models) the text is the
    placeholders and the texts of all turns, one turn per line.

    Args:
        processor: From `load_processor`.
        sample: The sample.
        add_generation_prompt: End the text where the model is to answer.
        max_pixels: Larger images are shrunk to so many pixels before the processor sees them.

    Raises:
        RunError: A file is missing or broken, or the processor does not take its kind.
        InputError: Reading videos or sounds needs a library that is not installed.
        ValueError: The processor refuses the sample (for example, an image of extreme aspect ratio).
    """
    tokenizer = tokenizer_of(processor)
    if isinstance(sample, Document):
        return _encode_document(processor, tokenizer, sample)
    images = [shrink(load_image(image), max_pixels) for image in sample.images]
    if images and tokenizer is processor:
        raise ValueError("the sample has images, but the model's processor takes only text")
    text = render(processor, sample.messages, add_generation_prompt)
    # As in transformers' own `apply_chat_template`: most templates write the first token themselves.
    starts = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    arguments: dict[str, Any] = {"text": [text], "return_tensors": "pt", "add_special_tokens": not starts}
    arguments |= {"truncation": False, "padding": False}  # whatever was saved with the processor
    if images:
        arguments["images"] = [images]
    if sample.videos:
        refuse_without_videos(processor)
        arguments["videos"] = [str(video) for video in sample.videos]
    if sample.audios:
        arguments["audio"] = [load_sound(processor, audio) for audio in sample.audios]
    with library_needed("a video" if sample.videos else "an image"):
        inputs = _tensors(processor(**arguments))
    refuse_unread(tokenizer, inputs["input_ids"], [*chain(*_texts(sample.messages).values())])
    return inputs


def render(processor: Any, messages: list[Message], add_generation_prompt: bool = False) -> str:
    """The conversation as text, with one placeholder of the processor per image, video and sound.

    A text that speaks of such a placeholder (`docker run <image>`) would show one; it gets a space there: `< image>`.

    Raises:
        RunError: The chat template does not take it; see `refusals`.
        InputError: The chat template does not come to an end.
    """
    words = [word for name in _WORDS if isinstance(word := getattr(processor, name, None), str) and word]
    spoken = [_spoken(message, words) for message in messages]
    with refusals(processor), coming_to_an_end(type(processor).__name__):
        text = _rendered(processor, spoken, add_generation_prompt)
    refuse_unusable(text, _texts(spoken))
    return text


def _texts(messages: list[Message]) -> dict[str, list[str]]:
    """Role -> all that is said in its turns."""
    said: dict[str, list[str]] = {}
    for message in messages:
        content = message["content"]
        parts = [{"text": content}] if isinstance(content, str) else content
        said.setdefault(message["role"], []).extend(part["text"] for part in parts if "text" in part)
    return said


def _spoken(message: Message, words: Sequence[str]) -> Message:
    """The message, without any of these words in its text."""

    def spoken(text: str) -> str:
        for word in words:
            text = text.replace(word, f"{word[0]} {word[1:]}")
        return text

    content = message["content"]
    if isinstance(content, str):  # of somebody else's source, which writes placeholders itself
        return message
    return {
        **message,
        "content": [part | {"text": spoken(part["text"])} if part["type"] == "text" else part for part in content],
    }


def _rendered(processor: Any, messages: list[Message], add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    # Folders written by older versions keep the template with the tokenizer.
    owner = next((part for part in (processor, tokenizer_of(processor)) if getattr(part, "chat_template", None)), None)
    if owner is None:
        return "\n".join(_flat(processor, message)["content"] for message in messages)
    arguments = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
    try:
        text = owner.apply_chat_template(messages, **arguments)
        # A template for plain strings prints the list of parts as Python would.
        understood = "{'type': '" not in text
    except (TypeError, TemplateError):
        understood = False
    if not understood:
        text = owner.apply_chat_template([_flat(processor, message) for message in messages], **arguments)
    return text


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer inside a processor; a tokenizer is its own."""
    return getattr(processor, "tokenizer", processor)


def pad_token_of(processor: Any) -> int:
    """The token id that fills up shorter samples of a batch."""
    tokenizer = tokenizer_of(processor)
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in candidates if token is not None), 0)


def padding_side_of(processor: Any) -> Literal["left", "right"]:
    """The side on which a processor pads shorter samples; on the right where nobody says."""
    return "left" if getattr(tokenizer_of(processor), "padding_side", None) == "left" else "right"


def _encode_document(processor: Any, tokenizer: Any, document: Document) -> dict[str, Tensor]:
    # Web text does contain "<image>" and "</s>"; as special tokens they would be image positions without an image.
    encoded = tokenizer(
        document.text,
        return_tensors="pt",
        truncation=document.max_tokens is not None,
        max_length=document.max_tokens,
        split_special_tokens=True,
    )
    inputs = _tensors(encoded)
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("the document has no tokens")
    inputs["input_ids"] = inputs["input_ids"].long()
    refuse_unread(tokenizer, inputs["input_ids"], [document.text])
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in getattr(processor, "model_input_names", ()):
            inputs[name] = torch.zeros_like(inputs["input_ids"])
    return inputs


def _tensors(encoded: Any) -> dict[str, Tensor]:
    return {name: value for name, value in encoded.items() if isinstance(value, Tensor)}


def _flat(processor: Any, message: Message) -> Message:
    """The message with a plain string for its content."""
    tokens = {kind: getattr(processor, f"{kind}_token", None) or f"<{kind}>" for kind in MEDIA}
    pieces = [tokens[part["type"]] if part["type"] in tokens else part["text"] for part in message["content"]]
    return {**message, "content": "".join(pieces)}


def _without_video(base: Any) -> Any:
    """The processor class with None where its video processor was."""
    from transformers import ProcessorMixin

    modalities = [name for name in base.get_attributes() if "video" not in name]

    class Parts(base):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return modalities

    class WithoutVideo(base):
        @classmethod
        def _get_arguments_from_pretrained(cls, *args: Any, **kwargs: Any) -> list[Any]:
            loaded = dict(zip(modalities, Parts._get_arguments_from_pretrained(*args, **kwargs)))
            return [loaded.get(name) for name in cls.get_attributes()]

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument is None and "video" in argument_name:
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

        def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().apply_chat_template(*args, **kwargs)
            except AttributeError:
                # SmolVLM asks its video processor for a default that no image needs.
                return ProcessorMixin.apply_chat_template(self, *args, **kwargs)

    # transformers looks at the name of the class, and so do users.
    Parts.__name__ = WithoutVideo.__name__ = base.__name__
    return WithoutVideo


def _processor_class(folder: Path) -> Any:
    """The processor class that a checkpoint folder asks for; None if there is none, or its library lacks."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    # The last is that of a folder that is not finished yet.
    files = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "config.json")
    for file in (*files, "config.json.unfinished"):
        entries = entries_of(folder / file)
        name = entries.get("processor_class") or PROCESSOR_MAPPING_NAMES.get(str(entries.get("model_type")))
        if isinstance(name, str):
            try:
                found = getattr(transformers, name, None)
            except ImportError:  # in earlier versions the module of the class imports the library
                return None
            # In the place of a class whose library is missing stands one that raises at every attribute.
            return None if hasattr(found, "_backends") else found
    return None


def entries_of(file: Path) -> dict[str, Any]:
    """A JSON object; without entries where there is none, which transformers refuses when it loads the processor."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def takes_images(folder: Path) -> bool:
    """Whether the checkpoint in a folder has a vision tower."""
    return "vision_config" in entries_of(folder / "config.json")


def takes_videos(folder: Path) -> bool:
    """Whether the processor of a checkpoint folder has a part for videos, which transformers has with torchvision."""
    return any("video" in name for name in getattr(_processor_class(folder), "get_attributes", list)())


def _why_not_loaded(folder: Path, error: Exception) -> str:
    if not any((folder / name).is_file() for name in _IMAGE_FILES):
        return f"has no processor files (preprocessor_config.json, ...); {_WAY_OUT}"
    return f"its processor cannot be loaded ({first_line(error)})"
