"""Checks of allocations, and of what plugins learn from a survey."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lvlm_prune.methods.allocation.base import Allocation
from lvlm_prune.methods.contract import PluginFault, checked_targets, name_of, refuse_misdeclared, tensors_of
from lvlm_prune.methods.patterns import SemiStructured, SemiStructuredChoice
from lvlm_prune.methods.scorers import MagnitudeScorer
from lvlm_prune.methods.statistics import Gram
from lvlm_prune.methods.survey import SumOverProcesses, Surveyor
from lvlm_prune.methods.testing.promises import check_refusal, unchanged
from lvlm_prune.methods.testing.samples import (
    CHANNELS,
    LINEAR,
    FewBlocks,
    alone,
    make_tokens,
    make_weight,
    on_two_processes,
)

_BLOCKS = ("model.layers.0", "model.layers.1")
_LINEARS = {"self_attn.q_proj": (CHANNELS, CHANNELS), LINEAR: (2 * CHANNELS, CHANNELS)}
_SHAPES = {f"{block}.{name}": shape for block in _BLOCKS for name, shape in _LINEARS.items()}
_SAMPLES = 4
_TARGETS = (0.3, 0.5, 0.6)
_PATTERNS = (
    (SemiStructured(2, 4), 0.3),
    (SemiStructuredChoice([SemiStructured(3, 4), SemiStructured(2, 4), SemiStructured(1, 4)]), 0.5),
)


def check_allocation(make: Callable[[], Allocation]) -> None:
    """See `check_plugin`."""
    refuse_misdeclared(make(), Allocation)
    findings = check_survey(make) if make().wants_survey else None
    where = f"{name_of(make())}.allocate"
    for target in _TARGETS:
        allocation = make()
        try:
            allocation.check(_SHAPES, target)
        except ValueError as error:
            check_refusal(allocation, error)
            continue
        if findings is not None:
            allocation.use_survey(findings)
        dealt = allocation.allocate(shapes := dict(_SHAPES), target)
        if shapes != _SHAPES:
            raise PluginFault(f"{where}: changes `shapes`, which others still need")
        checked_targets(allocation, dealt, _SHAPES, target)
        if allocation.uniform and set(dealt.values()) != {target}:
            raise PluginFault(f"{where}: {list(dealt.values())}, but `uniform` is True")
        if dealt != allocation.allocate(_SHAPES, target):
            raise PluginFault(f"{where}: another answer to the same question")
    if make().chooses_levels:
        _check_levels(make)


def _check_levels(make: Callable[[], Allocation]) -> None:
    """Under N:M each Linear gets a sparsity that the pattern allows, and the mean is reached."""

    def prepared() -> Allocation:
        allocation = make()
        allocation.use_method(MagnitudeScorer().solver(), pattern, target)
        return allocation

    for pattern, target in _PATTERNS:
        findings = check_survey(prepared) if make().wants_survey else None
        allocation = prepared()
        if findings is not None:
            allocation.use_survey(findings)
        checked_targets(allocation, allocation.allocate(_SHAPES, target), _SHAPES, target, pattern.levels)


def check_survey(make: Callable[[], Any]) -> Mapping[str, Any]:
    """Findings of a survey: plain data, and the same for any number of processes."""
    where = f"{name_of(make())}.survey_end"
    together = survey_of(make(), range(_SAMPLES), alone)
    try:
        restored = json.loads(json.dumps(together, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise PluginFault(f"{where}: {together!r} is no plain data for the manifest ({error})") from None
    if not _same(together, survey_of(make(), range(_SAMPLES), alone)):
        raise PluginFault(f"{where}: another answer to the same question")
    for found in on_two_processes(lambda rank, total: survey_of(make(), range(rank, _SAMPLES, 2), total)):
        if not _same(together, found):
            raise PluginFault(f"{where}: {found} on one of two processes, {together} on a single one")
    _check_interruption(make, together)
    return restored


def _check_interruption(make: Callable[[], Any], whole: Mapping[str, Any]) -> None:
    """A survey that goes on behind its first block finds what one that was not interrupted does."""
    begun, goes_on = make(), make()
    _survey_blocks(begun, range(_SAMPLES), alone, range(1))
    if (found := begun.survey_so_far()) is None:
        return
    goes_on.continue_survey(json.loads(json.dumps(found)))
    _survey_blocks(goes_on, range(_SAMPLES), alone, range(1, len(_BLOCKS)))
    if not _same(whole, ended := goes_on.survey_end(alone)):
        raise PluginFault(f"{name_of(begun)}.continue_survey: {ended} after an interruption, {whole} without one")


def survey_of(plugin: Surveyor, samples: Iterable[int], sum_over_processes: SumOverProcesses) -> dict[str, Any]:
    """What a plugin finds in two small blocks, with these samples."""
    _survey_blocks(plugin, list(samples), sum_over_processes, range(len(_BLOCKS)))
    return plugin.survey_end(sum_over_processes)


def _survey_blocks(
    plugin: Surveyor, samples: Sequence[int], sum_over_processes: SumOverProcesses, places: Iterable[int]
) -> None:
    answers = FewBlocks(_linears(0), samples).answers()
    for turn, place in enumerate(places):
        block, linears = _BLOCKS[place], _linears(place)
        remaining = FewBlocks(linears, samples, answers)
        if turn == 0 and plugin.wants_survey_losses:
            plugin.survey_cost({block: list(linears) for block in _BLOCKS[place:]}, len(samples))
        weights, where = [linear.weight for linear in linears.values()], f"{name_of(plugin)}.survey"
        with unchanged(f"{where}_block_start", linears=weights):
            plugin.survey_block_start(block, linears, remaining)
        if plugin.wants_survey_statistics:
            # Summed over all processes already, so that of every sample.
            statistic = Gram(CHANNELS)
            for sample in range(_SAMPLES):
                statistic.add(_inputs(sample, 8), torch.ones(8, dtype=torch.bool))
            with unchanged(f"{where}_block_changes", linears=weights, statistics=statistic.tensors()):
                plugin.survey_block_changes(block, linears, dict.fromkeys(linears, statistic), remaining)
        for sample in samples:
            tokens = make_tokens(sample, needs=plugin.survey_needs)
            inputs = {name: _inputs(sample, len(tokens.visual)) for name in linears}
            if "outputs" in plugin.survey_needs:
                outputs = {name: inputs[name] @ linear.weight.detach().T for name, linear in linears.items()}
                tokens = replace(tokens, outputs=outputs)
            with unchanged(f"{where}_sample", inputs=inputs.values(), **tensors_of(tokens)):
                plugin.survey_sample(block, tokens, inputs)
        with unchanged(f"{where}_block_end", linears=weights):
            plugin.survey_block_end(block, linears, sum_over_processes)


def _linears(place: int) -> dict[str, nn.Linear]:
    linears = {name: nn.Linear(columns, rows, bias=False) for name, (rows, columns) in _LINEARS.items()}
    for seed, linear in enumerate(linears.values()):
        linear.weight.data = make_weight(linear.out_features, linear.in_features, seed=10 * place + seed)
    return linears


def _inputs(sample: int, count: int) -> torch.Tensor:
    return torch.randn(count, CHANNELS, generator=torch.Generator().manual_seed(100 + sample))


def _same(some: Any, other: Any) -> bool:
    """Equal plain data; numbers within rounding, which the order of a sum leaves."""
    if isinstance(some, Mapping) and isinstance(other, Mapping):
        return some.keys() == other.keys() and all(_same(some[name], other[name]) for name in some)
    if isinstance(some, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(some) == len(other) and all(map(_same, some, other))
    if isinstance(some, (int, float)) and isinstance(other, (int, float)):
        return math.isclose(some, other, rel_tol=1e-6, abs_tol=1e-9)
    return bool(some == other)
