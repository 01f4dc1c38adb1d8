"""The model card, `README.md`: what a checkpoint is, how it was made, what it keeps; from its records alone.

    metadata      what the hub reads, merged with that of the dense model's card
    this model    sparsity, method, calibration, what stayed dense, scores where there are any, how to load it
    ---------
    dense card    as it was: it speaks of the dense model

Nothing in it depends on the clock, so a run that was interrupted and went on writes the same card.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from lvlm_prune.checkpoints.hub import hub_name
from lvlm_prune.demo import DEMO, OUTLIERS
from lvlm_prune.evaluation.record import evaluation_table, read_record
from lvlm_prune.output.base_record import name_of_input, pruned_how, was_pruned_before, zeros_before
from lvlm_prune.output.manifest import Manifest, read_run, replace_durably
from lvlm_prune.output.markdown import markdown_table
from lvlm_prune.output.names import EVALUATION_RECORD, MODEL_CARD, PACKING_RECORD, PRUNING_RECORD, RECOVERY_RECORD
from lvlm_prune.output.private import is_left_out
from lvlm_prune.output.summaries import quality_line, recovered_line
from lvlm_prune.output.units import readable_percent
from lvlm_prune.report.card_facts import card_facts
from lvlm_prune.report.card_loading import loader_of, loading
from lvlm_prune.report.card_metadata import merged_metadata, split_card
from lvlm_prune.report.linears import patterns_of

DENSE_CARD = "<!-- The card of the dense model follows, as it was. -->"
"""Line of a card above that of the dense model."""

Records = Mapping[str, Mapping[str, Any] | None]
"""File name -> what stands in the record; see `records_in`."""

_PROJECT = "lvlm-prune"
_EMBEDDED = {
    DEMO: "The embedded model of lvlm-prune",
    OUTLIERS: "The embedded model of lvlm-prune with outlier channels",
}

_OWN_QUESTIONS = (
    "--engine.benchmark LocalBenchmark --engine.benchmark.source LlavaJsonSource "
    "--engine.benchmark.source.path QUESTIONS.json"
)


def write_card(
    folder: Path,
    dense_card: str | None = None,
    record: Mapping[str, Any] | None = None,
    packing: Mapping[str, Any] | None = None,
    earlier: str | None = None,
) -> None:
    """Write the card of a checkpoint that `prune`, `recover` or `pack` made, or write it once more.

    Args:
        folder: The checkpoint, with its records.
        dense_card: Text of the card of the model that was pruned; default: what stands in the folder's own card.
        record: Of the run that made it; default: what stands in the folder, where that is complete.
        packing: Of the run that packed it; default: likewise.
        earlier: Text of the card that this one takes the place of, and takes the dense model's from; default: the
            folder's own.
    """
    text = card_of(folder, dense_card, record, packing, earlier)
    replace_durably(folder / MODEL_CARD, text.encode("utf-8", "replace"))


def refresh_card(folder: Path) -> bool:
    """Write a card once more, now that there is something new to say of the checkpoint.

    Returns:
        Whether there was one, and records that can be read: without them it would say less than it did.
    """
    records = records_in(folder)
    if not has_own_card(folder) or not all(records.values()):
        return False
    write_card(folder, record=maker_of(records), packing=packing_of(records))
    return True


def has_own_card(folder: Path) -> bool:
    """Whether a folder's card is one that was written here."""
    return DENSE_CARD in read_card(folder)


def read_card(folder: Path) -> str:
    """The text of a folder's card; empty where there is none."""
    try:
        return (folder / MODEL_CARD).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def card_of(
    folder: Path,
    dense_card: str | None = None,
    record: Mapping[str, Any] | None = None,
    packing: Mapping[str, Any] | None = None,
    earlier: str | None = None,
    is_scored: bool = True,
) -> str:
    """The text of a card; see `write_card`. Of one that is not scored yet, without what is known by now."""
    records = records_in(folder) if record is None or packing is None else {}
    made_by = maker_of(records) if record is None else record
    packing = packing_of(records) if packing is None else packing
    text = (read_card(folder) if earlier is None else earlier) if dense_card is None else dense_card
    metadata, body = split_card(text)
    is_ours = DENSE_CARD in body
    if dense_card is None and is_ours:
        body = body.split(DENSE_CARD, 1)[1].strip()
        body = "" if re.fullmatch(r"The \w+ model came without a card\.", body) else body  # version 0.2 wrote that
    how = pruned_how(made_by)
    # The card of an input that was pruned here, too, has this line.
    was_sparse = was_pruned_before(made_by) or DENSE_CARD in body
    below = _below(made_by, how, was_sparse)
    origin = _origin(made_by, packing)
    base = hub_name(origin.get("path") or "", origin.get("folder") or "") if origin else None
    tags = [_PROJECT, "pruned", "sparse", *(["packed"] if packing else [])]
    head = merged_metadata(
        metadata,
        base,
        "finetune",  # the hub's word for changed weights; it has none for pruned ones
        _PROJECT if packing else "transformers",
        tags,
        keeps_base=is_ours,
    )
    parts = [
        f"# {_title(folder, made_by, how, base, origin)}",
        _introduction(made_by, how, base, packing, below, bool(body)),
        markdown_table(["", ""], list(card_facts(made_by, how, packing, was_sparse))),
        _scores(folder, made_by, was_sparse, str(origin.get("path") or "") in _EMBEDDED, is_scored),
        loading(folder, bool(packing), str(made_by.get("model", {}).get("class", ""))),
        _zeros(made_by, packing, how),
        _private(made_by or packing),
        f"---\n\n*Below is the card of the {below}, as it was: its results are not those of this model.*"
        if body and made_by
        else f"---\n\n*Below is the card of the {below}, as it was.*"
        if body
        else f"---\n\n*The {below} came without a card.*",
        DENSE_CARD,
        body,
    ]
    return str(ModelCard(f"---\n{head}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"))


def write_adapter_card(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the card of an adapter.

    Args:
        folder: The adapter, as `save_sparse_adapter` wrote it.
        record: Of the recovery that trained it, finished.
    """
    replace_durably(folder / MODEL_CARD, adapter_card_of(record).encode())


def adapter_card_of(record: Mapping[str, Any]) -> str:
    """The text of the card of an adapter; see `write_adapter_card`."""
    name = hub_name(record["model"]["path"], record["model"].get("folder", ""))
    own_name = Path(str(record["model"]["path"])).name
    # The name of a folder would be taken for that of somebody's model on the hub.
    head = merged_metadata({}, name, "adapter", "peft", [_PROJECT, "lora", "sparse"])
    told = f"[{name}](https://huggingface.co/{name})" if name else f"the pruned checkpoint `{own_name}`"
    loader = loader_of(str(record["model"].get("class", "")))
    parts = [
        "# A sparse LoRA adapter",
        f"Trained by {_link()} (method `{record['method']}`) on {told}, "
        f"{readable_percent(record['verified']['sparsity'])} of whose pruned Linears is zero. "
        "It belongs to these zeros: merged by plain PEFT it would give pruned weights values again. "
        "The folder around this one has it merged already."
        + ("" if name else " To publish it, publish that checkpoint first, and name it here as `base_model`."),
        f"```python\nfrom lvlm_prune.recovery import load_sparse_adapter\nfrom transformers import {loader}\n\n"
        f'model = {loader}.from_pretrained(PRUNED, dtype="auto")  # the pruned checkpoint, and no other\n'
        "model = load_sparse_adapter(model, ADAPTER)  # this folder; every zero stays zero\n"
        "model = model.merge_and_unload()\n```",
    ]
    return str(ModelCard(f"---\n{head}\n---\n\n" + "\n\n".join(parts) + "\n"))


# ---- records ---------------------------------------------------------------------------------------------------------
def records_in(folder: Path) -> Records:
    """What runs wrote into a folder, by file name; None where that cannot be read."""
    names = (RECOVERY_RECORD, PRUNING_RECORD, PACKING_RECORD)
    return {name: read_run(folder / name) for name in names if (folder / name).is_file()}


def maker_of(records: Records) -> Mapping[str, Any]:
    """Of the run that made the checkpoint; empty where it was made by other tools."""
    return _complete(records, RECOVERY_RECORD) or _complete(records, PRUNING_RECORD)


def packing_of(records: Records) -> Mapping[str, Any]:
    """Of the run that packed it; empty where none did."""
    return _complete(records, PACKING_RECORD)


def _complete(records: Records, name: str) -> Mapping[str, Any]:
    record = records.get(name) or {}
    return record if record.get("status") == "complete" else {}


def _origin(record: Mapping[str, Any], packing: Mapping[str, Any]) -> Mapping[str, Any]:
    """`path` and `folder` of the dense model as the records know it; without records, of what was packed."""
    if "training" in record:
        return record.get("dense") or {}
    return record.get("model") or packing.get("model") or {}


# ---- text ------------------------------------------------------------------------------------------------------------
def _title(
    folder: Path, record: Mapping[str, Any], how: Mapping[str, Any], base: str | None, origin: Mapping[str, Any]
) -> str:
    path = str(origin.get("path") or record.get("model", {}).get("path") or "")
    model = base or _EMBEDDED.get(path) or Path(path).name or folder.name
    method = how.get("method", {}).get("init_args", {}).get("name")
    target = how.get("sparsity", {}).get("target")
    # Where the input had more zeros than were asked for, they are still there.
    zeros = max(target, Manifest(record).achieved_sparsity()) if target is not None and "linears" in record else target
    pruned = f", pruned to {readable_percent(zeros)}" if zeros is not None else ", sparse"
    recovered = ", recovered" if "training" in record else ""
    return model + pruned + (f" by {method}" if method else "") + recovered


def _below(record: Mapping[str, Any], how: Mapping[str, Any], was_sparse: bool) -> str:
    """What the card below this one is about: the model that was pruned, recovered or packed."""
    if not record:
        return "model that was packed"
    return "sparse model" if was_sparse or not how else "dense model"


def _introduction(
    record: Mapping[str, Any],
    how: Mapping[str, Any],
    base: str | None,
    packing: Mapping[str, Any],
    below: str,
    has_card: bool,
) -> str:
    """What was done to which model; of one that was pruned by other tools only what is known."""
    source = f"the {below}" + " whose card follows below" * has_card
    made_from = f"[{base}](https://huggingface.co/{base})" if base else source
    text = f"{'More weights' if below == 'sparse model' else 'Weights'} of {made_from} were set to zero"
    text += f" after its training, by {_link()}"
    if not how:
        text = f"Weights of {made_from} are zero, which was done by other tools, or without a record"
    if "training" in record:
        text += "; those that remain were then trained to give back accuracy" + (f", by {_link()}" if not how else "")
    text += ". "
    if packing:
        return text + "The zeros are not stored: this is a packed checkpoint, of the same weights bit by bit."
    return text + f"Names, shapes and dtypes of all tensors are the {below}'s."


def _link() -> str:
    import lvlm_prune

    return f"{_PROJECT} {lvlm_prune.__version__}"


def _scores(folder: Path, record: Mapping[str, Any], was_sparse: bool, is_embedded: bool, is_scored: bool) -> str:
    """What the checkpoint scores: by `evaluate`, else as the run that made it found; or that nobody knows."""
    parts = [f"## What is left of the {'sparse' if was_sparse else 'dense'} model"]
    if was_sparse:
        share = f" {readable_percent(zeros_before(record))} zeros" if was_pruned_before(record) else " zeros"
        parts.append(
            f"It had{share} before it was pruned to this one. What is called `dense` here is that model: these numbers "
            "do not say what is left of the one that was dense."
        )
    if "perplexity" in record.get("quality", {}):
        quality = record["quality"]
        line = (
            recovered_line(quality, was_pruned_before(record))
            if "training" in record
            else quality_line(quality, name_of_input(record))
        )
        parts.append(f"{line[0].upper()}{line[1:]}.")
    evaluated, found = (read_record(folder), record.get("evaluation")) if is_scored else (None, None)
    if evaluated is not None:
        parts += [f"By `lvlm-prune evaluate` (`{EVALUATION_RECORD}`); shares in percent.", evaluation_table(evaluated)]
    elif found is not None:
        last = "recovered" if "recovered" in found else "pruned"
        kept = found["retention"]
        kept = kept.get(last, kept)
        scores = found["dense"], found[last], kept
        rows = [
            [f"{group}{_count(found['dense'], group)}", *(f"{one['groups'][group]:.1%}" for one in scores)]
            for group in found["dense"]["groups"]
        ]
        rows.append(["average", *(f"{one['average']:.1%}" for one in scores)])
        parts.append(markdown_table(["tasks", "dense", last, "retained"], rows))
    else:
        asked, on = ("", "") if is_embedded else (f" {_OWN_QUESTIONS}", " on questions of your own")
        parts.append(
            "Not scored: nothing here says how many answers it still gets right. "
            f"`lvlm-prune evaluate --model.path THIS_MODEL --baseline DENSE_MODEL{asked}` measures that{on}."
        )
    return "\n\n".join(parts)


def _count(dense: Mapping[str, Any], group: str) -> str:
    tasks = list(dense.get("task_groups", {}).values()).count(group)
    return f" ({tasks} tasks)" if tasks else ""


def _zeros(record: Mapping[str, Any], packing: Mapping[str, Any], how: Mapping[str, Any]) -> str:
    if packing:
        text = (
            "Packed weights take less room on disk and in memory, and with few tokens at a time (decoding) their "
            "products can be faster than dense ones, by how much depends on the machine; with many tokens (prompts) "
            "they need not be. Without `import lvlm_prune` the folder does not load. "
            "`lvlm-prune unpack` gives the ordinary checkpoint back, byte for byte."
        )
    else:
        text = (
            "The zeros are stored like any other weight. Loaded as above, the model takes the disk, the memory and the "
            "time of the dense one. `lvlm-prune pack` stores it without its zeros: smaller on disk and in memory, and "
            "faster in decoding where its kernels are."
        )
        text += _sparse_tensor_cores(patterns_of({**record, "pattern": how.get("pattern", "")}))
    return f"## What the zeros bring, and what not\n\n{text}"


def _sparse_tensor_cores(counts: Mapping[str, int]) -> str:
    """What sparse tensor cores can do with the Linears: they take matrices of which at most two of four weights stay.

    Args:
        counts: Pattern -> Linears with it, as `patterns_of` gives them; `dense` has none.

    Example:
        >>> _sparse_tensor_cores({"4:8": 7})
        ' Sparse tensor cores of GPUs take 2:4, which no Linear has (4:8 7).'
        >>> _sparse_tensor_cores({"2:4": 3, "dense": 2})
        ' GPUs with sparse tensor cores can make use of 3 Linears (2:4 3), with software for it; not of 2 (dense 2).'
    """
    if not counts:
        return ""
    fitting = {name: count for name, count in counts.items() if _fits_sparse_tensor_cores(name)}
    others = {name: count for name, count in counts.items() if name not in fitting}
    if not fitting:
        return f" Sparse tensor cores of GPUs take 2:4, which no Linear has ({_listed(others)})."
    those = f"{sum(fitting.values())} Linears" if others else f"all {sum(fitting.values())} Linears"
    text = f" GPUs with sparse tensor cores can make use of {those} ({_listed(fitting)}), with software for it"
    return text + (f"; not of {sum(others.values())} ({_listed(others)})." if others else ".")


def _fits_sparse_tensor_cores(pattern: str) -> bool:
    parts = re.fullmatch(r"(\d+):(\d+)", pattern)
    if parts is None:
        return False
    keep, of = int(parts[1]), int(parts[2])
    return (keep <= 2 and of % 4 == 0) or (keep, of) == (1, 2)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _private(record: Mapping[str, Any]) -> str:
    """Whether the files beside the card say more of the user's data than others should read."""
    if not record:
        return ""
    if is_left_out(record) and record.get("picture"):
        return "Local paths are left out of all files here."
    if is_left_out(record):
        return "Local paths, ids of samples and pictures of them are left out of all files here."
    return (
        "The records and the page in this folder name local paths and may show a calibration sample. "
        "`--push` uploads none of that; to upload the folder in another way, write it with `--publishable true`."
    )
