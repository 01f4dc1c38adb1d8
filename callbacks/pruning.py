"""Blockwise pruning: pool -> statistics -> score -> mask, at each block.

on_block_start            fresh statistics, one per input site
on_calibration_batch_end  the pool selects tokens; they are added, candidates are held
on_block_calibrated       the pool says how many candidates count; score, mask, new weights
"""

import math
import re
from collections.abc import Mapping, Set
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

import torch
from jsonargparse import lazy_instance
from torch import nn

from lvlm_prune.activations import Activations
from lvlm_prune.allocation import Allocation, UniformAllocation
from lvlm_prune.blocks import ExpertMatrix, Target
from lvlm_prune.blocks.versions import VERSION_5
from lvlm_prune.calibration import BlockCalibration
from lvlm_prune.callbacks.base import PruneCallback
from lvlm_prune.effects import BlockEffects, scored_rows
from lvlm_prune.errors import InputError, RunError
from lvlm_prune.loop import Block
from lvlm_prune.measuring import Stopwatch
from lvlm_prune.patterns import Pattern, SemiStructured, parse_pattern
from lvlm_prune.plugins import own_instance, plugin_class
from lvlm_prune.pools import AsymmetricPool, Pool
from lvlm_prune.processes import Processes, deal
from lvlm_prune.saliency import DriftSaliency
from lvlm_prune.scorers import MagnitudeScorer, Scorer, WandaScorer
from lvlm_prune.statistics import Statistic
from lvlm_prune.tokens import EXPERTS

if TYPE_CHECKING:
    from lvlm_prune.module import LVLMModule
    from lvlm_prune.trainer import LVLMTrainer

DEFAULT_SPARSITY = 0.5

_BY_MAGNITUDE = MagnitudeScorer()


class BlockwisePruning(PruneCallback):
    """Prunes each decoder block from the activations of its calibration samples.

    A method is a composition: pool (which tokens calibrate) x scorer (how important a weight is) x allocation (how
    much of each Linear goes) x pattern. The default composition is ATV-Pruning (arXiv 2603.16001).

    Args:
        sparsity: Share of each Linear's weights to prune, strictly between 0 and 1. With an N:M pattern it is given by
            the pattern, 1 - N/M. Default: 0.5.
        vision_sparsity: The same for the vision tower, where `model.targets` names it. Default: `sparsity`.
        pattern: `unstructured` or `N:M` (quote it in YAML, which reads 2:4 as a number).
        pool: Which calibration tokens count.
        scorer: How important each weight is.
        allocation: How much of each Linear goes.
        exclude: Glob pattern, or list of them, on module paths that stay dense, for example `*.down_proj`. One that
            matches nothing is an error.
        visual: Modalities that count as visual tokens: image, video, audio.
        experts: Routed experts of mixture-of-experts decoders: `prune` them, each from the tokens that were sent to it,
            or `keep` them dense.
        min_expert_tokens: An expert that fewer calibration tokens were sent to is not judged by them; what is done
            with it instead, `rare_experts` says, and the manifest and a warning name it.
        rare_experts: `magnitude` prunes such an expert by the size of its weights, `keep` leaves it dense.
        record: Also write `statistics.safetensors`: channel norms, saliencies and selected tokens.
        name: Name of the method in what is printed; default: named after the composition.

    Raises:
        InputError: A value is out of range, or sparsity and pattern contradict each other.
    """

    def __init__(
        self,
        sparsity: float | None = None,
        pattern: str | int = "unstructured",
        pool: Pool = lazy_instance(AsymmetricPool),
        scorer: Scorer = lazy_instance(WandaScorer),
        allocation: Allocation = lazy_instance(UniformAllocation),
        exclude: list[str] | str = [],  # noqa: B006
        visual: list[str] = ["image", "video"],  # noqa: B006
        record: bool = False,
        name: str = "",
        experts: Literal["prune", "keep"] = "prune",
        min_expert_tokens: int = 16,
        rare_experts: Literal["magnitude", "keep"] = "magnitude",
        vision_sparsity: float | None = None,
    ) -> None:
        pool, scorer, allocation = own_instance(pool), own_instance(scorer), own_instance(allocation)
        self.pattern = _checked_pattern(pattern)
        self.sparsity = _checked_sparsity(sparsity, self.pattern, "pruning.sparsity")
        self.vision_sparsity = vision_sparsity
        if vision_sparsity is not None:
            _checked_sparsity(vision_sparsity, self.pattern, "pruning.vision_sparsity")
        for modality in visual:
            if modality not in ("image", "video", "audio"):
                raise InputError("pruning.visual", modality, "must be one of `image`, `video`, `audio`")
        if isinstance(self.pattern, SemiStructured) and not allocation.uniform:
            raise InputError(
                "pruning.allocation", plugin_class(allocation).__name__, f"cannot be used with {self.pattern}"
            )
        scorer.check(self.pattern)
        self.pool, self.scorer, self.allocation = pool, scorer, allocation
        self.exclude = [exclude] if isinstance(exclude, str) else list(exclude)
        self.visual, self.record = list(visual), record
        if experts not in ("prune", "keep"):
            raise InputError("pruning.experts", experts, "must be prune or keep")
        if rare_experts not in ("magnitude", "keep"):
            raise InputError("pruning.rare_experts", rare_experts, "must be magnitude or keep")
        if min_expert_tokens < 1:
            raise InputError("pruning.min_expert_tokens", min_expert_tokens, "must be at least 1")
        self.experts, self.min_expert_tokens, self.rare_experts = experts, min_expert_tokens, rare_experts
        self.name = name or _composition(pool, scorer, allocation)
        self.targets: dict[str, float] = {}
        self.shapes: dict[str, tuple[int, int]] = {}
        self._in_towers: Set[str] = frozenset()
        self.prunes_experts = False
        """Whether any matrix of a routed expert is among what is pruned; known after `plan`."""

    @property
    def wants_activations(self) -> bool:  # type: ignore[override]
        """True where the scorer needs statistics; magnitude runs without any data."""
        return self.scorer.statistic is not None

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What the pool looks at besides block inputs and outputs, and what experts are fed where they are pruned."""
        if not self.wants_activations:
            return frozenset()
        return self.pool.needs | ({EXPERTS} if self.prunes_experts else frozenset())

    def run_label(self) -> str:
        """Method and sparsity as part of a folder name, for example `asymmetric-wanda-60`."""
        method = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        if isinstance(self.pattern, SemiStructured):
            return f"{method}-{self.pattern.keep}of{self.pattern.group_size}"
        return f"{method}-{100 * self.sparsity:g}"

    # ---- before the first block --------------------------------------------------------------------------------------
    def plan(self, pl_module: "LVLMModule") -> None:
        """Find the Linears to prune and the target of each; the weights need not be loaded.

        Raises:
            InputError: An `exclude` pattern matches nothing, everything is excluded, or a width does not fit N:M.
        """
        towers = pl_module.tower_linears()
        matrices: dict[str, nn.Linear | ExpertMatrix] = {}
        experts: dict[str, ExpertMatrix] = {}
        if "language" in pl_module.targets:
            matrices |= pl_module.linears()
            experts = pl_module.expert_matrices()
            if self.experts == "prune" and not VERSION_5 and _has_experts(pl_module):
                problem = "transformers 4 computes routed experts in its own ways; use keep, or transformers 5"
                raise InputError("pruning.experts", self.experts, problem)
        if self.experts == "keep":
            matrices = {name: linear for name, linear in matrices.items() if not _is_of_routed_expert(name)}
            experts = {}
        everything = {**towers, **matrices, **experts}
        shapes = {name: (matrix.out_features, matrix.in_features) for name, matrix in everything.items()}
        for pattern in self.exclude:
            if not any(_matches(name, pattern) for name in shapes):
                raise InputError("pruning.exclude", pattern, "matches no Linear of the blocks that are pruned")
        self.shapes = {
            name: shape
            for name, shape in shapes.items()
            if not any(_matches(name, pattern) for pattern in self.exclude)
        }
        if not self.shapes:
            raise InputError("pruning.exclude", self.exclude, "leaves nothing to prune")
        self._in_towers = towers.keys()
        if "vision" in pl_module.targets:
            self._refuse_undefined_for_towers()
        elif self.vision_sparsity is not None:
            problem = "needs --model.targets '[language, vision]'; the vision tower is not pruned"
            raise InputError("pruning.vision_sparsity", self.vision_sparsity, problem)
        self.prunes_experts = not experts.keys().isdisjoint(self.shapes)
        if self.prunes_experts:
            self._refuse_undefined_for_experts()
        if isinstance(self.pattern, SemiStructured):
            for name, (_, width) in self.shapes.items():
                if width % self.pattern.group_size:
                    problem = f"the {width} input columns of {name} are not divisible by {self.pattern.group_size}"
                    raise InputError("pruning.pattern", self.pattern, problem)
        self.allocation.check(self.shapes, self.sparsity)
        if not self.allocation.wants_survey:
            self.allocate()

    def _refuse_undefined_for_towers(self) -> None:
        """In a vision tower every token is visual, and an allocation deals out over the decoder."""
        way_out = "`--model.targets '[vision]'` prunes the tower in a run of its own, with another method"
        if self.wants_activations and not self.pool.in_towers:
            problem = f"is not defined for the vision tower, where every token is visual; {way_out}"
            raise InputError("pruning.pool", plugin_class(self.pool).__name__, problem)
        if not self.allocation.uniform:
            problem = f"is not defined for the vision tower; {way_out}"
            raise InputError("pruning.allocation", plugin_class(self.allocation).__name__, problem)

    def _refuse_undefined_for_experts(self) -> None:
        """Some methods look at what every Linear makes of every token; an expert sees only the tokens sent to it."""
        option = None
        if self.allocation.wants_survey:
            option = f"--pruning.allocation {plugin_class(self.allocation).__name__}"
        elif self.wants_activations and self.pool.per_linear:
            option = f"--pruning.pool {plugin_class(self.pool).__name__}"
        if option is not None:
            problem = f"{option} is not defined for routed experts; use --pruning.experts keep"
            raise InputError("pruning.experts", self.experts, problem)

    def allocate(self) -> None:
        """Deal the sparsity out over the Linears; after the survey where the allocation wants one."""
        in_decoder = {name: shape for name, shape in self.shapes.items() if name not in self._in_towers}
        self.targets = dict.fromkeys(self.shapes, self.sparsity_of("vision"))
        self.targets |= self.allocation.allocate(in_decoder, self.sparsity) if in_decoder else {}

    def mean_target(self) -> float:
        """Target sparsity over all weights that are pruned."""
        if self._in_towers.isdisjoint(self.shapes):
            return self.sparsity
        sizes = {name: rows * columns for name, (rows, columns) in self.shapes.items()}
        return sum(self.targets[name] * size for name, size in sizes.items()) / sum(sizes.values())

    def sparsity_of(self, target: Target) -> float:
        """Target sparsity of the decoder, or of the vision tower."""
        return self.vision_sparsity if target == "vision" and self.vision_sparsity is not None else self.sparsity

    def setup(self, trainer: "LVLMTrainer", pl_module: "LVLMModule", stage: str) -> None:  # type: ignore[override]
        """Find the Linears to prune before anything is written."""
        if stage == "prune":
            self.plan(pl_module)

    def on_prune_start(self, trainer: "LVLMTrainer", pl_module: "LVLMModule") -> None:
        """Say what will be done; refuse a pool of visual tokens where there are none."""
        weights = sum(rows * columns for rows, columns in self.shapes.values())
        blocks, share = f"{pl_module.num_blocks} blocks", f"{100 * self.sparsity:.4g}%"
        if "vision" in pl_module.targets:
            blocks += f" ({sum(map(len, pl_module.towers))} of the vision tower)"
            if self.sparsity_of("vision") != self.sparsity:
                share += f" (vision tower {100 * self.sparsity_of('vision'):.4g}%)"
        trainer.say(
            f"{pl_module.label} · {blocks} · {len(self.shapes)} Linears · "
            f"{_readable(weights)} weights · {self.name} · {share} {self.pattern}"
            + (f" · {trainer.manifest['calibration']['num_samples']} samples" if self.wants_activations else "")
        )
        if not self.wants_activations:
            return
        tokens = trainer.manifest["calibration"]["tokens"]
        if self.pool.needs_visual and not any(tokens.get(name) for name in self.visual):
            problem = "needs visual tokens, and no calibration sample has any"
            raise InputError("pruning.pool", plugin_class(self.pool).__name__, problem)
        if "vision" in pl_module.targets and not (tokens.get("image") or tokens.get("video")):
            problem = "no calibration sample has an image or a video"
            raise InputError("model.targets", "vision", problem)

    # ---- at each block -----------------------------------------------------------------------------------------------
    def on_block_start(self, trainer: "LVLMTrainer", pl_module: "LVLMModule", block: Block) -> None:
        """Start fresh statistics, and stop at broken weights."""
        matrices = block.matrices()
        full_names = {name: f"{block.name}.{name}" for name in matrices}
        self._targets = {name: full_name for name, full_name in full_names.items() if full_name in self.targets}
        for name, full_name in self._targets.items():
            if not torch.isfinite(torch.stack(matrices[name].weight.aminmax())).all():
                raise RunError(f"NaN or infinity in the weight of {full_name}")
        self._calibration: BlockCalibration | None = None
        if self.scorer.statistic is not None:
            self._calibration = BlockCalibration(
                block.index,
                self._targets,
                self.pool,
                self.scorer.statistic,
                self.record,
                example=None if trainer.picture is None or block.target == "vision" else trainer.picture.sample,
            )

    def on_calibration_batch_end(
        self, trainer: "LVLMTrainer", pl_module: "LVLMModule", block: Block, sample: Activations
    ) -> None:
        """Add the tokens that the pool selects; hold its candidates."""
        if self._calibration is not None:
            tokens = sample.tokens(self.visual, self.pool.needs, asked_by=plugin_class(self.pool).__name__)
            self._calibration.add(sample, tokens)

    def on_block_calibrated(self, trainer: "LVLMTrainer", pl_module: "LVLMModule", block: Block) -> None:
        """Finish the statistics, then score, mask and overwrite each Linear's weight; each process does its share."""
        calibration, matrices = self._calibration, block.matrices()
        if calibration is not None:
            devices = {name: matrix.weight.device for name, matrix in matrices.items()}
            block.record.update(calibration.finish(trainer.processes, devices))
        linears: dict[str, dict[str, Any]] = {}
        effects = BlockEffects()
        owners = self._deal(calibration, matrices, trainer.processes.count)
        for name, full_name in self._targets.items():
            weight = matrices[name].weight
            statistic = None if calibration is None else calibration.statistic_of(name)
            entry = linears[full_name] = {"shape": list(weight.shape), "target": self.targets[full_name]}
            if calibration is not None:
                entry |= self._lack_of_tokens(calibration, name, statistic, isinstance(matrices[name], ExpertMatrix))
            if "note" in entry:
                del owners[name]
            elif owners[name] == trainer.processes.rank:
                scorer, clock = self.scorer_of(entry), Stopwatch()
                pruned, block.masks[name] = scorer.prune(weight, statistic, self.targets[full_name], self.pattern)
                if scorer.updates_weights:
                    block.solve_seconds += clock.lap()
                    if not torch.isfinite(pruned).all():
                        raise RunError(f"NaN or infinity in the updated weight of {full_name}")
                if scorer is self.scorer and entry["target"] > 0:
                    rows = scored_rows(weight)
                    in_part = scorer.by_row and scorer.group == "row"
                    score = scorer.score(weight[rows], statistic) if in_part else scorer.score(weight, statistic)[rows]
                    effects.add(full_name, weight, pruned, block.masks[name], statistic, score)
                weight.data.copy_(pruned)
                del pruned  # not to be held while the next one is made
                if notes := scorer.notes(statistic, block.masks[name], self.targets[full_name]):
                    entry["scorer"] = notes
            else:
                block.masks[name] = torch.empty_like(weight, dtype=torch.bool)
        self._exchange(block, owners, linears, trainer.processes)
        for name in owners:
            entry = linears[f"{block.name}.{name}"]
            entry["pruned"] = int(block.masks[name].count_nonzero())
            if self.scorer_of(entry).updates_weights:
                block.updated.add(name)
        if trainer.processes.count > 1:
            effects = BlockEffects.of_all(trainer.processes.gather(effects.on_cpu()))
        for full_name, error in effects.errors().items():
            linears[full_name]["error"] = error
        if (scores := effects.scores()) is not None:
            block.record["scores"] = scores
        block.record["linears"] = linears
        if self.record and calibration is not None:
            num_samples = trainer.manifest["calibration"]["num_samples"]
            trainer.recorded.update(calibration.recorded(trainer.processes, num_samples))
        self._calibration = None

    def _lack_of_tokens(
        self, calibration: BlockCalibration, name: str, statistic: Statistic | None, is_expert: bool
    ) -> dict[str, Any]:
        """What the manifest says of a matrix that saw too few tokens; with a `note` it stays dense."""
        if not is_expert:
            return {"target": 0.0, "note": "saw no calibration token"} if _saw_nothing(statistic) else {}
        routed = calibration.routed_tokens(name)
        if routed >= self.min_expert_tokens and not _saw_nothing(statistic):
            return {}
        if self.rare_experts == "keep":
            note = "too few calibration tokens were sent to this expert"
            return {"target": 0.0, "routed_tokens": routed, "note": note}
        return {"routed_tokens": routed, "scored_by": "magnitude"}

    def _deal(self, calibration: BlockCalibration | None, matrices: Mapping[str, Any], count: int) -> dict[str, int]:
        """Name of each Linear -> rank of the process that prunes it; Linears of one statistic stay together."""
        shares: dict[str, list[str]] = {}
        for name in self._targets:
            shares.setdefault(name if calibration is None else calibration.site_of(name), []).append(name)
        costs = {}
        for share, names in shares.items():
            weights = [matrices[name].weight for name in names]
            costs[share] = self.scorer.cost(sum(len(weight) for weight in weights), weights[0].shape[1])
        owners = deal(costs, count)
        return {name: owners[share] for share, names in shares.items() for name in names}

    def _exchange(
        self, block: Block, owners: Mapping[str, int], linears: dict[str, dict[str, Any]], processes: Processes
    ) -> None:
        """Give every process what the others pruned."""
        if processes.count == 1:
            return
        matrices = block.matrices()
        for rank in range(processes.count):
            names = [name for name, owner in owners.items() if owner == rank]
            processes.copy_from(rank, [block.masks[name] for name in names])
            if self.scorer.updates_weights:
                processes.copy_from(rank, [matrices[name].weight.data for name in names])
            elif rank != processes.rank:
                for name in names:
                    matrices[name].weight.data.masked_fill_(block.masks[name], 0.0)
        notes = {name: entry["scorer"] for name, entry in linears.items() if "scorer" in entry}
        for name, note in (item for part in processes.gather(notes) for item in part.items()):
            linears[name]["scorer"] = note

    def scorer_of(self, entry: Mapping[str, Any]) -> Scorer:
        """What scored a matrix, given its entry in the manifest."""
        return _BY_MAGNITUDE if entry.get("scored_by") == "magnitude" else self.scorer

    def on_prune_end(self, trainer: "LVLMTrainer", pl_module: "LVLMModule") -> None:
        """Note the mean budget, and say what is worth knowing: what the scorer found, what was left out."""
        budgets = [k for block in trainer.manifest.get("blocks", []) for k in block.get("visual_tokens", [])]
        if budgets:
            trainer.manifest["mean_visual_tokens"] = sum(budgets) / len(budgets)
        linears = trainer.manifest.get("linears", {})
        lines = [
            self.scorer.summary({name: entry.get("scorer", {}) for name, entry in linears.items()}),
            self._rare_experts_line(linears),
            _skipped_line(trainer.manifest.get("calibration", {})),
        ]
        if lines := [line for line in lines if line]:
            trainer.manifest["warnings"] = lines
            for line in lines:
                trainer.say(f"warning: {line}")

    def _rare_experts_line(self, linears: Mapping[str, Mapping[str, Any]]) -> str:
        rare = [name for name, entry in linears.items() if "routed_tokens" in entry]
        if not rare:
            return ""
        done = "left dense" if self.rare_experts == "keep" else "pruned by magnitude"
        few = f"fewer than {self.min_expert_tokens} calibration tokens"
        return f"{len(rare)} matrices of experts that {few} were sent to were {done} (the first is {rare[0]})"


def _skipped_line(calibration: Mapping[str, Any]) -> str:
    skipped = calibration.get("skipped", [])
    if not skipped:
        return ""
    name, reason = skipped[0]
    count, total = len(skipped), len(skipped) + calibration["num_samples"]
    return f"{count} of {total} calibration samples could not be read and were left out (the first is {name}: {reason})"


def _saw_nothing(statistic: Statistic | None) -> bool:
    """Whether no token of the pool reached the Linear, or only zeros: then nothing is known about its weights."""
    if statistic is None:
        return True
    norms = statistic.squared_norms()
    return norms is not None and not bool(norms.any())


def _composition(pool: Pool, scorer: Scorer, allocation: Allocation) -> str:
    """Name of a method after its parts, for example `mixed Wanda`; ATV where the parts are those of the paper."""
    if (
        type(pool) is AsymmetricPool
        and type(pool.saliency) is DriftSaliency
        and (pool.k, pool.text_retention) == (None, 1.0)
        and type(scorer) is WandaScorer
        and not scorer.variant
        and allocation.uniform
    ):
        return "ATV"
    words = [plugin_class(scorer).__name__.removesuffix("Scorer")]
    if scorer.statistic is not None:
        pool_name = plugin_class(pool).__name__.removesuffix("Pool")
        words.insert(0, re.sub(r"(?<=[a-z])(?=[A-Z])", "-", pool_name).lower())
    if not allocation.uniform:
        words.append("+ " + plugin_class(allocation).__name__.removesuffix("Allocation"))
    return " ".join(words)


def _checked_pattern(pattern: str | int) -> Pattern:
    if not isinstance(pattern, str):
        minutes, seconds = divmod(int(pattern), 60)
        hint = f'YAML reads an unquoted {minutes}:{seconds} as this number; write pattern: "{minutes}:{seconds}"'
        raise InputError("pruning.pattern", pattern, hint)
    try:
        return parse_pattern(pattern)
    except ValueError as error:
        raise InputError("pruning.pattern", pattern, str(error)) from None


def _checked_sparsity(sparsity: float | None, pattern: Pattern, option: str) -> float:
    if isinstance(pattern, SemiStructured):
        if sparsity is not None and not math.isclose(sparsity, pattern.sparsity):
            problem = f"contradicts pattern {pattern}, whose sparsity is {pattern.sparsity:g}"
            raise InputError(option, sparsity, problem)
        return pattern.sparsity
    sparsity = DEFAULT_SPARSITY if sparsity is None else sparsity
    if not 0 < sparsity < 1:
        raise InputError(option, sparsity, "must lie strictly between 0 and 1")
    return sparsity


def _readable(count: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.1f} {letter}"
    return str(count)


def _has_experts(pl_module: "LVLMModule") -> bool:
    blocks = map(pl_module.runner.block, range(len(pl_module.runner)))
    return any("experts" in name.split(".") for block in blocks for name, _ in block.named_parameters())


def _is_of_routed_expert(name: str) -> bool:
    """Whether a Linear belongs to one of several experts, where a model keeps each expert as a module of its own.

    Example:
        >>> _is_of_routed_expert("layers.0.mlp.experts.3.up_proj"), _is_of_routed_expert("layers.0.shared_experts.up")
        (True, False)
    """
    return re.search(r"\.experts\.\d+\.", name) is not None


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern)
