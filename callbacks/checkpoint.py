"""The checkpoint writer: a copy of the input folder in which pruned weights are overwritten, block by block.

    on_prune_start   copy the folder; config.json is held back, so nobody can load an unfinished checkpoint
    on_block_end     overwrite the block's pruned tensors in place; flush; then say so in pruning.json
    on_prune_end     read everything again and verify; put config.json in place

After a crash at any moment the blocks that pruning.json names are completely written, and the next one is done again
from the input checkpoint.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import yaml
from safetensors.torch import load_file, save
from torch import Tensor

from lvlm_prune.blocks import ExpertMatrix, StreamedWeights
from lvlm_prune.callbacks.base import PruneCallback
from lvlm_prune.callbacks.pruning import BlockwisePruning
from lvlm_prune.evaluation.record import EVALUATION_FILES
from lvlm_prune.loop import Block
from lvlm_prune.memory.measuring import Stopwatch
from lvlm_prune.output.folder import (
    copy_checkpoint,
    is_occupied,
    lock_folder,
    make_folder,
    refuse_unusable,
    release,
    writing,
)
from lvlm_prune.output.manifest import FILE_NAME, Manifest, replace_durably
from lvlm_prune.output.names import FIGURE_FOLDER, PAGE_NAME
from lvlm_prune.output.verification import Expectation, verify_checkpoint
from lvlm_prune.plugins import describe

if TYPE_CHECKING:
    from lvlm_prune.module import LVLMModule
    from lvlm_prune.trainer import LVLMTrainer

Result = TypeVar("Result")


class SparseCheckpointWriter(PruneCallback):
    """Writes the sparse checkpoint and its manifest, verifies them, and makes the run resumable.

    A model that was handed over in memory is not written.
    """

    _lock: int | None = None

    def setup(self, trainer: "LVLMTrainer", pl_module: "LVLMModule", stage: str) -> None:  # type: ignore[override]
        """Refuse an output folder that cannot be written, before anything is done.

        Raises:
            InputError: The folder exists and is not empty, lies in the input, cannot be written or has no room; or it
                is to be resumed, and was begun from other shards.
        """
        folder = trainer.output_folder
        if stage != "prune" or folder is None:
            return
        assert pl_module.folder is not None
        refuse_unusable(folder, pl_module.folder.path, FILE_NAME, trainer.resume_run, copies=not trainer.plan_run)
        resumes = trainer.resume_run and is_occupied(folder, FILE_NAME)
        if resumes and Manifest.read(folder).get("status") == "pruning":
            pl_module.folder.refuse_other_layout(folder)

    def teardown(self, trainer: "LVLMTrainer", pl_module: "LVLMModule", stage: str) -> None:  # type: ignore[override]
        """Let other runs into the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def on_prune_start(self, trainer: "LVLMTrainer", pl_module: "LVLMModule") -> None:
        """Copy the input folder, or find out where an unfinished run stands."""
        folder = trainer.output_folder
        trainer.manifest.setdefault("blocks", [])
        trainer.manifest.setdefault("linears", {})
        if folder is None:
            return
        started = _on_main(trainer, folder, lambda: self._start(trainer, pl_module, folder))
        for key in ("status", "blocks", "linears"):
            trainer.manifest[key] = started[key]
        if "survey" in started:
            trainer.manifest["survey"] = started["survey"]

    def _start(self, trainer: "LVLMTrainer", pl_module: "LVLMModule", folder: Path) -> Manifest:
        assert pl_module.folder is not None
        manifest = trainer.manifest
        make_folder(folder)
        self._lock = lock_folder(folder)
        if (folder / FILE_NAME).is_file():
            started = Manifest.read(folder)
            started.refuse_other(manifest, folder)
            if started.get("status") != "copying":
                return started
        manifest["status"] = "copying"
        manifest.write(folder)
        if trainer.run_config is not None:
            replace_durably(folder / "config.yaml", yaml.safe_dump(dict(trainer.run_config), sort_keys=False).encode())
        # The input may have been pruned itself: its own records would be taken for ours.
        records = (FILE_NAME, "config.yaml", PAGE_NAME, FIGURE_FOLDER, *EVALUATION_FILES)
        copy_checkpoint(pl_module.folder.path, folder, leave_out=records)
        manifest["status"] = "pruning"
        manifest.write(folder)
        return manifest

    def on_survey_end(self, trainer: "LVLMTrainer", pl_module: "LVLMModule") -> None:
        """Keep what the survey found: an interrupted run that goes on does not survey again."""
        folder = trainer.output_folder
        if folder is not None:
            _on_main(trainer, folder, lambda: trainer.manifest.write(folder))

    def on_block_end(self, trainer: "LVLMTrainer", pl_module: "LVLMModule", block: Block) -> None:
        """Write the block's pruned weights, then the manifest that says so."""
        matrices = block.matrices()
        weights = {name: matrices[name].weight for name in block.masks}
        zeros = {f"{block.name}.{name}": one.numel() - int(one.count_nonzero()) for name, one in weights.items()}
        for name, entry in block.record.pop("linears", {}).items():
            rows, columns = entry["shape"]
            achieved = zeros.get(name, 0) / (rows * columns)
            trainer.manifest["linears"][name] = entry | {"block": block.index, "achieved": achieved}
        forwards = trainer.processes.sum(torch.tensor([block.forwards], dtype=torch.float64))
        block.record["forwards"] = int(forwards.item())
        names = {"index": block.index, "name": block.name}
        if block.target != "language":
            names["target"] = block.target
        trainer.manifest["blocks"].append(names | block.record)
        folder = trainer.output_folder
        if folder is not None:
            _on_main(trainer, folder, lambda: self._write_block(trainer, pl_module, block, folder))

    def _write_block(self, trainer: "LVLMTrainer", pl_module: "LVLMModule", block: Block, folder: Path) -> None:
        assert pl_module.folder is not None
        assert isinstance(trainer.weights, StreamedWeights)
        clock = Stopwatch()
        written = pl_module.folder.at(folder)
        for parameter, members in _by_parameter(block).items():
            pruned = pl_module.model.get_parameter(parameter).detach()
            if not block.updated.isdisjoint(members) or not trainer.weights.is_stored_as_used(parameter):
                pruned = self._in_stored_dtype(trainer, block, parameter, members)
            for key, tensor in trainer.weights.to_disk({parameter: pruned}, written).items():
                written.write(key, tensor)
        written.sync()
        if trainer.recorded:
            replace_durably(folder / _statistics_part(block.index), save(trainer.recorded))
            trainer.recorded.clear()
        trainer.manifest["blocks"][-1]["seconds"]["write"] = clock.lap()
        trainer.manifest.write(folder)

    @staticmethod
    def _in_stored_dtype(
        trainer: "LVLMTrainer", block: Block, parameter: str, members: Mapping[str, Callable[[Tensor], Tensor]]
    ) -> Tensor:
        """The new value of a parameter on the CPU, where it is stored otherwise than it is used, or weights changed."""
        assert isinstance(trainer.weights, StreamedWeights)
        matrices = block.matrices()
        if len(members) == 1 and block.updated.issuperset(members) and parameter.endswith(".weight"):
            (name,) = members
            stored = torch.empty_like(
                matrices[name].weight, device="cpu", dtype=trainer.weights.stored_dtype(parameter)
            )
        else:
            # The stored weight, not the one in compute precision: what stays must stay byte by byte.
            stored = trainer.weights.stored(parameter)
        for name, part in members.items():
            weight = part(stored)
            if name in block.updated:
                # A narrower dtype can lose the smallest weights; added to zero, none is left as -0.0.
                weight.copy_(matrices[name].weight.detach().to("cpu", weight.dtype) + 0.0)
            weight.masked_fill_(block.masks[name].cpu(), 0.0)
            if name in block.updated:
                trainer.manifest["linears"][f"{block.name}.{name}"]["pruned"] = int((weight == 0).sum())
        return stored

    def on_prune_end(self, trainer: "LVLMTrainer", pl_module: "LVLMModule") -> None:
        """Verify what was written, and only then make the folder loadable.

        Raises:
            RunError: The folder does not hold what was promised.
        """
        folder = trainer.output_folder
        if trainer.manifest.get("status") == "complete":
            if folder is not None:
                _on_main(trainer, folder, lambda: _remove_parts(folder))
            return
        if folder is None:
            self._summarise(trainer, pl_module)
            return
        trainer.manifest.update(_on_main(trainer, folder, lambda: self._finish(trainer, pl_module, folder)))
        trainer.say(_verified_line(trainer.manifest))

    def _finish(self, trainer: "LVLMTrainer", pl_module: "LVLMModule", folder: Path) -> Manifest:
        assert pl_module.folder is not None
        pruning = next(callback for callback in trainer.callbacks if isinstance(callback, BlockwisePruning))
        linears = trainer.manifest["linears"]
        expectations = {
            name: Expectation(
                entry["pruned"],
                pruning.scorer_of(entry).expected_zeros(tuple(entry["shape"]), entry["target"], pruning.pattern),
                pruning.scorer_of(entry).updates_weights,
            )
            for name, entry in linears.items()
            if "note" not in entry
        }
        assert isinstance(trainer.weights, StreamedWeights)
        written = pl_module.folder.at(folder)
        found = verify_checkpoint(pl_module.folder, written, trainer.weights, expectations, pl_module.expert_matrices())
        for name, zeros in found.pop("zeros").items():
            rows, columns = linears[name]["shape"]
            linears[name] |= {"zeros": zeros, "achieved": zeros / (rows * columns)}
        trainer.manifest["verified"] = found
        self._summarise(trainer, pl_module)
        trainer.manifest["pattern"] = str(pruning.pattern)
        trainer.manifest["updates_weights"] = pruning.scorer.updates_weights
        self._join_statistics(trainer, folder)
        release(folder)
        trainer.manifest["status"] = "complete"
        trainer.manifest.write(folder)
        _remove_parts(folder)
        return trainer.manifest

    @staticmethod
    def _summarise(trainer: "LVLMTrainer", pl_module: "LVLMModule") -> None:
        pruning = next(callback for callback in trainer.callbacks if isinstance(callback, BlockwisePruning))
        trainer.manifest["memory"]["measured"] = trainer.memory.measured()
        trainer.manifest["method"] = describe(pruning)
        found: dict[str, Any] = {
            "target": pruning.mean_target(),
            "achieved": trainer.manifest.achieved_sparsity(),
        }
        if "vision" in pl_module.targets:
            found["parts"] = {
                target: {
                    "target": pruning.sparsity_of(target),
                    "achieved": trainer.manifest.achieved_sparsity(trainer.manifest.blocks_of(target)),
                }
                for target in dict.fromkeys(part.target for part in pl_module.parts)
            }
        trainer.manifest["sparsity"] = found

    @staticmethod
    def _join_statistics(trainer: "LVLMTrainer", folder: Path) -> None:
        """One `statistics.safetensors` out of the parts that each block left."""
        parts = [folder / _statistics_part(block["index"]) for block in trainer.manifest["blocks"]]
        joined: dict[str, Tensor] = {}
        for part in parts:
            if part.is_file():
                joined.update(load_file(part))
        if joined:
            replace_durably(folder / "statistics.safetensors", save(joined))


def _verified_line(manifest: Manifest) -> str:
    target, achieved = manifest["sparsity"]["target"], manifest["sparsity"]["achieved"]
    untouched = manifest["verified"]["untouched_tensors"]
    left = sum("note" in entry for entry in manifest["linears"].values())
    note = f", {left} Linears left dense that saw too few calibration tokens, or none" if left else ""
    promised = f"target {target:.4g}, {manifest['pattern']}"
    parts = "".join(
        f", {name} {part['achieved']:.4g} (target {part['target']:g})"
        for name, part in manifest["sparsity"].get("parts", {}).items()
    )
    return f"verified: sparsity {achieved:.4g} ({promised}){parts}, {untouched} other tensors untouched{note}"


def _by_parameter(block: Block) -> dict[str, dict[str, Callable[[Tensor], Tensor]]]:
    """Path of each parameter that was pruned -> name of each matrix in it -> what takes the matrix out of it."""
    found: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {}
    matrices = block.matrices()
    for name in block.masks:
        matrix = matrices[name]
        if isinstance(matrix, ExpertMatrix):
            found.setdefault(f"{block.name}.{matrix.parameter}", {})[name] = matrix.of
        else:
            found[f"{block.name}.{name}.weight"] = {name: lambda weight: weight}
    return found


def _remove_parts(folder: Path) -> None:
    for part in folder.glob(_statistics_part("*")):
        part.unlink()


def _statistics_part(block: int | str) -> str:
    return f"statistics.{block}.part"


def _on_main(trainer: "LVLMTrainer", folder: Path, work: Callable[[], Result]) -> Result:
    """Write on the main process only.

    Raises:
        RunError: The disk is full, or cannot be written for another reason.
    """

    def written() -> Result:
        with writing(folder):
            return work()

    return trainer.processes.on_main(written)
