"""What is checked of one family: chained blocks, blocks pruned on the way, and a checkpoint folder that is pruned."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.families.tiny_config import mend_forward, tiny_model
from benchmarks.families.verdicts import EXACT, OWN_FORWARD_FAILS
from benchmarks.families.visual_inputs import REFUSALS, Inputs, image_samples, padded, text_samples
from lvlm_prune.blocks import BlockRunner, find_decoder, find_expert_stacks
from lvlm_prune.cli import main
from lvlm_prune.errors import InputError
from lvlm_prune.loop.activations import rows_of
from lvlm_prune.methods.modality import IMAGE
from tests.full_forward import (
    compute_experts_one_by_one,
    own_forward,
    prune_by_full_forwards,
    prune_on_the_way,
    tensors_of,
    zeros,
)


def check(name: str) -> dict[str, Any]:
    """Everything about one family, as plain data; `reason` where it is not one for this package."""
    try:
        model = tiny_model(name)
    except Exception as error:
        return {"reason": f"no tiny model: {_line(error)}"}
    try:
        decoder = find_decoder(model)
    except (InputError, *REFUSALS) as error:
        return {"model": type(model).__name__, "reason": _line(error)}
    found: dict[str, Any] = {"model": type(model).__name__, "blocks": len(decoder.layers)}
    try:
        samples = image_samples(model)
    except ValueError:
        samples = []
    texts = text_samples()
    if not _is_taken(model, texts[0]):
        texts = []
    if not samples and not texts:
        return found | {"reason": "its own forward takes neither the images nor the text that were tried"}
    others = "proteins" if name == "evolla" else "images"
    found["inputs"] = [others] * bool(samples) + ["text"] * bool(texts)
    if samples:
        found["visual_tokens"] = _tried(lambda: _visual_tokens(model, samples[0]))
    batches = _batches(samples, texts)
    found["float32"] = {kind: _tried(lambda b=batch: _chained(model, b)) for kind, batch in batches.items()}
    found["pruned"] = _tried(lambda: _pruned_on_the_way(name, list(batches.values())))
    found["folder"] = _tried(lambda: _pruned_folder(name, samples + texts[:1], "keep"))
    if any(find_expert_stacks(block) for block in decoder.layers):
        found["experts"] = _tried(lambda: _pruned_folder(name, samples + texts[:1], "prune"))
    half = tiny_model(name).to(torch.bfloat16)
    cast = {kind: _cast(batch) for kind, batch in batches.items()}
    found["bfloat16"] = {
        kind: _tried(lambda b=batch: _chained(half, b)) if _is_taken(half, batch) else OWN_FORWARD_FAILS
        for kind, batch in cast.items()
    }
    return found


def _batches(samples: list[Inputs], texts: list[Inputs]) -> dict[str, Inputs]:
    batches: dict[str, Inputs] = {}
    if samples:
        try:
            together = {side: padded(samples, side) for side in ("right", "left")}
        except RuntimeError:
            # Images of different shapes: the first image under texts of different lengths.
            first = samples[0]
            longer = {**first, **{name: _lengthened(first[name]) for name in first if _is_token_input(first, name)}}
            together = {side: padded([first, longer], side) for side in ("right", "left")}
        batches = {"single": samples[0]} | {f"padded_{side}": batch for side, batch in together.items()}
    if texts:
        kinds = {"text": texts[0]} | {f"text_padded_{side}": padded(texts, side) for side in ("right", "left")}
        batches |= kinds
    return batches


def _is_token_input(sample: Inputs, name: str) -> bool:
    return sample[name].ndim >= 2 and sample[name].shape[:2] == sample["input_ids"].shape


def _lengthened(value: Tensor) -> Tensor:
    """Three more tokens, like the last one, behind it."""
    return torch.cat([value, value[:, -1:].repeat(1, 3, *[1] * (value.ndim - 2))], dim=1)


def _cast(batch: Inputs) -> Inputs:
    return {
        name: value.to(torch.bfloat16) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in batch.items()
    }


def _is_taken(model: PreTrainedModel, inputs: Inputs) -> bool:
    try:
        own_forward(model, inputs)
    except REFUSALS:
        return False
    return True


def _tried(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as error:
        return f"{type(error).__name__}: {_line(error)}"


def _line(error: Exception) -> str:
    text = error.problem if isinstance(error, InputError) else str(error)
    return " ".join(text.split())[:300] or type(error).__name__


def _difference(found: Tensor, expected: Tensor, where: str) -> str | None:
    if found.shape != expected.shape:
        return f"{where}: shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    if not torch.equal(found, expected):
        return f"{where}: differs by {(found - expected).abs().max().item():.2g}"
    return None


def _chained(model: PreTrainedModel, inputs: Inputs) -> str:
    """Whether every block gets the input, and the decoder gives the output, of the model's own forward."""
    expected, last_hidden_state = own_forward(model, inputs)
    runner = BlockRunner(model)
    batch = runner.catch(inputs)
    for index in range(len(runner)):
        if runner.calls(index, batch) != (index in expected):
            return f"block {index}: called by one and not by the other"
        if index in expected and (problem := _difference(batch.hidden, expected[index], f"input of block {index}")):
            return problem
        runner.advance(index, batch)
    if not last_hidden_state.isfinite().all():
        return "own forward is not finite"
    return _difference(runner.finish(batch), last_hidden_state, "output") or EXACT


def _visual_tokens(model: PreTrainedModel, inputs: Inputs) -> int:
    """How many tokens of a sample with an image are told from text."""
    (row,) = rows_of(BlockRunner(model).catch(inputs), model.config, [0])
    return int((row.modality == IMAGE).sum())


def _pruned_on_the_way(name: str, batches: list[Inputs]) -> str:
    """Whether blocks that are pruned on the way give the forward of the pruned model."""
    model = tiny_model(name)
    runner = BlockRunner(model)
    caught = [runner.catch(inputs) for inputs in batches]
    prune_on_the_way(runner, caught)
    for inputs, batch in zip(batches, caught):
        if problem := _difference(runner.finish(batch), own_forward(model, inputs)[1], "output"):
            return problem
    return EXACT


def _pruned_folder(name: str, samples: list[Inputs], experts: str) -> dict[str, Any]:
    """Prune a checkpoint folder from the command line; compare with whole forwards, and load the result."""
    model = tiny_model(name)
    with tempfile.TemporaryDirectory() as scratch:
        dense, pruned, calibration = Path(scratch, "dense"), Path(scratch, "pruned"), Path(scratch, "calib.safetensors")
        model.save_pretrained(dense, max_shard_size="300KB")
        save_file(tensors_of(samples), calibration)
        loaded, report = type(model).from_pretrained(dense, output_loading_info=True)
        mend_forward(loaded)
        lost_by_transformers = bool(report["missing_keys"] or report["unexpected_keys"])
        if experts == "prune":
            compute_experts_one_by_one(loaded)
        masks = prune_by_full_forwards(loaded.eval(), samples, experts=experts == "prune")
        _command_line(
            f"prune --model.path {dense} --data.source TensorSource --data.source.path {calibration} "
            f"--pruning.pool MixedPool --pruning.scorer WandaScorer --pruning.sparsity 0.5 --pruning.experts {experts} "
            f"--pruning.min_expert_tokens 1 --report false --output {pruned}"
        )
        manifest = json.loads((pruned / "pruning.json").read_text())
        reloaded, report = type(model).from_pretrained(pruned, output_loading_info=True)
        lost = bool(report["missing_keys"] or report["unexpected_keys"])
    # Linears that no sample reached have a note; experts that none did are pruned by magnitude.
    entries = manifest["linears"].items()
    linears = {path for path, entry in entries if "note" not in entry and entry.get("scored_by") != "magnitude"}
    return {
        "linears": len(masks),
        "same_linears": linears == set(masks),
        "weights": sum(mask.numel() for mask in masks.values()),
        "different": sum(int((zeros(reloaded, path) != mask).sum()) for path, mask in masks.items()),
        "reloads": not lost or lost_by_transformers,
    }


def _command_line(command: str) -> None:
    """Run `lvlm-prune`.

    Raises:
        RuntimeError: It ended with another status than 0; what it wrote to stderr.
    """
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main(command.split())
    if status:
        raise RuntimeError(err.getvalue())
