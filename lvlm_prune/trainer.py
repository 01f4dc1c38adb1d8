"""The Trainer: Lightning's, with the verbs of this project beside `fit`.

Each verb is a run of its own, in `lvlm_prune/runs`; the trainer holds none of its state.
"""

from __future__ import annotations

from typing import Any, Literal

from lvlm_prune.data import CalibrationDataModule, RecoveryDataModule
from lvlm_prune.evaluation.builtin import BuiltinEngine
from lvlm_prune.evaluation.engine import Engine
from lvlm_prune.module import LVLMModule
from lvlm_prune.output.manifest import Manifest
from lvlm_prune.plugins import lazy_default, own_instance
from lvlm_prune.recovery.distillation import Distillation
from lvlm_prune.recovery.optimization import Optimization
from lvlm_prune.recovery.reconstruction import Reconstruction
from lvlm_prune.run import USUALLY_HELD_BACK, RunOptions, RunTrainer
from lvlm_prune.runs.reproduce.harness import Harness
from lvlm_prune.runs.reproduce.outcome import PartOutcome
from lvlm_prune.runs.sweep.results import FinishedRun


class LVLMTrainer(RunTrainer):
    """Lightning's Trainer with the verbs of this project."""

    def prune(
        self,
        model: LVLMModule,
        datamodule: CalibrationDataModule,
        output: str = "",
        resume: bool = False,
        evaluate: bool = True,
        report: bool = True,
        plan: bool = False,
        packed: bool = False,
        packed_size: str = "",
        held_back: int = USUALLY_HELD_BACK,
        keep: float = 0.0,
        keep_minutes: float = 0.0,
        keep_recipes: list[str] = [],  # noqa: B006
        push: str = "",
        publishable: bool | None = None,
    ) -> Manifest:
        """Prune a checkpoint block by block and write a sparse one.

        Args:
            model: The model to prune.
            datamodule: The calibration set.
            output: Folder to write, new or empty. Default: `runs/<model>-<method>-<sparsity>`. A model that is already
                in memory is pruned in place and nothing is written.
            resume: Go on with the unfinished run in `output`.
            evaluate: Measure what pruning cost: the embedded model on the embedded benchmark, others by `held_back`.
            report: Write `report.html` and its figures.
            plan: Only say what would be pruned and what memory and disk that needs; write nothing.
            held_back: Samples that do not calibrate, on which perplexity and KL against the dense model are measured at
                the end; 0 for none.
            keep: Find the highest sparsity at which this share is kept, and prune to that: the share of text tokens, on
                samples that do not calibrate, at which the most likely next token is the dense model's. Every try is
                a whole run; 0 prunes to the sparsity that is given.
            keep_minutes: With `keep`: begin no try that would end later than this; 0 for no bound.
            keep_recipes: With `keep`: recipes to try before the method itself, cheapest first; the one that gets
                sparsest is taken. `--method auto` is `--method best --keep_recipes '[fast]'`.
            packed: Pack the sparse checkpoint where it is, once it is written; as `pack` does.
            packed_size: With `packed`: prune as far as the packed shards need to take no more than this, and ignore the
                method's sparsity: a size with a unit (`4.5GB`), or a share of the dense shards (`0.6`).
            push: Repository on the hub, `owner/name`, to upload the finished folder to; what is private is left out of
                the upload.
            publishable: Keep what is private out of the folder, beside it in `OUTPUT.private`: local paths, ids of
                samples, and the picture of one. Default: unless model and data are the embedded ones.

        Returns:
            The manifest; empty after a plan.
        """
        from lvlm_prune.runs.verbs import Aim, prune

        options = RunOptions(
            resume, evaluate, report, plan, held_back=held_back, packed=packed, publishable=publishable
        )
        return prune(self, model, datamodule, output, options, Aim(keep, keep_minutes, keep_recipes, packed_size), push)

    def recover(
        self,
        model: LVLMModule,
        datamodule: RecoveryDataModule,
        output: str = "",
        resume: bool = False,
        evaluate: bool = True,
        report: bool = True,
        method: Literal["lora", "full", "blockwise"] = "lora",
        optimization: Optimization = Optimization(),  # noqa: B008  (jsonargparse shows its fields; never changed)
        dense: str = "",
        distillation: Distillation = Distillation(),  # noqa: B008
        reconstruction: Reconstruction = Reconstruction(),  # noqa: B008
        packed: bool = False,
        push: str = "",
        publishable: bool | None = None,
    ) -> Manifest:
        """Train a pruned checkpoint to give back accuracy; every pruned weight stays zero.

        Args:
            model: The pruned model. The embedded one is dense and is pruned by ATV to 70% first.
            datamodule: What to train and to validate on.
            output: Folder to write, new or empty. Default: `runs/<model>-recovered`.
            resume: Go on with the unfinished run in `output`, from its last validation.
            evaluate: Measure what recovery gave back: the embedded model on the embedded benchmark, others by
                perplexity and KL on up to 8 validation samples, where the dense model is known.
            report: Write `report.html` and its figures.
            method: Train sparse LoRA adapters on answers (`lora`, on the command line also `lora_distill`), or the
                pruned Linears themselves (`full`); or fit the adapters of each block to the dense block's outputs, one
                block in memory at a time (`blockwise`).
            optimization: Learning rate and its schedule.
            dense: Dense checkpoint, for distillation and `blockwise`. Default: the one that the pruned model's record
                names.
            distillation: How far the dense model's own answers count in the loss.
            reconstruction: How the adapters of a block are fitted.
            packed: Pack the recovered checkpoint where it is, once it is written; as `pack` does.
            push: Repository on the hub, `owner/name`, to upload the finished folder to; what is private is left out of
                the upload.
            publishable: Keep what is private out of the folder, beside it in `OUTPUT.private`: local paths, ids of
                samples, and the picture of one. Default: unless model and data are the embedded ones.

        Returns:
            The record: what was trained, on what, with what result; also `recovery.json` in the output folder.
        """
        from lvlm_prune.recovery.options import RecoveryOptions
        from lvlm_prune.runs.verbs import recover

        recovery = RecoveryOptions(method, optimization, dense, distillation, reconstruction)
        options = RunOptions(resume, evaluate, report, packed=packed, publishable=publishable)
        return recover(self, model, datamodule, recovery, output, options, push)

    def probe(
        self,
        model: LVLMModule,
        datamodule: CalibrationDataModule,
        output: str = "",
        resume: bool = False,
        evaluate: bool = True,
    ) -> Manifest:
        """Split QKV and feed-forward Linears into a text and a visual pathway, and see what pruning each one costs.

        Args:
            model: The dense model; it is not changed, and no checkpoint is written.
            datamodule: The calibration set, with text and visual tokens.
            output: Folder to write, new or empty. Default: `runs/<model>-probe`.
            resume: Go on with the unfinished probe in `output`, behind its last finished cell.
            evaluate: Score every cell of the grid on the embedded model (other models are not scored).

        Returns:
            What was found; also `probe.json` in the output folder, beside `report.html`.
        """
        from lvlm_prune.runs.probe.run import ProbeRun

        return ProbeRun(self, model, datamodule, output, resume, evaluate)()

    def sweep(
        self,
        model: LVLMModule,
        datamodule: CalibrationDataModule,
        recipes: list[str] | str = [],  # noqa: B006
        grid: dict[str, Any] = {},  # noqa: B006
        seeds: list[int] | int | None = None,
        engine: Engine = lazy_default(BuiltinEngine),
        output: str = "",
        part: str = "",
        keep: bool = False,
        across: str = "",
    ) -> list[FinishedRun]:
        """Prune with every combination of recipes, options and seeds, score each, and write one table and one figure.

        Samples are caught, and the dense model is surveyed, once for all runs on the same calibration set. The same
        command goes on where an earlier one stopped, with whatever of a changed grid is finished already.

        Args:
            model: The model to prune.
            datamodule: The calibration set.
            recipes: Names of recipes, YAML files like those in `configs/prune`, or patterns of such; their `pruning`
                key is read. Default: ATV.
            grid: Option to vary -> its values, `{pruning.sparsity: [0.5, 0.6], pruning.pool.alpha: [1, 2]}`; any option
                under `pruning` or `data`. A recipe that does not know an option runs without it.
            seeds: Calibration seeds. Default: that of `data`.
            engine: What scores the checkpoints.
            output: Folder to write, new, empty or of an earlier sweep. Default: `runs/<model>-sweep`.
            part: `1/2` does the first half of the runs; several processes can share a folder in this way, and the last
                one, or the command without `part`, writes the whole table.
            keep: Keep the pruned checkpoints, with their reports, under `checkpoints`.
            across: Option that the columns of the table and the figure's axis stand for. Default: the sparsity.

        Returns:
            The finished runs of the grid.
        """
        from lvlm_prune.runs.sweep.grid import Grid
        from lvlm_prune.runs.sweep.run import SweepRun

        points = Grid.of(recipes, grid, seeds, datamodule)
        return SweepRun(self, model, points, own_instance(engine), output, part, keep, across)()

    def reproduce(
        self,
        model: LVLMModule,
        table: str,
        output: str = "",
        part: str = "",
        seeds: list[int] | int = 0,
        calibration: dict[str, Any] = {},  # noqa: B006
        harness: Harness = Harness(),  # noqa: B008  (jsonargparse shows its fields; never changed)
        engine: Engine | None = None,
        tasks: dict[str, str] = {},  # noqa: B006
        keep: bool = False,
    ) -> list[PartOutcome]:
        """Run a table of a paper again, and set what is measured beside what was published.

        The same command goes on where an earlier one stopped.

        Args:
            model: Takes the place of the table's models; with an empty path only its other options count.
            table: Paper and table, for example `atv/table_2`; without any, the command lists them.
            output: Folder to write, new, empty or of an earlier run of the same table. Default: `runs/<table>`.
            part: `1/2` does the first half of each model's runs; several processes can share a folder in this way.
            seeds: Calibration seeds; the papers take one.
            calibration: Calibration sets in place of the papers', by their names: options of `data`.
            harness: How lmms-eval is run.
            engine: What scores checkpoints instead of lmms-eval.
            tasks: Column of the table -> task of `engine`, where one is given.
            keep: Keep the pruned checkpoints, with their reports.

        Returns:
            What came out for each model.
        """
        from lvlm_prune.runs.reproduce.run import ReproductionRun
        from lvlm_prune.runs.reproduce.tables import load_table
        from lvlm_prune.runs.sweep.grid import checked_seeds

        chosen = checked_seeds(seeds)
        run = ReproductionRun(
            self, load_table(table), model, output, part, chosen, calibration, harness, engine, tasks, keep
        )
        return run()

    def evaluate(
        self,
        model: LVLMModule,
        baseline: str = "",
        engine: Engine = lazy_default(BuiltinEngine),
        output: str = "",
    ) -> dict[str, Any]:
        """Score a checkpoint, and tell what is left of the scores of the dense one.

        Args:
            model: The checkpoint, for example a pruned one.
            baseline: Folder or hub id of the dense checkpoint. Default: none, and so no retention.
            engine: What scores checkpoints: the built-in engine, or a harness in an interpreter of its own.
            output: Folder for `evaluation.json` and `evaluation.md`, new, empty or of an earlier evaluation. Default:
                the checkpoint's own where `prune` or `recover` wrote it, so that its report shows the retention; else
                `runs/<model>-evaluation`.

        Returns:
            What was found; also `evaluation.json`.
        """
        from lvlm_prune.runs.evaluate.run import EvaluationRun

        return EvaluationRun(self, model, baseline, own_instance(engine), output)()

    @staticmethod
    def compare(folders: list[str], output: str = "") -> dict[str, Any]:
        """Hold output folders of prune and recover side by side.

        Settings that differ, sparsity per block, overlap of the kept weights, and scores where there are any.

        Args:
            folders: Two or more folders.
            output: Folder for `report.html`, `compare.json` and `compare.md`, new, empty or of an earlier comparison.
                Default: the tables are only printed.

        Returns:
            What was found; also `compare.json`.
        """
        from lvlm_prune.runs.compare.run import compare

        return compare(folders, output)

    @staticmethod
    def pack(
        model: LVLMModule,
        output: str = "",
        format: Literal["bitmask", "coded"] = "bitmask",
        resume: bool = False,
        push: str = "",
        publishable: bool | None = None,
    ) -> dict[str, Any]:
        """Store a sparse checkpoint without its zeros: smaller on disk and in memory, the same weights bit by bit.

        After `import lvlm_prune`, `from_pretrained` of transformers loads it.

        Args:
            model: The sparse checkpoint.
            output: Folder to write, new or empty. Default: `runs/<model>-packed`.
            format: `bitmask` keeps weights as they are; `coded` also stores the exponents of bfloat16 in four bits.
            resume: Go on with the unfinished run in `output`.
            push: Repository on the hub, `owner/name`, to upload the finished folder to; what is private is left out of
                the upload.
            publishable: Keep what is private out of the folder, beside it in `OUTPUT.private`: local paths, ids of
                samples, and the picture of one. Default: unless model and data are the embedded ones.

        Returns:
            What was packed, and how small it became; also `packing.json` in the output folder.
        """
        from lvlm_prune.runs.pack.run import PackRun
        from lvlm_prune.runs.publishing import Publication, carry_private

        publish = Publication(push, publishable)
        run = PackRun(model, output, format, resume, publishable=publishable)
        record = run()
        carry_private(run.source.path, run.folder)
        publish(run.folder)
        return record

    @staticmethod
    def unpack(model: LVLMModule, output: str = "", resume: bool = False) -> dict[str, Any]:
        """Give a packed checkpoint its zeros back: the files that were packed, byte for byte.

        Args:
            model: The packed checkpoint.
            output: Folder to write, new or empty. Default: `runs/<model>-unpacked`.
            resume: Go on with the unfinished run in `output`.

        Returns:
            Sizes before and after in bytes, and seconds.
        """
        from lvlm_prune.runs.pack.unpack import UnpackRun
        from lvlm_prune.runs.publishing import carry_private

        run = UnpackRun(model, output, resume)
        sizes = run()
        carry_private(run.packed.path, run.folder, quiet=False)
        return sizes
