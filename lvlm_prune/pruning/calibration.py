"""Calibration of one block: which tokens of each sample count, summed up per input site.

sample ──► pool ──┬─ tokens that count in any case ──► added at once
                  └─ candidates, best first ─────────► held until the pool says how many count
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvlm_prune.distributed.processes import Processes
from lvlm_prune.errors import RunError
from lvlm_prune.loop.activations import Activations, SampleRow, SiteInput
from lvlm_prune.methods.contract import (
    checked_cutoffs,
    checked_selection,
    checked_sums,
    name_of,
    only_looks,
    tensors_of,
)
from lvlm_prune.methods.pools import Pool
from lvlm_prune.methods.statistics import Statistic
from lvlm_prune.methods.tokens import Selection, Tokens
from lvlm_prune.pruning.composition import PoolCounts


@dataclass(frozen=True)
class _Counted:
    """Tokens that are to be added to a statistic.

    Args:
        inputs: What the site was fed, shape (T, channels).
        weights: Weight of each, shape (T,), bool or float.
        counted: Where the weight is not zero, as indices or a slice; None where that is not known.
        dense: What the site is fed in the dense model, of the same shape; None where that is the same.
        visual: Which are visual, bool of shape (T,); None where no statistic asks.
    """

    inputs: Tensor
    weights: Tensor
    counted: Tensor | slice | None = None
    dense: Tensor | None = None
    visual: Tensor | None = None

    def taken_by(self, statistic: Statistic) -> dict[str, Any]:
        """What the statistic takes of them besides inputs and weights."""
        named = {"counted": self.counted, "dense": self.dense, "visual": self.visual}
        return {name: value for name, value in named.items() if getattr(statistic, f"takes_{name}")}

    def some(self, which: Tensor | slice) -> _Counted:
        """Some of these tokens, which all count."""
        dense = None if self.dense is None else self.dense[which]
        visual = None if self.visual is None else self.visual[which]
        return _Counted(self.inputs[which], self.weights[which], slice(None), dense, visual)


@dataclass(frozen=True)
class Chosen:
    """What the pool selected of one sample.

    Args:
        shared: For all Linears; None for a pool that chooses for each.
        own: For each Linear, by its name relative to the block.
    """

    shared: Selection | None
    own: dict[str, Selection]


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
        visual: Modalities that count as visual tokens.
    """

    def __init__(
        self,
        block: int,
        targets: Mapping[str, str],
        pool: Pool,
        statistic: type[Statistic],
        record: bool,
        example: int | None = None,
        visual: Sequence[str] = ("image", "video"),
    ) -> None:
        self.block, self.targets, self.pool, self.statistic, self.record = block, targets, pool, statistic, record
        self.visual = visual
        self._composition = PoolCounts(example)
        self._counted: dict[str, float] = {}
        self.example: Tensor | None = None
        """How much each visual token of the example counts, uint8 in steps of 1/255; known once finished."""
        self._statistics: dict[str, Statistic] = {}
        self._norms: dict[str, Tensor] = {}
        self._wanted: Collection[str] = targets
        self._site_of: dict[str, str] = {}
        self._held: list[tuple[str, int, _Counted, int]] = []
        self._held_routed: list[tuple[str, int, _Counted, Tensor]] = []
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
        self._add_sites(sample, self._choose(sample, tokens), len(self._samples) - 1)

    def _choose(self, sample: Activations, tokens: Tokens) -> Chosen:
        """Let the pool select; note what it did."""
        order = len(self._samples)
        self._samples.append(sample.sample)
        shared, own = None, dict[str, Selection]()
        if self.pool.per_linear:
            called = (site.name for site in sample.site_inputs() if site.repeats > 0)
            names = [name for site in called for name in sample.sites[site] if name in self.targets]
            with only_looks(f"{name_of(self.pool)}.select_each", **tensors_of(tokens)):
                answers = self.pool.select_each(tokens, names)
            own = {name: checked_selection(self.pool, answers.get(name), tokens) for name in names}
        else:
            with only_looks(f"{name_of(self.pool)}.select", **tensors_of(tokens)):
                shared = checked_selection(self.pool, self.pool.select(tokens), tokens)
        for selection in own.values() if shared is None else [shared]:
            self._composition.add(tokens, selection, order)
        if self.record:
            self._selections[sample.sample] = (tokens.visual, shared)
            self._linear_selections |= {(sample.sample, name): one.weights for name, one in own.items()}
        return Chosen(shared, own)

    def _add_sites(self, sample: Activations, chosen: Chosen, order: int) -> None:
        """Add what each site was fed, as far as it counts."""
        for site in sample.site_inputs():
            for key in self._keys(sample, site):
                self._add(key, site, chosen.shared or chosen.own.get(key), order, sample.row)
        self._add_routed(sample, chosen.shared, order)

    def _keys(self, sample: Activations, site: SiteInput) -> list[str]:
        """What the statistics of a site's Linears are kept under, as far as these are to be pruned.

        Raises:
            RunError: A Linear shares its input with others in some samples and not in others.
        """
        names = [name for name in sample.sites[site.name] if name in self._wanted]
        keys = {name: name if self.pool.per_linear else site.name for name in names}
        for name, key in keys.items():
            if self._site_of.setdefault(name, key) != key:
                full_name = self.targets[name]
                raise RunError(f"{full_name} shares its input with other Linears in some samples only")
        return list(dict.fromkeys(keys.values()))

    def _add(self, key: str, site: SiteInput, selection: Selection | None, order: int, row: SampleRow) -> None:
        inputs, repeats = site.inputs, site.repeats
        if key not in self._statistics:
            self._statistics[key] = self._fresh(inputs.shape[1], inputs.device)
        if repeats == 0:  # not the decoder's own tokens: no pool speaks of them, all count
            counted = _Counted(inputs, _scaled(_all(inputs), row.weight), slice(None), site.dense)
            self._sum_up(key, counted, order)
            return
        assert selection is not None
        visual = row.of(*self.visual) if self.statistic.takes_visual else None
        weights = selection.weights if repeats == 1 else selection.weights.repeat(repeats)
        which = selection.counted if repeats == 1 else None
        seen = visual.repeat(repeats) if visual is not None else None
        self._sum_up(key, _Counted(inputs, _scaled(weights, row.weight), which, site.dense, seen), order)
        if selection.candidates is not None and len(selection.candidates):
            chosen = selection.candidates

            def of_candidates(values: Tensor) -> Tensor:
                """Candidate by candidate, the streams of each together."""
                return values.unflatten(0, (repeats, -1))[:, chosen].transpose(0, 1).flatten(0, 1)

            dense = None if site.dense is None else of_candidates(site.dense)
            seen = None if seen is None else of_candidates(seen)
            held = _Counted(of_candidates(inputs), _scaled(_all(inputs), row.weight), slice(None), dense, seen)
            self._held.append((key, order, held, repeats))

    def _fresh(self, channels: int, device: torch.device) -> Statistic:
        statistic = self.statistic(channels, device)
        checked_sums(statistic, channels)
        return statistic

    def _add_routed(self, sample: Activations, selection: Selection | None, order: int) -> None:
        """Add what routed experts were fed; a token counts for the experts that it was sent to."""
        ranks: Tensor | None = None
        for routed in sample.routed_inputs():
            if routed.name not in self._wanted:
                continue
            assert selection is not None, "pools that choose for each Linear are refused for experts"
            name, inputs = routed.name, routed.inputs
            self._site_of[name] = name
            if name not in self._statistics:
                self._statistics[name] = self._fresh(inputs.shape[1], inputs.device)
                self._routed_tokens[name] = torch.zeros((), dtype=torch.float64, device=inputs.device)
            weights = selection.weights[routed.tokens]
            seen = sample.row.of(*self.visual)[routed.tokens] if self.statistic.takes_visual else None
            self._sum_up(name, _Counted(inputs, _scaled(weights, sample.row.weight), visual=seen), order)
            self._routed_tokens[name] += (weights > 0).sum()
            if selection.candidates is None or not len(selection.candidates):
                continue
            if ranks is None:
                ranks = torch.full_like(selection.weights, len(selection.weights), dtype=torch.int64)
                ranks[selection.candidates] = torch.arange(len(selection.candidates), device=ranks.device)
            held = ranks[routed.tokens] < len(selection.candidates)
            own_ranks = ranks[routed.tokens][held]
            every = _scaled(_all(own_ranks), sample.row.weight)
            chosen = _Counted(inputs[held], every, slice(None), visual=None if seen is None else seen[held])
            self._held_routed.append((name, order, chosen, own_ranks))

    def _sum_up(self, key: str, tokens: _Counted, order: int) -> None:
        statistic = self._statistics[key]
        with only_looks(f"{name_of(statistic)}.add", inputs=tokens.inputs, weights=tokens.weights):
            statistic.add(tokens.inputs, tokens.weights, **tokens.taken_by(statistic))
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
        is_held = bool(self._held or self._held_routed)
        cutoffs = checked_cutoffs(self.pool, self.pool.cutoffs(processes.sum), len(self._samples), is_held)
        for key, order, held, repeats in self._held:
            if count := cutoffs[order] * repeats:
                self._sum_up(key, held.some(slice(count)), order)
        self._held.clear()
        for name, order, held, ranks in self._held_routed:
            chosen = held.some(ranks < cutoffs[order])
            self._sum_up(name, chosen, order)
            self._routed_tokens[name] += len(chosen.inputs)
        self._held_routed.clear()
        self._sum_over_processes(processes, devices)
        return self._found(cutoffs, processes)

    def _sum_over_processes(self, processes: Processes, devices: Mapping[str, torch.device]) -> None:
        """Make the statistics the same on all processes.

        Raises:
            RunError: A sum is NaN or infinite; names the Linears and the sample.
        """
        known = {key: len(statistic.tensors()[0]) for key, statistic in self._statistics.items()}
        for others, site_of in processes.gather((known, self._site_of)):
            self._site_of.update(site_of)
            for key, channels in others.items():
                if key not in self._statistics:
                    self._statistics[key] = self._fresh(channels, devices[key])
        for name in {name for names in processes.gather(list(self._routed_tokens)) for name in names}:
            self._routed_tokens.setdefault(name, torch.zeros((), dtype=torch.float64, device=devices[name]))
        processes.sum_in_place(
            [tensor for key in sorted(self._statistics) for tensor in self._statistics[key].tensors()]
            + [self._routed_tokens[name] for name in sorted(self._routed_tokens)]
        )
        self._refuse_faults(processes)

    def _found(self, cutoffs: list[int], processes: Processes) -> dict[str, Any]:
        """What the manifest says of the tokens that count, given how many candidates of each sample do."""
        self._chosen_of = dict(zip(self._samples, cutoffs))
        self._counted, self.example = self._composition.finish(self._chosen_of, processes)
        found: dict[str, Any] = dict(self.pool.summary()) | {"pool": self._counted}
        everywhere = processes.gather(self._chosen_of)
        if any(everywhere):
            together = {sample: count for part in everywhere for sample, count in part.items()}
            found["visual_tokens"] = [together[sample] for sample in sorted(together)]
        return found

    def why_nothing(self) -> str:
        """Why nothing is known of the block after it was run; empty where it is not so, the same on all processes."""
        norms = [statistic.squared_norms() for statistic in self._statistics.values()]
        if not norms or any(norm is None or bool(norm.any()) for norm in norms):
            return ""
        zeros = "selects tokens that are 0 in every channel, in all calibration samples: look at config.json"
        return zeros if self._counted else "selects no token of any calibration sample"

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

    def let_go(self, site: str) -> None:
        """No Linear of this site is left to prune: its statistic is not needed any more."""
        norms = self._norms_of(site)
        if self.record and norms is not None:
            self._norms[site] = norms.clone()
        self._statistics.pop(site, None)

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
            if (norms := self._norms_of(self.site_of(name))) is not None:
                everything[f"scaler_row.{self.block}.{name}"] = (norms / num_samples).float().cpu()
        return everything

    def _norms_of(self, site: str) -> Tensor | None:
        """Squared norm of each channel of a site's input; None where no sample called it, or no statistic tells."""
        statistic = self._statistics.get(site)
        return self._norms.get(site) if statistic is None else statistic.squared_norms()

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
