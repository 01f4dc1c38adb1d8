"""What of a model is pruned: found, and refused where a method is not defined for it, before any work."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import combinations
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import nn

from lvlm_prune.blocks import ExpertMatrix, StreamedWeights, has_routed_experts
from lvlm_prune.checkpoints.versions import VERSION_5
from lvlm_prune.errors import InputError
from lvlm_prune.methods.allocation import Allocation
from lvlm_prune.methods.patterns import Pattern, SemiStructured
from lvlm_prune.methods.pools import Pool
from lvlm_prune.plugins import plugin_class

if TYPE_CHECKING:
    from lvlm_prune.module import LVLMModule


@dataclass(frozen=True)
class Scope:
    """The matrices of a model that are pruned.

    Args:
        shapes: Full name of each -> (C_out, C_in).
        in_towers: Full names of all Linears of the vision tower, where it is pruned.
        has_experts: Whether any matrix of a routed expert is among them.
    """

    shapes: dict[str, tuple[int, int]]
    in_towers: frozenset[str]
    has_experts: bool


def find_scope(pl_module: LVLMModule, exclude: Sequence[str], experts: str) -> Scope:
    """Find the matrices to prune; the weights need not be loaded.

    Args:
        pl_module: The opened model.
        exclude: Glob patterns on the names of those that stay dense.
        experts: Whether to `prune` routed experts or to `keep` them dense.

    Raises:
        InputError: A pattern matches nothing, nothing is left, or routed experts cannot be looked into.
    """
    towers = pl_module.tower_linears()
    matrices: dict[str, nn.Linear | ExpertMatrix] = {}
    of_experts: dict[str, ExpertMatrix] = {}
    if "language" in pl_module.targets:
        matrices |= pl_module.linears()
        of_experts = pl_module.expert_matrices()
        if experts == "prune" and not VERSION_5 and has_routed_experts(pl_module.runner.decoder.layers):
            problem = "transformers 4 computes routed experts in its own ways; use keep, or transformers 5"
            raise InputError("pruning.experts", experts, problem)
    if experts == "keep":
        matrices = {name: linear for name, linear in matrices.items() if not _is_of_routed_expert(name)}
        of_experts = {}
    everything = {**towers, **matrices, **of_experts}
    excluded: set[str] = set()
    known = _printed_names(pl_module, everything) if exclude else {}
    for pattern in exclude:
        excluded |= _matching(pattern, known, towers) or _refuse_absent(pl_module, pattern)
    shapes = {
        name: (matrix.out_features, matrix.in_features) for name, matrix in everything.items() if name not in excluded
    }
    if not shapes:
        raise InputError("pruning.exclude", exclude, "leaves nothing to prune")
    return Scope(shapes, frozenset(towers), not of_experts.keys().isdisjoint(shapes))


def _matching(pattern: str, known: Mapping[str, Collection[str]], towers: Collection[str]) -> set[str]:
    """Full names of the matrices that a pattern means: one of their names, or what a page or log calls their kind.

    There, `down_proj` and `mlp.down_proj` are those of all blocks; a vision tower's are `vision fc1` where a page has
    both towers and decoder. What means none of these may be a part of names: `layers.0.mlp` is all inside it, whatever
    comes before.
    """
    found = {name for name, printed in known.items() if any(fnmatchcase(one, pattern) for one in printed)}
    if found:
        return found
    kind, in_tower = pattern.removeprefix("vision "), pattern.startswith("vision ")
    labelled = {name for name in known if any(fnmatchcase(label, kind) for label in _labels(name))}
    labelled = labelled or {name for name, printed in known.items() if any(_has_part(one, kind) for one in printed)}
    if in_tower:
        return labelled.intersection(towers)
    # Bare kinds are those of the decoder where it has them.
    return (labelled.difference(towers) or labelled) if "." not in kind else labelled


def _labels(name: str) -> list[str]:
    """What a matrix is called within its block, from the whole of it down to its kind.

    Example:
        >>> _labels("model.layers.3.mlp.down_proj")
        ['mlp.down_proj', 'down_proj']
    """
    parts = re.sub(r"^.*?\.\d+\.", "", name).split(".")
    return [".".join(parts[place:]) for place in range(len(parts))]


def _has_part(name: str, pattern: str) -> bool:
    """Whether a pattern matches a part of a name that begins and ends where a module's name does.

    Example:
        >>> name = "model.layers.3.mlp.down_proj"
        >>> [_has_part(name, part) for part in ("layers.3.mlp.down_proj", "model.layers.3", "layers.[0-3]", "mlp", "3")]
        [True, True, True, True, False]
        >>> _has_part("model.layers.13.mlp.down_proj", "layers.3")
        False
    """
    parts = name.split(".")
    places = range(len(parts) + 1)
    return any(
        fnmatchcase(".".join(parts[begin:end]), pattern)
        for begin, end in combinations(places, 2)
        if end - begin > 1 or not parts[begin].isdecimal()
    )


def _refuse_absent(pl_module: LVLMModule, pattern: str) -> NoReturn:
    """Refuse a pattern that means nothing that is pruned; where it means something of the model, say so.

    Raises:
        InputError: Always.
    """
    problem = "matches no Linear of the blocks that are pruned"
    for target, linears in pl_module.linears_beside_targets().items():
        if _matching(pattern, _printed_names(pl_module, linears), linears if target == "vision" else ()):
            part = "vision tower" if target == "vision" else "language decoder"
            problem += f"; it is of the {part}, which stays dense unless --model.targets names {target}"
            raise InputError("pruning.exclude", pattern, problem)
    model = pl_module.model
    every = {name for name, _ in [*model.named_modules(), *model.named_parameters()]}
    if any(fnmatchcase(name, pattern) or name.endswith(f".{pattern}") for name in every):
        problem += "; what it matches stays dense anyway"
    raise InputError("pruning.exclude", pattern, problem)


def _printed_names(
    pl_module: LVLMModule, matrices: Mapping[str, nn.Linear | ExpertMatrix]
) -> dict[str, tuple[str, ...]]:
    """Full name of each matrix -> all names under which users meet it.

    In the manifest that is the module's path, in the checkpoint the name of its tensor, which may hold several
    matrices; `--plan` shows that with `*` for numbers.
    """
    found: dict[str, tuple[str, ...]] = {name: (name, f"{name}.weight") for name in matrices}
    weights = pl_module.weights(torch.device("cpu"))
    if not isinstance(weights, StreamedWeights):
        return found
    for name, matrix in matrices.items():
        parameter = matrix.parameter_of(name) if isinstance(matrix, ExpertMatrix) else f"{name}.weight"
        keys = weights.keys_of(parameter) if weights.has(parameter) else []
        found[name] = (*found[name], parameter, *keys, *(key.removesuffix(".weight") for key in keys))
    return found


def refuse_towers(pool: Pool | None, allocation: Allocation) -> None:
    """In a vision tower every token is visual, and an allocation deals out over the decoder.

    Args:
        pool: Which tokens count; None: there are no samples.
        allocation: How much of each matrix goes.

    Raises:
        InputError: One of the two is not defined for a vision tower.
    """
    way_out = "`--method wanda` prunes it, with the decoder or (`--model.targets '[vision]'`) in a run of its own"
    if pool is not None and not pool.in_towers:
        problem = f"is not defined for the vision tower, where every token is visual; {way_out}"
        raise InputError("pruning.pool", plugin_class(pool).__name__, problem)
    if not allocation.uniform:
        problem = f"is not defined for the vision tower; {way_out}"
        raise InputError("pruning.allocation", plugin_class(allocation).__name__, problem)


def refuse_experts(pool: Pool | None, allocation: Allocation) -> None:
    """Some methods look at what every Linear makes of every token; an expert sees only the tokens sent to it.

    Args:
        pool: Which tokens count; None: there are no samples.
        allocation: How much of each matrix goes.

    Raises:
        InputError: One of the two is not defined for routed experts.
    """
    option = None
    if allocation.wants_survey:
        option = f"--pruning.allocation {plugin_class(allocation).__name__}"
    elif pool is not None and pool.per_linear:
        option = f"--pruning.pool {plugin_class(pool).__name__}"
    if option is not None:
        problem = f"{option} is not defined for routed experts; use --pruning.experts keep"
        raise InputError("pruning.experts", "prune", problem)


def refuse_widths(pattern: Pattern, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Groups of an N:M pattern must come out even.

    Raises:
        InputError: A width does not fit the pattern.
    """
    for part in (pattern.at(level) for level in pattern.levels):
        assert isinstance(part, SemiStructured)
        for name, (_, width) in shapes.items():
            if width % part.group_size:
                problem = f"the {width} input columns of {name} are not divisible by {part.group_size}"
                raise InputError("pruning.pattern", pattern, problem)


def _is_of_routed_expert(name: str) -> bool:
    """Whether a Linear belongs to one of several experts, where a model keeps each expert as a module of its own.

    Example:
        >>> _is_of_routed_expert("layers.0.mlp.experts.3.up_proj"), _is_of_routed_expert("layers.0.shared_experts.up")
        (True, False)
    """
    return re.search(r"\.experts\.\d+\.", name) is not None


def refuse_samples(pool: Pool, tokens: Mapping[str, int], visual: Sequence[str], prunes_tower: bool) -> None:
    """Refuse calibration samples that lack what is to be looked at.

    Args:
        pool: Which tokens count.
        tokens: Modality -> number of tokens in all samples.
        visual: Modalities that count as visual.
        prunes_tower: Whether a vision tower is pruned.

    Raises:
        InputError: There is no text, no visual token, or no picture where one is needed.
    """
    if pool.needs_text and not any(count for name, count in tokens.items() if name not in visual):
        problem = "needs text tokens, and no calibration sample has any"
        raise InputError("pruning.pool", plugin_class(pool).__name__, problem)
    if pool.needs_visual and not any(tokens.get(name) for name in visual):
        problem = "needs visual tokens, and no calibration sample has any"
        others = [name for name in ("image", "video", "audio") if tokens.get(name)]
        problem += f" of --pruning.visual '[{', '.join(visual)}]', only {' and '.join(others)}" if others else ""
        raise InputError("pruning.pool", plugin_class(pool).__name__, problem)
    if prunes_tower and not (tokens.get("image") or tokens.get("video")):
        raise InputError("model.targets", "vision", "no calibration sample has an image or a video")
