"""Pruning of one block, when its calibration is done: every process does its share, and gets the others'.

deal out ─► for each matrix: score ─► mask ─► new weight ─► exchange ─► numbers for the manifest
            (those of one statistic stay together)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lvlm_prune.blocks import ExpertMatrix
from lvlm_prune.distributed.processes import Processes, deal
from lvlm_prune.errors import RunError
from lvlm_prune.loop import Block
from lvlm_prune.memory.measuring import Stopwatch
from lvlm_prune.methods.contract import checked_solution, name_of, only_looks, sums_of
from lvlm_prune.methods.masking import zero_
from lvlm_prune.methods.patterns import Pattern
from lvlm_prune.methods.scorers import MagnitudeScorer
from lvlm_prune.methods.solvers import LinearProblem, Solver
from lvlm_prune.methods.statistics import Statistic
from lvlm_prune.pruning.calibration import BlockCalibration
from lvlm_prune.pruning.effects import PruningErrors, scored_rows

_BY_MAGNITUDE = MagnitudeScorer().solver()

RareExperts = Literal["magnitude", "keep"]


def solver_of(entry: Mapping[str, Any], solver: Solver) -> Solver:
    """What prunes a matrix, given its entry in the manifest and the solver of the method."""
    return _BY_MAGNITUDE if entry.get("scored_by") == "magnitude" else solver


def refuse_broken(weights: Mapping[str, Tensor]) -> None:
    """Stop at NaN or infinity, with one look at all weights: a look at each would make a GPU wait.

    Raises:
        RunError: A weight is not finite; names it.
    """
    if not weights:
        return
    extremes = torch.stack([torch.stack(weight.aminmax()).double() for weight in weights.values()])
    for full_name, is_finite in zip(weights, torch.isfinite(extremes).all(dim=1).tolist()):
        if not is_finite:
            raise RunError(f"NaN or infinity in the weight of {full_name}")


@dataclass(frozen=True)
class BlockPruner:
    """Has the matrices of a block solved, all at once or in several steps, and overwrites them.

    Args:
        solver: Finds masks and new weights.
        pattern: Which weights may go together.
        min_expert_tokens: An expert that fewer tokens were sent to is not judged by them.
        rare_experts: What is done with it instead.
        effects: What was done to the matrices of the block so far.
    """

    solver: Solver
    pattern: Pattern
    min_expert_tokens: int
    rare_experts: RareExperts
    effects: PruningErrors = field(default_factory=PruningErrors)

    def prune(
        self, block: Block, targets: Mapping[str, float], calibration: BlockCalibration | None, processes: Processes
    ) -> None:
        """Prune matrices of a block; its masks, weights and record say what was done, the same on all processes.

        Args:
            block: Its weights are loaded; those to prune are dense.
            targets: Name of each matrix to prune, relative to the block -> target sparsity.
            calibration: Finished statistics; None for a solver that needs none.
            processes: All processes of the run.

        Raises:
            RunError: An updated weight is NaN or infinite.
        """
        matrices = block.matrices()
        entries: dict[str, dict[str, Any]] = {}
        effects, finite = PruningErrors(), dict[str, Tensor]()
        unseen = _saw_nothing(targets, calibration)
        sites = dict[str, list[str]]()
        if calibration is not None:
            for name in targets:
                sites.setdefault(calibration.site_of(name), []).append(name)
        if block.keeps_dense:
            block.dense |= {name: matrices[name].weight.detach().clone() for name in targets}
        owners = self._deal({name: matrices[name].weight for name in targets}, calibration, processes.count)
        for name, target in targets.items():
            weight = matrices[name].weight
            entry = entries[name] = {"shape": list(weight.shape), "target": target}
            if calibration is not None:
                is_expert = isinstance(matrices[name], ExpertMatrix)
                entry |= self._lack_of_tokens(calibration, name, name in unseen, is_expert)
            if "note" in entry:
                del owners[name]
            elif owners[name] == processes.rank:
                fed_alike = () if calibration is None else sites[calibration.site_of(name)]
                siblings = {f"{block.name}.{other}": matrices[other].weight for other in fed_alike if other != name}
                statistic = None if calibration is None else calibration.statistic_of(name)
                self._prune_matrix(block, name, statistic, siblings, entry, effects, finite)
                del statistic
            else:
                block.masks[name] = torch.empty_like(weight, dtype=torch.bool)
            if calibration is not None and name == sites[calibration.site_of(name)][-1]:
                calibration.let_go(calibration.site_of(name))  # the next site's solver needs the room
        if finite and not torch.stack(list(finite.values())).all():
            full_name = next(full_name for full_name, is_finite in finite.items() if not is_finite)
            raise RunError(f"NaN or infinity in the updated weight of {full_name}")
        self._exchange(block, owners, entries, processes)
        # One look at the device for all matrices: a look at each would make a GPU wait.
        counts = torch.stack([block.masks[name].count_nonzero() for name in owners]).tolist() if owners else []
        for name, count in zip(owners, counts):
            entries[name]["pruned"] = count
            if solver_of(entries[name], self.solver).updates_weights:
                block.updated.add(name)
        linears = {f"{block.name}.{name}": entry for name, entry in entries.items()}
        if processes.count > 1:
            effects = PruningErrors.of_all(processes.gather(effects.on_cpu()))
        for full_name, error in effects.errors().items():
            linears[full_name]["error"] = error
        self.effects.take(effects)
        if (scores := self.effects.scores()) is not None:
            block.record["scores"] = scores
        block.record.setdefault("linears", {}).update(linears)

    def _deal(self, weights: Mapping[str, Tensor], calibration: BlockCalibration | None, count: int) -> dict[str, int]:
        """Name of each matrix -> rank of the process that prunes it; those of one statistic stay together."""
        shares: dict[str, list[str]] = {}
        for name in weights:
            shares.setdefault(name if calibration is None else calibration.site_of(name), []).append(name)
        costs = {
            share: self.solver.cost(sum(len(weights[name]) for name in names), weights[names[0]].shape[1])
            for share, names in shares.items()
        }
        owners = deal(costs, count)
        return {name: owners[share] for share, names in shares.items() for name in names}

    def _lack_of_tokens(
        self, calibration: BlockCalibration, name: str, is_unseen: bool, is_expert: bool
    ) -> dict[str, Any]:
        """What the manifest says of a matrix that saw too few tokens; with a `note` it stays dense."""
        if not is_expert:
            return {"target": 0.0, "note": "saw no calibration token, or zeros alone"} if is_unseen else {}
        routed = calibration.routed_tokens(name)
        if routed >= self.min_expert_tokens and not is_unseen:
            return {}
        if self.rare_experts == "keep":
            note = "too few calibration tokens were sent to this expert"
            return {"target": 0.0, "routed_tokens": routed, "note": note}
        return {"routed_tokens": routed, "scored_by": "magnitude"}

    def _prune_matrix(
        self,
        block: Block,
        name: str,
        statistic: Statistic | None,
        siblings: Mapping[str, Tensor],
        entry: dict[str, Any],
        effects: PruningErrors,
        finite: dict[str, Tensor],
    ) -> None:
        """Overwrite the weight; note in the entry what the solver has to say, and in `effects` what it did.

        `finite` gets whether all of an updated weight is finite: to look at once would make a GPU wait.
        """
        solver, target, full_name = solver_of(entry, self.solver), entry["target"], f"{block.name}.{name}"
        matrix = block.matrices()[name]
        weight, bias, pattern = matrix.weight, getattr(matrix, "bias", None), self.pattern.at(target)
        problem = LinearProblem(weight, statistic, target, pattern, full_name, block.index, bias, siblings)
        clock = Stopwatch(weight.device)
        given: dict[str, Any] = {"weight": weight, "statistic": sums_of(statistic), "siblings": siblings.values()}
        with only_looks(f"{name_of(solver)}.solve", **given):
            solution = checked_solution(solver, solver.solve(problem), weight)
        block.masks[name] = solution.mask
        if solver.updates_weights:
            block.solve_seconds += clock.lap()
            finite[full_name] = torch.isfinite(solution.weight).all()
        if solver is self.solver and target > 0:
            score = solver.score(problem, scored_rows(weight))
            effects.add(full_name, weight, solution.weight, solution.mask, statistic, score)
        weight.data.copy_(solution.weight)
        if solution.notes:
            entry["solver"] = solution.notes

    def _exchange(
        self, block: Block, owners: Mapping[str, int], entries: dict[str, dict[str, Any]], processes: Processes
    ) -> None:
        """Give every process what the others pruned."""
        if processes.count == 1:
            return
        matrices = block.matrices()
        for rank in range(processes.count):
            names = [name for name, owner in owners.items() if owner == rank]
            processes.copy_from(rank, [block.masks[name] for name in names])
            if self.solver.updates_weights:
                processes.copy_from(rank, [matrices[name].weight.data for name in names])
            elif rank != processes.rank:
                for name in names:
                    zero_(matrices[name].weight.data, block.masks[name])
        notes = {name: entry["solver"] for name, entry in entries.items() if "solver" in entry}
        for name, note in (item for part in processes.gather(notes) for item in part.items()):
            entries[name]["solver"] = note


def _saw_nothing(names: Iterable[str], calibration: BlockCalibration | None) -> set[str]:
    """The matrices that no token of the pool reached, or only zeros: then nothing is known about their weights.

    One look at the device for all of them.
    """
    if calibration is None:
        return set()
    statistics = {name: calibration.statistic_of(name) for name in names}
    norms = {name: one.squared_norms() for name, one in statistics.items() if one is not None}
    known = {name: value.any() for name, value in norms.items() if value is not None}
    seen = dict(zip(known, torch.stack(list(known.values())).tolist())) if known else {}
    return {name for name, statistic in statistics.items() if statistic is None or not seen.get(name, True)}
