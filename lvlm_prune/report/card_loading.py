"""What a model card says of loading the checkpoint and of asking it something: code that runs as it stands."""

from __future__ import annotations

import json
from pathlib import Path

from lvlm_prune.data.processing import entries_of, takes_videos

_TEMPLATE = "chat_template.jinja"
_TEMPLATE_ENTRIES = "chat_template.json", "processor_config.json", "tokenizer_config.json"
_VIDEOS = """

The processor takes videos too, for which transformers wants torchvision (`pip install torchvision`). Without it
`lvlm_prune.data.load_processor(THIS_MODEL)` loads the processor of a folder for texts and images."""
_ASKED_IMAGE = '[{"type": "image", "path": "photo.jpg"}, {"type": "text", "text": "What is in the picture?"}]'
_ASKED_TEXT = '"What is the capital of France?"'


TEXT_ONLY = "ForCausalLM"
"""What the names of classes of text decoders end with."""


def loader_of(model_class: str) -> str:
    """Which of transformers' classes loads a model.

    Example:
        >>> loader_of("LlamaForCausalLM"), loader_of("LlavaForConditionalGeneration")
        ('AutoModelForCausalLM', 'AutoModelForImageTextToText')
    """
    return "AutoModelForCausalLM" if model_class.endswith(TEXT_ONLY) else "AutoModelForImageTextToText"


def loading(folder: Path, is_packed: bool, model_class: str) -> str:
    """How to load a checkpoint, and where it has a chat template how to ask it.

    Args:
        folder: The checkpoint; its configuration may be held back still.
        is_packed: Whether it needs this package to load.
        model_class: Name of the class of the model.
    """
    loader, is_text_only = loader_of(model_class), model_class.endswith(TEXT_ONLY)
    lines = ["import lvlm_prune  # lets transformers read packed checkpoints"] if is_packed else []
    config = entries_of(folder / "config.json") or entries_of(folder / "config.json.unfinished")
    trust = ", trust_remote_code=True" if "auto_map" in config else ""
    lines += [
        f"from transformers import {loader}, AutoProcessor",
        "",
        'THIS_MODEL = "."  # the name of this repository, or the folder that it was downloaded to',
        f'model = {loader}.from_pretrained(THIS_MODEL, dtype="auto"{trust})',
        f"processor = AutoProcessor.from_pretrained(THIS_MODEL{trust})",
    ]
    videos = takes_videos(folder)
    if videos:
        lines[-1] += "  # needs torchvision: it takes videos"
    parts = [f"## Load it\n\n{_code(lines)}{_VIDEOS if videos else ''}"]
    template = _chat_template(folder)
    if template and (is_text_only or "image" in template):
        parts.append(f"## Ask it\n\n{_code(_asking(is_text_only))}")
    return "\n\n".join(parts)


def _asking(is_text_only: bool) -> list[str]:
    # The inputs of a tokenizer have no dtype to be brought to.
    place = "model.device" if is_text_only else "model.device, dtype=model.dtype"
    return [
        f'turn = {{"role": "user", "content": {_ASKED_TEXT if is_text_only else _ASKED_IMAGE}}}',
        "inputs = processor.apply_chat_template(",
        '    [turn], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"',
        f").to({place})",
        "answer = model.generate(**inputs, max_new_tokens=64)",
        'print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]


def _code(lines: list[str]) -> str:
    return "```python\n" + "\n".join(lines) + "\n```"


def _chat_template(folder: Path) -> str:
    """The text of a folder's chat template; empty where it has none."""
    try:
        return (folder / _TEMPLATE).read_text(encoding="utf-8")
    except (OSError, ValueError):
        found = (entries_of(folder / name).get("chat_template") for name in _TEMPLATE_ENTRIES)
        return next((json.dumps(template) for template in found if template), "")
