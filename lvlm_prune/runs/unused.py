"""Options that were given and change nothing with this method or this model: said, so that nobody counts on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from inspect import signature
from typing import Any

from lvlm_prune.blocks import has_routed_experts
from lvlm_prune.callbacks import BlockwisePruning
from lvlm_prune.data import CalibrationDataModule, TensorSource
from lvlm_prune.demo import NAMES
from lvlm_prune.evaluation.builtin import BuiltinEngine
from lvlm_prune.evaluation.engine import Engine
from lvlm_prune.methods.pools import AsymmetricPool
from lvlm_prune.module import LVLMModule
from lvlm_prune.plugins import describe, plugin_class
from lvlm_prune.pruning.options import DEFAULT_SPARSITY
from lvlm_prune.run import USUALLY_HELD_BACK, RunOptions

_OF_SAMPLES = ("visual", "calibrate_on", "record")
_OF_EXPERTS = ("experts", "min_expert_tokens", "rare_experts")


def unused_options(
    pruning: BlockwisePruning, data: CalibrationDataModule, model: LVLMModule, tokens: Mapping[str, int]
) -> Iterator[str]:
    """A line for each reason why options that are not at their defaults change nothing.

    Args:
        pruning: The method, after its `plan`.
        data: What calibrates.
        model: The opened model.
        tokens: Modality -> number of calibration tokens; empty where there are no samples.
    """
    given = _given(BlockwisePruning, pruning, "pruning", *_OF_SAMPLES, *_OF_EXPERTS)
    given |= _given(CalibrationDataModule, data, "data", "padding_side", "num_samples", "max_pixels")
    if not pruning.wants_activations:
        if describe(pruning.pool) != describe(AsymmetricPool()):
            given["pruning.pool"] = plugin_class(pruning.pool).__name__
        names = ["pruning.pool", *(f"pruning.{name}" for name in _OF_SAMPLES)]
        names += ["data.num_samples", "data.padding_side", "pruning.min_expert_tokens", "pruning.rare_experts"]
        yield from _line(given, names, f"{pruning.name} needs no calibration samples")
    elif tokens and tokens.keys().isdisjoint(pruning.visual):
        yield (
            f"--pruning.visual {_written(pruning.visual)} names no modality of the calibration samples, which have "
            f"{' and '.join(tokens)} tokens: none counts as visual"
        )
    if pruning.wants_activations and data.batch_size == 1:
        yield from _line(given, ["data.padding_side"], "with --data.batch_size 1 nothing is padded")
    if isinstance(data.source, TensorSource):
        yield from _line(given, ["data.max_pixels"], "the samples are ready-made model inputs")
    elif tokens and not {"image", "video"} & tokens.keys():
        yield from _line(given, ["data.max_pixels"], "no calibration sample has an image")
    of_experts = [f"pruning.{name}" for name in _OF_EXPERTS]
    if "language" not in model.targets or not has_routed_experts(model.runner.decoder.layers):
        yield from _line(given, of_experts, "what is pruned has no routed experts")
    elif not pruning.prunes_experts:
        yield from _line(given, of_experts[1:], "no routed expert is pruned")


def unused_aims(pruning: BlockwisePruning, model: LVLMModule, options: RunOptions, aim: str) -> Iterator[str]:
    """The same of options of the command itself, and of the sparsity where something else says how sparse it gets.

    Args:
        pruning: The method, as it was given.
        model: The model, which need not be opened.
        options: Of the run.
        aim: Option that says so: `--keep`, whose tries are measured on samples, or `--packed_size`; empty for none.
    """
    if aim and pruning.sparsity != DEFAULT_SPARSITY and not pruning.pattern.levels:
        yield f"--pruning.sparsity {pruning.sparsity:g} is not used: {aim} says how sparse the model gets"
    given = f"--held_back {options.held_back} is not used"
    if options.held_back not in (0, USUALLY_HELD_BACK) and aim != "--keep":
        if not options.evaluate:
            yield f"{given}: with --evaluate false nothing is measured"
        elif model.path in NAMES:
            yield f"{given}: the embedded model is scored on its benchmark"


def unused_of_engine(engine: Engine, compares: bool, likelihoods: bool = True) -> Iterator[str]:
    """The same of the built-in engine's options.

    Args:
        engine: What scores checkpoints.
        compares: Whether a dense model is scored beside the pruned one.
        likelihoods: Whether the command measures how likely right answers are.
    """
    if not isinstance(engine, BuiltinEngine):
        return
    given = _given(BuiltinEngine, engine, "engine", "top_k", "likelihood")
    if not likelihoods:
        yield from _line(given, ["engine.top_k", "engine.likelihood"], "this command counts right answers only")
    elif not engine.likelihood or not compares:
        why = "there is no --baseline" if engine.likelihood else "--engine.likelihood false measures no likelihoods"
        yield from _line(given, ["engine.top_k"], why)


def _given(kind: type, owner: Any, section: str, *names: str) -> dict[str, Any]:
    """Values of options that are not at their defaults, by their names on the command line."""
    defaults = signature(kind).parameters
    values = {name: getattr(owner, name) for name in names}
    return {f"{section}.{name}": value for name, value in values.items() if value != defaults[name].default}


def _line(given: dict[str, Any], names: list[str], why: str) -> Iterator[str]:
    """A line about those of some options that were given, which are said to be unused once only."""
    found: Mapping[str, Any] = {name: given.pop(name) for name in names if name in given}
    if found:
        told = [f"--{name} {_written(value)}" for name, value in found.items()]
        listed = " and ".join(filter(None, [", ".join(told[:-1]), told[-1]]))
        yield f"{listed} {'is' if len(told) == 1 else 'are'} not used: {why}"


def _written(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, list):
        return f"'[{', '.join(map(str, value))}]'"
    return str(value).lower() if isinstance(value, bool) else str(value)
