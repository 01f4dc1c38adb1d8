"""Checks of saliencies and pools: what is said of the tokens of a sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lvlm_prune.methods.contract import (
    PluginFault,
    checked,
    checked_cutoffs,
    checked_selection,
    name_of,
    refuse_misdeclared,
    tensors_of,
)
from lvlm_prune.methods.pools.base import Pool
from lvlm_prune.methods.saliency.base import Saliency
from lvlm_prune.methods.survey import SumOverProcesses
from lvlm_prune.methods.testing.allocations import check_survey, survey_of
from lvlm_prune.methods.testing.promises import check_numbers, unchanged
from lvlm_prune.methods.testing.samples import CHANNELS, LINEAR, WIDTH, alone, make_tokens, on_two_processes
from lvlm_prune.methods.tokens import Selection, Tokens

_SIZES = ((6, 9), (5, 12), (7, 0), (0, 8), (3, 4))
"""Text and visual tokens of the samples."""


def check_saliency(make: Callable[[], Saliency]) -> None:
    """See `check_plugin`."""
    saliency = make()
    refuse_misdeclared(saliency, Saliency)
    where = f"{name_of(saliency)}.__call__"
    for dtype in (torch.float32, torch.bfloat16):
        for seed, (text, visual) in enumerate(_SIZES):
            tokens = make_tokens(seed, text, visual, saliency.needs, dtype)
            with unchanged(where, **tensors_of(tokens)):
                answer = checked(_asked(saliency, saliency, tokens), torch.empty(visual), where)
            if not torch.isfinite(answer).all():
                raise PluginFault(f"{where}: NaN or infinity for finite tokens")
            if visual and answer.max() > saliency.maximum * 1.001:
                raise PluginFault(f"{where}: {answer.max():g}, but `maximum` is {saliency.maximum:g}")
            padded = make_tokens(seed, text, visual, saliency.needs, dtype, padding=5)
            _same(answer, make()(padded), f"{where}: changes with padding, which lies around the tokens in memory")
            _same(answer, make()(tokens), f"{where}: another answer to the same question")
            _same(answer, saliency(tokens), f"{where}: depends on what it was asked before")
            _check_ranking(saliency, tokens, answer)


def _check_ranking(saliency: Saliency, tokens: Tokens, answer: Tensor) -> None:
    where, whole = f"{name_of(saliency)}.ranking", saliency.ranking(tokens, answer, len(answer))
    checked(whole, answer, where, (torch.int64,))
    if sorted(whole.tolist()) != list(range(len(answer))):
        raise PluginFault(f"{where}: {whole.tolist()}, expected each of the {len(answer)} visual tokens once")
    some = len(answer) // 2
    first = saliency.ranking(tokens, answer, some)
    _same(whole[:some], first, f"{where}: a smaller `count` is no prefix of the same order")


def check_pool(make: Callable[[], Pool]) -> None:
    """See `check_plugin`."""
    pool = make()
    refuse_misdeclared(pool, Pool)
    if pool.wants_survey:
        check_survey(make)
    sizes = [(text, visual) for text, visual in _SIZES if visual or not pool.needs_visual]
    for dtype in (torch.float32, torch.bfloat16):
        for seed, (text, visual) in enumerate(sizes):
            _check_select(make, text, visual, seed, dtype)
    _check_cutoffs(make, sizes)
    bytes_taken = pool.working_bytes(15, 9, WIDTH, 2 * CHANNELS, 2)
    check_numbers(pool, {"held_tokens": pool.held_tokens(6, 9), "working_bytes": bytes_taken})


def _ready(make: Callable[[], Pool]) -> Pool:
    """A new pool, with the findings of its survey where it wants one."""
    pool = make()
    if pool.wants_survey:
        pool.use_survey(survey_of(make(), range(4), alone))
    return pool


def _check_select(make: Callable[[], Pool], text: int, visual: int, seed: int, dtype: torch.dtype) -> None:
    pool = _ready(make)
    tokens = make_tokens(seed, text, visual, pool.needs, dtype)
    linear, where = LINEAR if pool.per_linear else None, f"{name_of(pool)}.select"
    with unchanged(where, **tensors_of(tokens)):
        selection = checked_selection(pool, _asked(pool, pool.select, tokens, linear), tokens)
    weights = selection.weights.double()
    if not torch.isfinite(weights).all() or (weights < 0).any():
        raise PluginFault(f"{where}: weights of tokens must be finite, 0 or larger")
    if selection.saliency is not None:
        checked(selection.saliency, torch.empty(visual), f"{where}, saliency")
    if selection.counted is not None and not torch.equal(
        torch.arange(len(weights))[selection.counted], weights.nonzero().flatten()
    ):
        raise PluginFault(f"{where}: `counted` is not where the weights are not zero, so that other tokens would count")
    if linear is not None:
        each = _ready(make).select_each(tokens, [linear])
        problem = f"{name_of(pool)}.select_each: another answer than `select`"
        _same(_all_of(selection), _all_of(each[linear]), problem)
    chosen = selection.candidates
    if chosen is not None:
        if len(set(chosen.tolist())) < len(chosen) or (
            len(chosen) and not 0 <= chosen.min() <= chosen.max() < text + visual
        ):
            raise PluginFault(f"{where}: candidates {chosen.tolist()}, expected indices of tokens, each once")
        if len(chosen) > pool.held_tokens(text, visual):
            promised = pool.held_tokens(text, visual)
            raise PluginFault(
                f"{name_of(pool)}.held_tokens: {promised} for the plan, but {len(chosen)} candidates are held"
            )
    padded = make_tokens(seed, text, visual, pool.needs, dtype, padding=5)
    for other, problem in (
        (_ready(make).select(padded, linear), "changes with padding, which lies around the tokens in memory"),
        (_ready(make).select(tokens, linear), "another answer to the same question"),
        (_after_others(make, tokens, linear), "depends on the samples before, which are others on several processes"),
    ):
        _same(_all_of(selection), _all_of(other), f"{where}: {problem}")


def _after_others(make: Callable[[], Pool], tokens: Tokens, linear: str | None) -> Selection:
    pool = _ready(make)
    for seed in (11, 12):
        pool.select(make_tokens(seed, 4, 15, pool.needs, tokens.hidden_in.dtype), linear)
    return pool.select(tokens, linear)


def _all_of(selection: Selection) -> Tensor:
    rest = [] if selection.candidates is None else [selection.candidates.double()]
    return torch.cat([selection.weights.double(), *rest])


def _check_cutoffs(make: Callable[[], Pool], sizes: list[tuple[int, int]]) -> None:
    """How many candidates count is the same whichever process sees a sample."""
    where = f"{name_of(make())}.cutoffs"

    def cutoffs(numbers: list[int], sum_over_processes: SumOverProcesses) -> list[int]:
        pool, held = _ready(make), []
        for number in numbers:
            tokens = make_tokens(number, *sizes[number], pool.needs)
            selection = pool.select(tokens, LINEAR if pool.per_linear else None)
            held.append(0 if selection.candidates is None else len(selection.candidates))
        found = checked_cutoffs(pool, pool.cutoffs(sum_over_processes), len(held), any(held))
        if any(held) and any(k > most for k, most in zip(found, held)):
            raise PluginFault(f"{where}: {found} for samples with {held} candidates, expected no more than these")
        if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in pool.summary().values()):
            raise PluginFault(f"{name_of(pool)}.summary: {pool.summary()!r}, expected finite numbers by name")
        return found

    numbers = list(range(len(sizes)))
    together = cutoffs(numbers, alone)
    first, second = on_two_processes(lambda rank, total: cutoffs(numbers[rank::2], total))
    if together and together != [(first, second)[number % 2][number // 2] for number in numbers]:
        problem = f"{together} on one process, {first} and {second} on two; sum over processes before deciding"
        raise PluginFault(f"{where}: {problem}")


def _asked(plugin: Any, ask: Callable[..., Any], *question: Any) -> Any:
    """The answer; fields of `Tokens` that the plugin does not say it needs are empty, as in a run."""
    try:
        return ask(*question)
    except Exception as error:
        needs = ", ".join(sorted(plugin.needs)) or "none"
        said = " ".join(str(error).split())
        problem = f"fails on a small sample ({type(error).__name__}: {said}); fields that `needs` names: {needs}"
        raise PluginFault(f"{name_of(plugin)}: {problem}, others are empty") from error


def _same(some: Tensor, other: Tensor, problem: str) -> None:
    if some.shape != other.shape or not torch.equal(some, other):
        raise PluginFault(problem)
