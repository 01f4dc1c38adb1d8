"""The report: one self-contained page about a run, from the manifest alone."""

import time
from typing import TYPE_CHECKING

from lvlm_prune.callbacks.base import PruneCallback
from lvlm_prune.callbacks.pruning import BlockwisePruning
from lvlm_prune.demo import NAMES
from lvlm_prune.memory.measuring import peak_memory
from lvlm_prune.methods.solvers import ALPSSolver
from lvlm_prune.output.base_record import name_of_input, record_of, was_pruned_before
from lvlm_prune.output.folder import writing
from lvlm_prune.output.names import FIGURE_FOLDER, PAGE_NAME, PICTURE_NAME, PRUNING_RECORD, STATISTICS_NAME
from lvlm_prune.output.summaries import next_commands, quality_line
from lvlm_prune.output.units import readable_size
from lvlm_prune.plugins import describe
from lvlm_prune.report.card_checks import card_follows

if TYPE_CHECKING:
    from lvlm_prune.module import LVLMModule
    from lvlm_prune.run import Run, RunTrainer


class PruningReport(PruneCallback):
    """Writes `report.html` beside the checkpoint, its figures as PNG into `report/`, and says where everything is.

    The model card is written once more, with scores where there are any by now.
    """

    def on_prune_start(self, trainer: "RunTrainer", pl_module: "LVLMModule") -> None:
        """Keep the picture of one calibration sample, over which selected tokens will be drawn."""
        pruning = trainer.run.find(BlockwisePruning)
        if pruning is not None and pruning.chosen_solver.statistic is not None:
            trainer.run.record["reconstruction"] = pruning.chosen_solver.statistic.energy
        folder, picture = trainer.run.folder, trainer.run.samples.picture
        if picture is None:
            return
        trainer.run.record["picture"] = {"sample": picture.sample, "grid": list(picture.grid)}
        if folder is not None and trainer.run.options.report and trainer.run.processes.is_main:
            (folder / FIGURE_FOLDER).mkdir(exist_ok=True)
            picture.image.save(folder / FIGURE_FOLDER / PICTURE_NAME)

    def on_prune_end(self, trainer: "RunTrainer", pl_module: "LVLMModule") -> None:
        """Render the manifest."""
        folder = trainer.run.folder
        if folder is None or not trainer.run.processes.is_main:
            return
        with writing(folder):
            weights = (path for path in folder.glob("*.safetensors") if path.name != STATISTICS_NAME)
            with card_follows(folder):
                trainer.run.record["size_bytes"] = sum(path.stat().st_size for path in weights)
                trainer.run.record.write(folder)
            if trainer.run.options.report:
                # Matplotlib takes its time to load; who wants no page does not wait for it.
                from lvlm_prune.report.page import read_from, write_page
                from lvlm_prune.report.pruning import pruning_page

                with read_from(folder, PRUNING_RECORD, trainer.run.options.resume):
                    drawn = pruning_page(trainer.run.record, folder, lambda: self._take_stock(trainer.run))
                write_page(folder, *drawn)
            else:
                self._take_stock(trainer.run)
            trainer.run.record.write(folder)
        size, seconds = trainer.run.record["size_bytes"], trainer.run.record["seconds"]
        if "quality" in trainer.run.record:
            trainer.run.say(quality_line(trainer.run.record["quality"], name_of_input(trainer.run.record)))
        page = f"{PAGE_NAME} · " if trainer.run.options.report else ""
        trainer.run.say(f"wrote {folder} (weights {readable_size(size)}) · {page}{PRUNING_RECORD} · {seconds:.0f} s")
        if trainer.owns_process and self._knows_better(trainer.run, pl_module):
            trainer.run.say("`--method best` keeps more at the same sparsity, and takes longer")
        if trainer.owns_process and pl_module.path not in NAMES and not trainer.run.options.packed:
            assert pl_module.folder is not None
            # What the input was pruned from itself, where it says so: retention is of that.
            earlier = record_of(pl_module.folder.path).get("dense") or {}
            dense = earlier.get("path") or pl_module.path
            trainer.run.say(next_commands(folder, dense, describe(trainer.run.config)))

    @staticmethod
    def _knows_better(run: "Run", pl_module: "LVLMModule") -> bool:
        """Whether the recipe `best` takes what was pruned, and would keep more of it."""
        pruning = run.find(BlockwisePruning)
        if pruning is None or isinstance(pruning.chosen_solver.innermost, ALPSSolver):
            return False
        takes_it = "vision" not in pl_module.targets and not pruning.prunes_experts
        return takes_it and not was_pruned_before(run.record)

    @staticmethod
    def _take_stock(run: "Run") -> None:
        """Note what the whole command took; a run that only looked again keeps what is noted."""
        if not run.was_complete:
            run.record["seconds"] = time.perf_counter() - run.began
            run.record["peak_memory_bytes"] = peak_memory(run.hardware.device)
