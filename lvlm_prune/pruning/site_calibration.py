"""Calibration of one block whose input sites come one after the other, each from what the pruned ones before it give.

first pass, dense block   the pool chooses the tokens of each sample; the order of the sites is noted
then for each site        what it is fed by the block as it is by now, of the tokens that were chosen
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from lvlm_prune.distributed.processes import Processes
from lvlm_prune.loop.activations import Activations
from lvlm_prune.methods.contract import checked_cutoffs
from lvlm_prune.methods.tokens import Tokens
from lvlm_prune.pruning.calibration import BlockCalibration, Chosen


class SiteCalibration(BlockCalibration):
    """Statistics of one site at a time; the arguments are those of `BlockCalibration`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._kept: list[Chosen] = []
        self._order_of: dict[int, int] = {}

    def add(self, sample: Activations, tokens: Tokens) -> None:
        """Let the pool choose; nothing is summed up yet."""
        # By the row: a vision tower is called once for each image of a sample.
        self._order_of[id(sample.row)] = len(self._samples)
        self._kept.append(self._choose(sample, tokens))

    def finish_choice(self, processes: Processes) -> dict[str, Any]:
        """All samples have run: what the pool held back counts from now on, or does not.

        Args:
            processes: All processes of the run.

        Returns:
            As `BlockCalibration.finish`.
        """
        selections = [one for kept in self._kept for one in (kept.shared, *kept.own.values()) if one is not None]
        is_held = any(one.candidates is not None for one in selections)
        cutoffs = checked_cutoffs(self.pool, self.pool.cutoffs(processes.sum), len(self._samples), is_held)
        self._kept = [
            Chosen(
                None if chosen.shared is None else chosen.shared.with_candidates(count),
                {name: selection.with_candidates(count) for name, selection in chosen.own.items()},
            )
            for chosen, count in zip(self._kept, cutoffs or [0] * len(self._kept))
        ]
        return self._found(cutoffs, processes)

    def begin(self, names: Sequence[str]) -> None:
        """These come next: their sites are at hand until they are pruned."""
        self._wanted = set(names)

    def add_site(self, sample: Activations) -> None:
        """Add what the sites at hand were fed."""
        order = self._order_of[id(sample.row)]
        self._add_sites(sample, self._kept[order], order)

    def finish_site(self, processes: Processes, devices: Mapping[str, torch.device]) -> None:
        """Make the sums at hand the same on all processes; see `BlockCalibration.finish`."""
        self._sum_over_processes(processes, devices)


def sites_in_order(
    orders: Iterable[Mapping[int, Sequence[Sequence[str]]]], targets: Iterable[str], experts: Iterable[str]
) -> list[list[str]]:
    """The Linears that are pruned together, site after site; experts come last.

    Args:
        orders: From each process: number of a sample -> its sites in the order of their calls.
        targets: Names of all that is to be pruned.
        experts: Those of them that are matrices of routed experts, as `mlp.experts.7.down_proj`.

    Example:
        >>> calls = {0: (("q", "k"), ("o",)), 3: (("q", "k"), ("cross",), ("o",))}
        >>> experts = ["e.0.up", "e.1.up", "e.0.down"]
        >>> sites_in_order([calls], ["q", "o", "cross", "unseen", *experts], experts)
        [['q'], ['o'], ['cross'], ['e.0.up', 'e.1.up'], ['e.0.down'], ['unseen']]
    """
    routed = list(experts)
    left = dict.fromkeys(name for name in targets if name not in set(routed))
    together = {sample: sites for order in orders for sample, sites in order.items()}
    found = []
    for sample in sorted(together):
        for site in together[sample]:
            if names := [name for name in site if name in left]:
                found.append(names)
                for name in names:
                    del left[name]
    stages: dict[str, list[str]] = {}
    for name in routed:
        stages.setdefault(name.rpartition(".")[2], []).append(name)
    return [*found, *stages.values(), *([list(left)] if left else [])]
