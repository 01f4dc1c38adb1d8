"""The dense model that a pruned one came from: where it lies, whether it fits, what it says before answer tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lvlm_prune.blocks import StreamedWeights
from lvlm_prune.data.bucketing import Batch
from lvlm_prune.data.labels import IGNORED
from lvlm_prune.data.recovery import SAMPLE_NUMBER
from lvlm_prune.demo import NAMES
from lvlm_prune.errors import InputError, given_as
from lvlm_prune.module import LVLMModule

if TYPE_CHECKING:
    from lvlm_prune.data import RecoveryDataModule
    from lvlm_prune.recovery.distillation import Teacher


def open_dense(given: str, base: LVLMModule, record: Mapping[str, Any]) -> LVLMModule:
    """The dense model, without its weights.

    Args:
        given: Its folder or hub id; empty: what the record says.
        base: The pruned model, opened.
        record: What the run that made the pruned model wrote.

    Raises:
        InputError: Nobody says where it is, it cannot be opened, or its tokens are others.
    """
    path = given or _recorded(record)
    if not path:
        problem = f"nothing in {base.path} says what it was pruned from; give the dense checkpoint"
        raise InputError("dense", "''", problem)
    dense = LVLMModule(
        path,
        dtype="auto",
        trust_remote_code=base.trust_remote_code,
        attn_implementation=base.attn_implementation,
    )
    with given_as("dense"):
        dense.open()
    refuse_other_tokens(dense, base)
    return dense


def _recorded(record: Mapping[str, Any]) -> str:
    """The dense checkpoint by the record of a pruned or of a recovered one; empty where it does not say."""
    named = record.get("dense") or {}
    folder = named.get("folder")
    moved = named.get("path") in NAMES or not folder or not Path(folder).is_dir()
    return str((named.get("path") or "") if moved else folder)


def refuse_other_tokens(dense: LVLMModule, base: LVLMModule) -> None:
    """Refuse a dense model whose tokens are not those of the pruned one; both are opened.

    Raises:
        InputError: Size of the vocabulary, or numbers of tokens, differ.
    """
    sizes = [module.model.config.get_text_config(decoder=True).vocab_size for module in (dense, base)]
    if sizes[0] != sizes[1]:
        problem = f"has a vocabulary of {sizes[0]} tokens, the pruned model one of {sizes[1]}"
        raise InputError("dense", dense.path, problem)
    ours, theirs = _tokens(base), _tokens(dense)
    if ours and theirs and ours != theirs:
        raise InputError("dense", dense.path, "its tokenizer gives other numbers to tokens than the pruned model's")


def _tokens(module: LVLMModule) -> Any:
    """What the folder's fast tokenizer knows; None where there is none that can be read."""
    assert module.folder is not None
    try:
        content = json.loads((module.folder.path / "tokenizer.json").read_text(encoding="utf-8"))
        added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        return content.get("model", {}).get("vocab"), added
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return None


def open_dense_weights(dense: LVLMModule, base: LVLMModule, device: torch.device) -> StreamedWeights:
    """Streams the dense weights into the skeleton of the pruned model, on a device.

    Raises:
        InputError: The dense checkpoint is another model, or stored in another form.
    """
    assert dense.folder is not None
    if type(dense.model) is not type(base.model):
        problem = f"is a {type(dense.model).__name__}, the pruned model a {type(base.model).__name__}"
        raise InputError("dense", dense.path, problem)
    with given_as("dense"):
        return StreamedWeights(base.model, base.runner.decoder, dense.folder, device)


def write_teacher(
    dense: LVLMModule,
    data: RecoveryDataModule,
    teacher: Teacher,
    device: torch.device,
    progress: Callable[[int], object],
) -> None:
    """Run the dense model over all samples and keep what it says; it is gone from memory afterwards.

    Args:
        dense: From `open_dense`.
        data: The samples whose answer tokens the dense model is asked about.
        teacher: Keeps the largest logits of each answer token on disk.
        device: Where to run it.
        progress: Called with the number of samples done.
    """
    with given_as("dense"):
        dense.load_whole()
    dense.model.to(device)

    def logits_of(samples: Sequence[int]) -> dict[int, Tensor]:
        return {number: logits for number, logits, _ in each_answer(dense, data.batches(samples), device)}

    teacher.write(logits_of, progress)
    dense.unload()


def each_answer(
    module: LVLMModule, batches: Iterable[Batch], device: torch.device
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """What a whole model in memory says where answer tokens follow, sample by sample.

    Yields:
        Number of the sample; logits, float32 of shape (answer tokens, vocabulary); the answer tokens, int64.
    """
    for group in (group for batch in batches for group in batch):
        group = {name: value.to(device) for name, value in group.items()}
        logits, tokens = module.answer_logits(group)
        answers = (group["labels"][:, 1:] != IGNORED).sum(dim=1).tolist()
        yield from zip(group[SAMPLE_NUMBER].tolist(), logits.split(answers), tokens.split(answers), strict=True)
