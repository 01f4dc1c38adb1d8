"""Options that were given and change nothing with this method or this model: said, so that nobody counts on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from inspect import signature
from typing import Any

from lvlm_prune.blocks import has_routed_experts
from lvlm_prune.callbacks import BlockwisePruning
from lvlm_prune.data import CalibrationDataModule, TensorSource
from lvlm_prune.methods.pools import AsymmetricPool
from lvlm_prune.module import LVLMModule
from lvlm_prune.plugins import describe, plugin_class

_OF_SAMPLES = ("visual", "calibrate_on", "record")
_OF_EXPERTS = ("experts", "min_expert_tokens", "rare_experts")


def unused_options(
    pruning: BlockwisePruning, data: CalibrationDataModule, model: LVLMModule, tokens: Mapping[str, int] | None = None
) -> Iterator[str]:
    """A line for each reason why options that are not at their defaults change nothing.

    Args:
        pruning: The method, after its `plan`.
        data: What calibrates.
        model: The opened model.
        tokens: Modality -> number of calibration tokens, once they are known.
    """
    given = _given(BlockwisePruning, pruning, "pruning", *_OF_SAMPLES, *_OF_EXPERTS)
    given |= _given(CalibrationDataModule, data, "data", "padding_side", "num_samples", "max_pixels")
    if not pruning.wants_activations:
        if describe(pruning.pool) != describe(AsymmetricPool()):
            given["pruning.pool"] = plugin_class(pruning.pool).__name__
        names = ["pruning.pool", *(f"pruning.{name}" for name in _OF_SAMPLES)]
        names += ["data.num_samples", "data.padding_side", "pruning.min_expert_tokens", "pruning.rare_experts"]
        yield from _line(given, names, f"{pruning.name} needs no calibration samples")
    elif data.batch_size == 1:
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
