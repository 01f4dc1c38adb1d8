"""Blockwise pruning: pool -> statistics -> score -> mask, at each block.

on_block_start            fresh statistics, one per input site
on_calibration_batch_end  the pool selects tokens; they are added, candidates are held
on_block_calibrated       the pool says how many candidates count; score, mask, new weights
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from lvlm_prune.blocks import Target
from lvlm_prune.callbacks.base import PruneCallback
from lvlm_prune.errors import InputError
from lvlm_prune.loop import Block
from lvlm_prune.loop.activations import Activations
from lvlm_prune.methods.allocation import Allocation, UniformAllocation
from lvlm_prune.methods.contract import checked_targets
from lvlm_prune.methods.pools import AsymmetricPool, Pool
from lvlm_prune.methods.scorers import Scorer, WandaScorer
from lvlm_prune.methods.solvers import Solver
from lvlm_prune.methods.tokens import EXPERTS
from lvlm_prune.output.names import EXAMPLE
from lvlm_prune.output.summaries import readable_count
from lvlm_prune.plugins import lazy_default, mounted, own_instance, plugin_class, refuse_lost_arguments
from lvlm_prune.pruning.block import BlockPruner, refuse_broken, solver_of
from lvlm_prune.pruning.calibration import BlockCalibration
from lvlm_prune.pruning.faults import faults_end_the_run, refuse_faulty
from lvlm_prune.pruning.input_zeros import zeros_line, zeros_of_input
from lvlm_prune.pruning.lines import rare_experts_line, skipped_line
from lvlm_prune.pruning.naming import folder_label, method_name
from lvlm_prune.pruning.options import checked_pattern, checked_sparsity, refuse_modalities
from lvlm_prune.pruning.scope import find_scope, refuse_experts, refuse_samples, refuse_towers, refuse_widths
from lvlm_prune.pruning.site_calibration import SiteCalibration, sites_in_order

if TYPE_CHECKING:
    from lvlm_prune.module import LVLMModule
    from lvlm_prune.run import RunTrainer


class BlockwisePruning(PruneCallback):
    """Prunes each decoder block from the activations of its calibration samples.

    A method is a composition: pool (which tokens calibrate) x scorer (how important a weight is) x solver (mask and
    values from that, or by itself) x allocation (how much of each Linear goes) x pattern. The default composition is
    ATV-Pruning (arXiv 2603.16001).

    Args:
        sparsity: Share of each Linear's weights to prune, strictly between 0 and 1. With an N:M pattern it is given by
            the pattern, 1 - N/M; `KLAllocation` takes less, and leaves Linears dense. Default: 0.5.
        vision_sparsity: The same for the vision tower, where `model.targets` names it. Default: `sparsity`.
        pattern: `unstructured`; `N:M`, which keeps N of every M weights along a row (quote it in YAML, which reads 2:4
            as a number); or, with `KLAllocation`, several, as `3:4,2:4,1:4`, of which each Linear gets one or stays
            dense. `sparsity` is their mean then.
        pool: Which calibration tokens count.
        scorer: How important each weight is. A solver that needs no scores leaves it out.
        allocation: How much of each Linear goes.
        exclude: Name or glob pattern, or list of them, of what stays dense, as `*.down_proj`. Paths of modules, names
            of tensors as the checkpoint and `--plan` have them, or kinds as pages and logs call them (`down_proj`,
            `mlp.down_proj`, `vision fc1`); one that matches nothing is an error.
        solver: Finds masks and the values of the weights that stay. Default: the scorer's own, which takes the lowest
            scores; that of `SparseGPTScorer` updates the rest too.
        visual: Modalities that count as visual tokens: image, video, audio.
        experts: Routed experts of mixture-of-experts decoders: `prune` them, each from the tokens that were sent to it,
            or `keep` them dense.
        min_expert_tokens: An expert that fewer calibration tokens were sent to is not judged by them; what is done
            with it instead, `rare_experts` says, and the manifest and a warning name it.
        rare_experts: `magnitude` prunes such an expert by the size of its weights, `keep` leaves it dense.
        calibrate_on: `pruned`: each block is calibrated on what the pruned blocks before it give; `dense`: on what the
            dense model gives, which takes one forward of each sample and block instead of two.
        sequential: Input sites of a block one after the other: each is calibrated on what the pruned Linears before it
            in its block give, too. Each block runs a few times more, mostly in part. Default: what the solver asks for.
        record: Also write `statistics.safetensors`: channel norms, saliencies and selected tokens.
        name: Name of the method in what is printed; default: named after the composition.

    Raises:
        InputError: A value is out of range, or sparsity and pattern contradict each other.
    """

    section: ClassVar[str] = "pruning"
    """Key of the configuration under which its plugins are given."""

    def __init__(
        self,
        sparsity: float | None = None,
        pattern: str | int = "unstructured",
        pool: Pool = lazy_default(AsymmetricPool),
        scorer: Scorer = lazy_default(WandaScorer),
        allocation: Allocation = lazy_default(UniformAllocation),
        exclude: list[str] | str = [],  # noqa: B006
        visual: list[str] = ["image", "video"],  # noqa: B006
        record: bool = False,
        name: str = "",
        experts: Literal["prune", "keep"] = "prune",
        min_expert_tokens: int = 16,
        rare_experts: Literal["magnitude", "keep"] = "magnitude",
        vision_sparsity: float | None = None,
        solver: Solver | None = None,
        calibrate_on: Literal["pruned", "dense"] = "pruned",
        sequential: bool | None = None,
    ) -> None:
        pool, scorer, allocation = own_instance(pool), own_instance(scorer), own_instance(allocation)
        self.solver = None if solver is None else own_instance(solver)
        self.pattern = checked_pattern(pattern)
        self.sparsity = checked_sparsity(sparsity, self.pattern, "pruning.sparsity", allocation.chooses_levels)
        self.vision_sparsity = vision_sparsity
        if vision_sparsity is not None:
            checked_sparsity(vision_sparsity, self.pattern, "pruning.vision_sparsity")
        refuse_modalities(visual, "pruning.visual")
        if not self.pattern.mixes(self.sparsity):
            allocation = allocation.under(self.pattern)
            if self.pattern.levels and not allocation.uniform:
                name = plugin_class(allocation).__name__
                raise InputError("pruning.allocation", name, f"cannot be used with {self.pattern}")
        self.pool, self.scorer, self.allocation = pool, scorer, allocation
        with mounted(**{self.section: self}):
            self.chosen_solver = scorer.solver() if self.solver is None else self.solver.starting_from(scorer.solver())
            for level in self.pattern.levels or (self.sparsity,):
                self.chosen_solver.check(self.pattern.at(level))
        self.exclude = [exclude] if isinstance(exclude, str) else list(exclude)
        self.visual, self.record = list(visual), record
        if experts not in ("prune", "keep"):
            raise InputError("pruning.experts", experts, "must be prune or keep")
        if rare_experts not in ("magnitude", "keep"):
            raise InputError("pruning.rare_experts", rare_experts, "must be magnitude or keep")
        if min_expert_tokens < 1:
            raise InputError("pruning.min_expert_tokens", min_expert_tokens, "must be at least 1")
        self.experts, self.min_expert_tokens, self.rare_experts = experts, min_expert_tokens, rare_experts
        if calibrate_on not in ("pruned", "dense"):
            raise InputError("pruning.calibrate_on", calibrate_on, "must be pruned or dense")
        self.calibrate_on = calibrate_on
        self.sequential = self.chosen_solver.wants_sequential if sequential is None else sequential
        self._refuse_contradictions()
        self.name = name or method_name(pool, scorer, allocation, self.solver, bool(sequential))
        self.targets: dict[str, float] = {}
        self.shapes: dict[str, tuple[int, int]] = {}
        self._in_towers: Set[str] = frozenset()
        self.prunes_experts = False
        """Whether any matrix of a routed expert is among what is pruned; known after `plan`."""

    def _refuse_contradictions(self) -> None:
        """Refuse samples that would go another way than what is asked of them."""
        statistic, from_dense = self.chosen_solver.statistic, self.calibrate_on == "dense"
        if from_dense and statistic is not None and statistic.takes_dense:
            problem = "makes up for what pruning did to a Linear's input; needs --pruning.calibrate_on pruned"
            raise InputError(self._solver_path, plugin_class(self.chosen_solver).__name__, problem)
        if self.sequential and (from_dense or statistic is None):
            same = "needs --pruning.calibrate_on pruned: what the dense model gives a site does not change"
            problem = same if from_dense else "needs a method that looks at calibration samples"
            raise InputError("pruning.sequential", True, problem)

    @property
    def wants_activations(self) -> bool:  # type: ignore[override]
        """True where the solver needs statistics; magnitude runs without any data."""
        return self.chosen_solver.statistic is not None

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What the pool looks at besides block inputs and outputs, and what experts are fed where they are pruned."""
        if not self.wants_activations:
            return frozenset()
        return self.pool.needs | ({EXPERTS} if self.prunes_experts else frozenset())

    def run_label(self) -> str:
        """Method and sparsity as part of a folder name, for example `asymmetric-wanda-60`."""
        return folder_label(self.name, self.sparsity, self.pattern)

    # ---- before the first block --------------------------------------------------------------------------------------
    def plan(self, pl_module: "LVLMModule") -> None:
        """Find the Linears to prune and the target of each; the weights need not be loaded.

        Raises:
            InputError: An `exclude` pattern matches nothing, everything is excluded, a width does not fit N:M, or so
                little is to go that nothing would.
        """
        scope = find_scope(pl_module, self.exclude, self.experts)
        self.shapes, self._in_towers, self.prunes_experts = scope.shapes, scope.in_towers, scope.has_experts
        pool = self.pool if self.wants_activations else None
        if "vision" in pl_module.targets:
            refuse_towers(pool, self.allocation)
        elif self.vision_sparsity is not None:
            problem = "needs --model.targets '[language, vision]'; the vision tower is not pruned"
            raise InputError("pruning.vision_sparsity", self.vision_sparsity, problem)
        if self.prunes_experts:
            refuse_experts(pool, self.allocation)
        refuse_widths(self.pattern, self.shapes)
        self._refuse_nothing()
        with mounted(**{self.section: self}):
            refuse_lost_arguments(**{self.section: self})
            refuse_faulty(scorer=self.scorer, solver=self.chosen_solver, allocation=self.allocation, pool=self.pool)
            self.allocation.use_method(self.chosen_solver, self.pattern, self.sparsity)
            self.allocation.check(self.shapes, self.sparsity)
            if not self.allocation.wants_survey:
                self.allocate()

    def _refuse_nothing(self) -> None:
        """Refuse a sparsity of which no weight goes anywhere, as counts are rounded down."""
        for name, shape in self.shapes.items():
            sparsity = self.sparsity_of("vision" if name in self._in_towers else "language")
            promised = self.chosen_solver.expected_zeros(shape, sparsity, self.pattern)
            none = promised and all(zeros.most == 0 for zeros in promised)
            if not none and sparsity * shape[0] * shape[1] >= 1:
                return
        raise InputError("pruning.sparsity", self.sparsity, "prunes nothing: less than one weight of those compared")

    @faults_end_the_run()
    def allocate(self) -> None:
        """Deal the sparsity out over the Linears; after the survey where the allocation wants one."""
        in_decoder = {name: shape for name, shape in self.shapes.items() if name not in self._in_towers}
        self.targets = dict.fromkeys(self.shapes, self.sparsity_of("vision"))
        if in_decoder:
            dealt = self.allocation.allocate(dict(in_decoder), self.sparsity)
            self.targets |= checked_targets(self.allocation, dealt, in_decoder, self.sparsity, self.pattern.levels)

    def mean_target(self) -> float:
        """Target sparsity over all weights that are pruned."""
        if self._in_towers.isdisjoint(self.shapes):
            return self.sparsity
        sizes = {name: rows * columns for name, (rows, columns) in self.shapes.items()}
        return sum(self.targets[name] * size for name, size in sizes.items()) / sum(sizes.values())

    def sparsity_of(self, target: Target) -> float:
        """Target sparsity of the decoder, or of the vision tower."""
        return self.vision_sparsity if target == "vision" and self.vision_sparsity is not None else self.sparsity

    def setup(self, trainer: "RunTrainer", pl_module: "LVLMModule", stage: str) -> None:  # type: ignore[override]
        """Find the Linears to prune before anything is written."""
        if stage == "prune":
            self.plan(pl_module)

    def headline(self, pl_module: "LVLMModule", num_samples: int) -> str:
        """What is to be done, in a line: model, blocks, Linears, method, sparsity, samples.

        Args:
            pl_module: The opened model, after :meth:`plan`.
            num_samples: Of the calibration set; not said where no statistic needs them.
        """
        weights = sum(rows * columns for rows, columns in self.shapes.values())
        blocks, share = f"{pl_module.num_blocks} blocks", f"{100 * self.sparsity:.4g}%"
        if "vision" in pl_module.targets:
            blocks += f" ({sum(map(len, pl_module.towers))} of the vision tower)"
            if self.sparsity_of("vision") != self.sparsity:
                share += f" (vision tower {100 * self.sparsity_of('vision'):.4g}%)"
        return (
            f"{pl_module.label} · {blocks} · {len(self.shapes)} Linears · "
            f"{readable_count(weights)} weights · {self.name} · {share} {self.pattern}"
            + (f" · {num_samples} samples" if self.wants_activations else "")
        )

    def line_of_zeros(self, share: float) -> str:
        """What a user is told of the share of zeros in the input; empty where there are next to none."""
        return zeros_line(share, self.mean_target(), self.chosen_solver, self._solver_path)

    def on_prune_start(self, trainer: "RunTrainer", pl_module: "LVLMModule") -> None:
        """Say what will be done; refuse a pool of visual tokens where there are none."""
        trainer.run.say(self.headline(pl_module, trainer.run.record["calibration"].get("num_samples", 0)))
        if trainer.run.folder is not None and trainer.run.processes.is_main:
            zeros = trainer.run.record["input_zeros"] = zeros_of_input(pl_module, trainer.run.weights, self.shapes)
            if line := self.line_of_zeros(zeros):
                trainer.run.say(line)
        if not self.wants_activations:
            return
        tokens = trainer.run.record["calibration"]["tokens"]
        refuse_samples(self.pool, tokens, self.visual, prunes_tower="vision" in pl_module.targets)

    # ---- at each block -----------------------------------------------------------------------------------------------
    def on_block_start(self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block) -> None:
        """Start fresh statistics, and stop at broken weights."""
        matrices = block.matrices()
        full_names = {name: f"{block.name}.{name}" for name in matrices}
        self._targets = {name: full_name for name, full_name in full_names.items() if full_name in self.targets}
        refuse_broken({full_name: matrices[name].weight for name, full_name in self._targets.items()})
        self._calibration: BlockCalibration | None = None
        if self.chosen_solver.statistic is not None:
            kind = SiteCalibration if self.sequential else BlockCalibration
            picture = None if block.target == "vision" else trainer.run.samples.picture
            example = None if picture is None else picture.sample
            statistic = self.chosen_solver.statistic
            self._calibration = kind(
                block.index, self._targets, self.pool, statistic, self.record, example, self.visual
            )

    @faults_end_the_run()
    def on_calibration_batch_end(
        self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block, sample: Activations
    ) -> None:
        """Add the tokens that the pool selects; hold its candidates."""
        if self._calibration is not None:
            tokens = sample.tokens(self.visual, self.pool.needs, asked_by=plugin_class(self.pool).__name__)
            self._calibration.add(sample, tokens)

    @faults_end_the_run()
    def on_block_calibrated(self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block) -> None:
        """Finish the statistics, then score, mask and overwrite each Linear's weight; each process does its share.

        Raises:
            InputError: The pool selects nothing.
        """
        calibration, processes = self._calibration, trainer.run.processes
        self._pruner = BlockPruner(self.chosen_solver, self.pattern, self.min_expert_tokens, self.rare_experts)
        if calibration is None:
            self._prune(trainer, block, self._targets)
            return
        if isinstance(calibration, SiteCalibration):
            found = calibration.finish_choice(processes)
            experts = [name for name in self._targets if name not in block.linears]
            block.open_sites = sites_in_order(processes.gather(block.sites), self._targets, experts)
            calibration.begin(block.open_sites[0] if block.open_sites else [])
        else:
            found = calibration.finish(processes, _devices(block))
        block.record.update(found)
        if calibration.example is not None:
            trainer.run.recorded[f"{EXAMPLE}.{block.index}"] = calibration.example
        if not block.open_sites:
            self._prune(trainer, block, self._targets)
            self._record(trainer)

    @faults_end_the_run()
    def on_site_calibration_batch_end(
        self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block, sample: Activations
    ) -> None:
        """Add the tokens that the pool chose in the first pass."""
        assert isinstance(self._calibration, SiteCalibration)
        self._calibration.add_site(sample)

    @faults_end_the_run()
    def on_site_calibrated(
        self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block, names: Sequence[str]
    ) -> None:
        """Prune the Linears of one site."""
        calibration = self._calibration
        assert isinstance(calibration, SiteCalibration)
        calibration.finish_site(trainer.run.processes, _devices(block))
        self._prune(trainer, block, names)
        if block.open_sites:
            calibration.begin(block.open_sites[0])
        else:
            self._record(trainer)

    def _prune(self, trainer: "RunTrainer", block: Block, names: Iterable[str]) -> None:
        calibration = self._calibration
        # Later blocks may be left dense one by one, which is said at the end; with the first goes the whole model.
        first = not trainer.run.record.get("linears") and not block.masks
        if calibration is not None and first and (why := calibration.why_nothing()):
            problem = f"{why}: nothing would be pruned at block {block.name}"
            raise InputError("pruning.pool", plugin_class(self.pool).__name__, problem)
        targets = {name: self.targets[self._targets[name]] for name in names}
        self._pruner.prune(block, targets, calibration, trainer.run.processes)

    def _record(self, trainer: "RunTrainer") -> None:
        """Keep what was asked for of the block's calibration, and let go of it."""
        if self.record and self._calibration is not None:
            num_samples = trainer.run.record["calibration"]["num_samples"]
            trainer.run.recorded.update(self._calibration.recorded(trainer.run.processes, num_samples))
        self._calibration = None

    @property
    def _solver_path(self) -> str:
        """The option that the solver, or the scorer that brings its own, is given by."""
        return f"{self.section}.{'scorer' if self.solver is None else 'solver'}"

    def solver_of(self, entry: Mapping[str, Any]) -> Solver:
        """What pruned a matrix, given its entry in the manifest."""
        return solver_of(entry, self.chosen_solver)

    def on_prune_end(self, trainer: "RunTrainer", pl_module: "LVLMModule") -> None:
        """Note the mean budget, and say what is worth knowing: what the solver found, what was left out."""
        budgets = [k for block in trainer.run.record.get("blocks", []) for k in block.get("visual_tokens", [])]
        if budgets:
            trainer.run.record["mean_visual_tokens"] = sum(budgets) / len(budgets)
        linears = trainer.run.record.get("linears", {})
        lines = [
            self.chosen_solver.summary({name: entry.get("solver", {}) for name, entry in linears.items()}),
            rare_experts_line(linears, self.min_expert_tokens, self.rare_experts),
            skipped_line(trainer.run.record.get("calibration", {})),
        ]
        if lines := [line for line in lines if line]:
            said = trainer.run.record.get("warnings", [])
            trainer.run.record["warnings"] = list(dict.fromkeys([*said, *lines]))
            for line in lines:
                trainer.run.say(f"warning: {line}")


def _devices(block: Block) -> dict[str, torch.device]:
    """Where each matrix is, and its statistic is to be."""
    return {name: matrix.weight.device for name, matrix in block.matrices().items()}
