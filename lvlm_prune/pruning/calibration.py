"""Calibration of one block: which tokens of each sample count, summed up per input site.

sample ──► pool ──┬─ tokens that count in any case ──► added at once
                  └─ candidates, best first ─────────► held until the pool says how many count
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lvlm_prune.distributed.processes import Processes
from lvlm_prune.errors import RunError
from lvlm_prune.loop.activations import Activations
from lvlm_prune.methods.contract import checked_selection
from lvlm_prune.methods.pools import Pool
from lvlm_prune.methods.statistics import Statistic
from lvlm_prune.methods.tokens import Selection, Tokens
from lvlm_prune.pruning.composition import PoolCounts


class BlockCalibration:
    """Statistics of a block's Linears, filled sample by sample.

    Linears fed by the same tensor share one statistic; with a pool that chooses for each Linear, every Linear has its
    own.

    Args:
        block: Index of the block.
        targets: Name relative to the block -> full name of each Linear or expert matrix that is to be pruned.
        pool: Which tokens count.
        statistic: What is summed up.
        record: Keep selections and saliencies for `statistics.safetensors`.
        example: Number of the sample whose visual tokens are noted one by one; None for none.
    """

    def __init__(
        self,
        block: int,
        targets: Mapping[str, str],
        pool: Pool,
        statistic: type[Statistic],
        record: bool,
        example: int | None = None,
    ) -> None:
        self.block, self.targets, self.pool, self.statistic, self.record = block, targets, pool, statistic, record
        self._composition = PoolCounts(example)
        self.example: Tensor | None = None
        """How much each visual token of the example counts, uint8 in steps of 1/255; known once finished."""
        self._statistics: dict[str, Statistic] = {}
        self._site_of: dict[str, str] = {}
        self._held: list[tuple[str, int, Tensor, int, float]] = []
        self._held_routed: list[tuple[str, int, Tensor, Tensor, float]] = []
        self._routed_tokens: dict[str, Tensor] = {}
        self._samples: list[int] = []
        self._selections: dict[int, tuple[Tensor, Selection | None]] = {}
        self._linear_selections: dict[tuple[int, str], Tensor] = {}
        self._totals: dict[str, list[tuple[int, Tensor]]] = {}

    def add(self, sample: Activations, tokens: Tokens) -> None:
        """Add the tokens that the pool selects; hold its candidates.

        Raises:
            RunError: A Linear shares its input with others in some samples and not in others.
        """
        order = len(self._samples)
        self._samples.append(sample.sample)
        shared = None if self.pool.per_linear else checked_selection(self.pool, self.pool.select(tokens), tokens)
        if shared is not None:
            self._composition.add(tokens, shared, order)
        if self.record:
            self._selections[sample.sample] = (tokens.visual, shared)
        sites = list(sample.site_inputs()) if self.pool.per_linear else sample.site_inputs()
        own = self._selected_each(sample, tokens, sites) if isinstance(sites, list) else {}
        for site, inputs, repeats in sites:
            names = [name for name in sample.sites[site] if name in self.targets]
            keys = {name: name if self.pool.per_linear else site for name in names}
            for name, key in keys.items():
                if self._site_of.setdefault(name, key) != key:
                    full_name = self.targets[name]
                    raise RunError(f"{full_name} shares its input with other Linears in some samples only")
            for key in dict.fromkeys(keys.values()):
                selection = shared
                if selection is None and repeats > 0:
                    selection = checked_selection(self.pool, own[key], tokens)
                    self._composition.add(tokens, selection, order)
                    if self.record:
                        self._linear_selections[sample.sample, key] = selection.weights
                self._add(key, inputs, repeats, selection, order, sample.row.weight)
        self._add_routed(sample, shared, order)

    def _selected_each(
        self, sample: Activations, tokens: Tokens, sites: Iterable[tuple[str, Tensor, int]]
    ) -> dict[str, Selection]:
        """What a pool that chooses for each Linear answers for those of the decoder's own tokens."""
        names = [name for site, _, repeats in sites if repeats > 0 for name in sample.sites[site]]
        return self.pool.select_each(tokens, [name for name in names if name in self.targets])

    def _add(
        self, key: str, inputs: Tensor, repeats: int, selection: Selection | None, order: int, sample_weight: float
    ) -> None:
        if key not in self._statistics:
            self._statistics[key] = self.statistic(inputs.shape[1], inputs.device)
        if repeats == 0:  # not the decoder's own tokens: no pool speaks of them, all count
            self._sum_up(key, inputs, _scaled(_all(inputs), sample_weight), order, slice(None))
            return
        assert selection is not None
        weights = selection.weights if repeats == 1 else selection.weights.repeat(repeats)
        counted = selection.counted if repeats == 1 else None
        self._sum_up(key, inputs, _scaled(weights, sample_weight), order, counted)
        if selection.candidates is not None and len(selection.candidates):
            streams = inputs.unflatten(0, (repeats, -1))[:, selection.candidates]
            self._held.append((key, order, streams.transpose(0, 1).flatten(0, 1), repeats, sample_weight))

    def _add_routed(self, sample: Activations, selection: Selection | None, order: int) -> None:
        """Add what routed experts were fed; a token counts for the experts that it was sent to."""
        ranks: Tensor | None = None
        for routed in sample.routed_inputs():
            if routed.name not in self.targets:
                continue
            assert selection is not None, "pools that choose for each Linear are refused for experts"
            name, inputs = routed.name, routed.inputs
            self._site_of[name] = name
            if name not in self._statistics:
                self._statistics[name] = self.statistic(inputs.shape[1], inputs.device)
                self._routed_tokens[name] = torch.zeros((), dtype=torch.float64, device=inputs.device)
            weights = selection.weights[routed.tokens]
            self._sum_up(name, inputs, _scaled(weights, sample.row.weight), order)
            self._routed_tokens[name] += (weights > 0).sum()
            if selection.candidates is None or not len(selection.candidates):
                continue
            if ranks is None:
                ranks = torch.full_like(selection.weights, len(selection.weights), dtype=torch.int64)
                ranks[selection.candidates] = torch.arange(len(selection.candidates), device=ranks.device)
            held = ranks[routed.tokens] < len(selection.candidates)
            own_ranks = ranks[routed.tokens][held]
            self._held_routed.append((name, order, inputs[held], own_ranks, sample.row.weight))

    def _sum_up(
        self, key: str, inputs: Tensor, weights: Tensor, order: int, counted: Tensor | slice | None = None
    ) -> None:
        statistic = self._statistics[key]
        if statistic.takes_counted:
            statistic.add(inputs, weights, counted)  # type: ignore[call-arg]
        else:
            statistic.add(inputs, weights)
        if (norms := statistic.squared_norms()) is not None:
            # Looked at only where the sums turn out to be broken: to look at once would make a GPU wait.
            self._totals.setdefault(key, []).append((self._samples[order], norms.sum()))

    def finish(self, processes: Processes, devices: Mapping[str, torch.device]) -> dict[str, Any]:
        """Add the candidates that count, and sum over all processes.

        Args:
            processes: All processes of the run.
            devices: Where each Linear's statistic lives, for those that only another process' samples called.

        Returns:
            Numbers for the manifest: what the pool says of the block, and the visual tokens of each sample.

        Raises:
            RunError: A sum is NaN or infinite; names the Linears and the sample.
        """
        cutoffs = self.pool.cutoffs(processes.sum)
        for key, order, inputs, repeats, sample_weight in self._held:
            chosen = inputs[: cutoffs[order] * repeats]
            if not len(chosen):
                continue
            self._sum_up(key, chosen, _scaled(_all(chosen), sample_weight), order, slice(None))
        self._held.clear()
        for name, order, inputs, ranks, sample_weight in self._held_routed:
            chosen = inputs[ranks < cutoffs[order]]
            self._sum_up(name, chosen, _scaled(_all(chosen), sample_weight), order, slice(None))
            self._routed_tokens[name] += len(chosen)
        self._held_routed.clear()
        known = {key: len(statistic.tensors()[0]) for key, statistic in self._statistics.items()}
        for others, site_of in processes.gather((known, self._site_of)):
            self._site_of.update(site_of)
            for key, channels in others.items():
                if key not in self._statistics:
                    self._statistics[key] = self.statistic(channels, devices[key])
        for name in {name for names in processes.gather(list(self._routed_tokens)) for name in names}:
            self._routed_tokens.setdefault(name, torch.zeros((), dtype=torch.float64, device=devices[name]))
        processes.sum_in_place(
            [tensor for key in sorted(self._statistics) for tensor in self._statistics[key].tensors()]
            + [self._routed_tokens[name] for name in sorted(self._routed_tokens)]
        )
        self._refuse_faults(processes)
        self._chosen_of = dict(zip(self._samples, cutoffs))
        counted, self.example = self._composition.finish(self._chosen_of, processes)
        found: dict[str, Any] = dict(self.pool.summary()) | {"pool": counted}
        everywhere = processes.gather(self._chosen_of)
        if any(everywhere):
            together = {sample: count for part in everywhere for sample, count in part.items()}
            found["visual_tokens"] = [together[sample] for sample in sorted(together)]
        return found

    @property
    def selected_nothing(self) -> bool:
        """Whether the block was run, and no token of any sample counts; after `finish`, the same on all processes."""
        norms = [statistic.squared_norms() for statistic in self._statistics.values()]
        return bool(norms) and all(norm is not None and not bool(norm.any()) for norm in norms)

    def site_of(self, name: str) -> str:
        """What a Linear's statistic is kept under: Linears of one site share it."""
        return self._site_of.get(name, name)

    def _refuse_faults(self, processes: Processes) -> None:
        """Stop at NaN or infinity; the sums are the same on all processes, so all of them stop here or none."""
        finite = {
            key: torch.stack([torch.isfinite(part.sum()) for part in statistic.tensors()]).all()
            for key, statistic in sorted(self._statistics.items())
        }
        if not finite or torch.stack(list(finite.values())).all():
            return
        key = next(key for key, is_finite in finite.items() if not is_finite)
        own = [sample for sample, total in self._totals.get(key, []) if not torch.isfinite(total)][:1]
        samples = sorted(sample for part in processes.gather(own) for sample in part)
        names = ", ".join(self.targets[name] for name, site in sorted(self._site_of.items()) if site == key)
        where = f" for calibration sample {samples[0]}" if samples else ""
        raise RunError(f"NaN or infinity in the calibration statistics of {names}{where}")

    def statistic_of(self, name: str) -> Statistic | None:
        """The sums over the pool of a Linear's input; None where no sample called it."""
        return self._statistics.get(self._site_of.get(name, ""))

    def routed_tokens(self, name: str) -> int:
        """How many tokens that count were sent to the expert of a matrix, over all samples."""
        counted = self._routed_tokens.get(name)
        return 0 if counted is None else int(counted)

    def recorded(self, processes: Processes, num_samples: int) -> dict[str, Tensor]:
        """Norms, saliencies and selected tokens of all processes under the names of `statistics.safetensors`.

        Keys: `scaler_row.{block}.{linear}` float32 (C_in,), squared norms / number of samples; `image_mask.{sample}`
        bool (1, T), visual tokens; `{saliency}.{block}.{sample}` float32 (n_visual,); `sel.{block}.{sample}` int64,
        selected tokens as indices into the visual ones; `{pool}_sel.{block}.{sample}.{linear}`, weights (T,).
        """
        own: dict[str, Tensor] = {}
        for sample, (visual, selection) in self._selections.items():
            own[f"image_mask.{sample}"] = visual[None].cpu()
            if selection is not None:
                own.update(self._recorded_selection(sample, visual, selection))
        for (sample, linear), weights in self._linear_selections.items():
            own[f"{self.pool.name}_sel.{self.block}.{sample}.{linear}"] = weights.cpu()
        everything = {key: value for part in processes.gather(own) for key, value in part.items()}
        for name in self.targets:
            statistic = self._statistics.get(self._site_of.get(name, ""))
            norms = None if statistic is None else statistic.squared_norms()
            if norms is not None:
                everything[f"scaler_row.{self.block}.{name}"] = (norms / num_samples).float().cpu()
        return everything

    def _recorded_selection(self, sample: int, visual: Tensor, selection: Selection) -> dict[str, Tensor]:
        recorded = {}
        if selection.saliency is not None:
            name = getattr(getattr(self.pool, "saliency", None), "name", "saliency")
            recorded[f"{name}.{self.block}.{sample}"] = selection.saliency.cpu()
        if selection.candidates is not None:
            among_visual = visual.cumsum(0) - 1
            chosen = selection.candidates[: self._chosen_of[sample]]
            recorded[f"sel.{self.block}.{sample}"] = among_visual[chosen].sort().values.cpu()
        return recorded


def _all(inputs: Tensor) -> Tensor:
    return torch.ones(len(inputs), dtype=torch.bool, device=inputs.device)


def _scaled(weights: Tensor, sample_weight: float) -> Tensor:
    """Weights of tokens, which enter statistics as squares, of a sample that counts `sample_weight` times."""
    return weights if sample_weight == 1 else weights * math.sqrt(sample_weight)
