"""The checkpoint writer: a copy of the input folder in which pruned weights are overwritten, block by block.

    on_prune_start   copy the folder; config.json is held back, so nobody can load an unfinished checkpoint
    on_block_end     overwrite the block's pruned tensors in place; flush; then say so in pruning.json
    on_prune_end     read everything again and verify; put config.json in place

After a crash at any moment the blocks that pruning.json names are completely written, and the next one is done again
from the input checkpoint.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from lvlm_prune import __version__
from lvlm_prune.blocks import ExpertMatrix, StreamedWeights
from lvlm_prune.callbacks.base import PruneCallback
from lvlm_prune.callbacks.pruning import BlockwisePruning
from lvlm_prune.errors import InputError
from lvlm_prune.loop import Block
from lvlm_prune.memory.measuring import Stopwatch
from lvlm_prune.methods.masking import zero_
from lvlm_prune.output.folder import (
    copy_checkpoint,
    is_occupied,
    only_said,
    refuse_unusable,
    release,
    said_of_copies,
    write_config,
    writing,
)
from lvlm_prune.output.locking import claim
from lvlm_prune.output.manifest import Manifest, replace_durably
from lvlm_prune.output.names import PRUNING_RECORD, RUN_FILES, STATISTICS_NAME
from lvlm_prune.output.own_files import record_of_content, records_of, refuse_changed
from lvlm_prune.output.private import keeps_private
from lvlm_prune.output.records import FileRecord
from lvlm_prune.output.units import readable_percent
from lvlm_prune.output.verification import Expectation, refuse_other_findings, verify_checkpoint
from lvlm_prune.plugins import describe
from lvlm_prune.report.card import read_card, write_card
from lvlm_prune.report.card_checks import verify_card

if TYPE_CHECKING:
    from lvlm_prune.module import LVLMModule
    from lvlm_prune.run import RunTrainer

Result = TypeVar("Result")


class SparseCheckpointWriter(PruneCallback):
    """Writes the sparse checkpoint and its manifest, verifies them, and makes the run resumable.

    A model that was handed over in memory is not written.
    """

    def setup(self, trainer: "RunTrainer", pl_module: "LVLMModule", stage: str) -> None:  # type: ignore[override]
        """Refuse an output folder that cannot be written, before anything is done.

        Raises:
            InputError: The folder exists and is not empty, lies in the input, cannot be written or has no room; or it
                is to be resumed, and was begun from other shards.
        """
        folder = trainer.run.folder
        if stage != "prune" or folder is None:
            return
        assert pl_module.folder is not None
        options = trainer.run.options
        origin = {"model": {"path": pl_module.path}, "config": describe(trainer.run.config)}
        with only_said(options.plan, trainer.run.say):
            refuse_unusable(
                folder,
                pl_module.folder,
                PRUNING_RECORD,
                options.resume,
                copies=not options.plan,
                private=keeps_private(options.publishable, origin),
            )
        resumes = options.resume and is_occupied(folder, PRUNING_RECORD)
        if resumes and Manifest.read(folder).get("status") == "pruning":
            pl_module.folder.refuse_other_layout(folder)

    def on_prune_start(self, trainer: "RunTrainer", pl_module: "LVLMModule") -> None:
        """Copy the input folder, or find out where an unfinished run stands."""
        folder = trainer.run.folder
        trainer.run.record.setdefault("blocks", [])
        trainer.run.record.setdefault("linears", {})
        if folder is None:
            return
        started = _on_main(trainer, folder, lambda: self._start(trainer, pl_module, folder))
        for key in ("status", "blocks", "linears"):
            trainer.run.record[key] = started[key]
        trainer.run.record["files"] = started.get("files", {})
        assert pl_module.folder is not None
        if line := said_of_copies(pl_module.folder):
            trainer.run.say(line)
        if isinstance(trainer.run.weights, StreamedWeights) and (left := trainer.run.weights.keys_of_quantization()):
            trainer.run.say(
                f"warning: {len(left)} tensors that no model loads are those of quantization (the first is {left[0]}); "
                "if the weights beside them need them, begin with the original ones"
            )
        if isinstance(trainer.run.weights, StreamedWeights) and (beyond := trainer.run.weights.keys_beyond()):
            trainer.run.say(
                f"warning: {len(beyond)} tensors look like those of blocks, and config.json counts no block that they "
                f"are of; they stay as they are (the first is {beyond[0]})"
            )
        for key in ("survey", "surveying"):
            if key in started:
                trainer.run.record[key] = started[key]

    def _start(self, trainer: "RunTrainer", pl_module: "LVLMModule", folder: Path) -> Manifest:
        assert pl_module.folder is not None
        manifest = trainer.run.record
        trainer.run.lock = claim(folder, PRUNING_RECORD, trainer.run.options.resume)
        if (folder / PRUNING_RECORD).is_file():
            started = Manifest.read(folder)
            started.refuse_other(manifest, folder)
            if started.get("status") != "copying":
                refuse_changed(folder, _needed(started))
                return started
        manifest["status"] = "copying"
        manifest.write(folder)
        write_config(folder, trainer.run.config)
        # The input may have been pruned or recovered itself: its own records would be taken for ours.
        manifest["files"] = copy_checkpoint(pl_module.folder, folder, leave_out=RUN_FILES)
        manifest["files"] |= records_of(folder, [folder / "config.yaml"])
        manifest["status"] = "pruning"
        manifest.write(folder)
        return manifest

    def on_survey_block_end(self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block) -> None:
        """Keep what the survey found so far: an interrupted run goes on behind this block."""
        folder = trainer.run.folder
        if folder is not None and "surveying" in trainer.run.record:
            _on_main(trainer, folder, lambda: trainer.run.record.write(folder))

    def on_survey_end(self, trainer: "RunTrainer", pl_module: "LVLMModule") -> None:
        """Keep what the survey found: an interrupted run that goes on does not survey again."""
        folder = trainer.run.folder
        if folder is not None:
            _on_main(trainer, folder, lambda: trainer.run.record.write(folder))

    def on_block_end(self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block) -> None:
        """Write the block's pruned weights, then the manifest that says so."""
        matrices = block.matrices()
        weights = {f"{block.name}.{name}": matrices[name].weight for name in block.masks}
        stay = torch.stack([one.count_nonzero() for one in weights.values()]).tolist() if weights else []
        zeros = {name: one.numel() - count for (name, one), count in zip(weights.items(), stay)}
        for name, entry in block.record.pop("linears", {}).items():
            rows, columns = entry["shape"]
            achieved = zeros.get(name, 0) / (rows * columns)
            trainer.run.record["linears"][name] = entry | {"block": block.index, "achieved": achieved}
        forwards = trainer.run.processes.sum(torch.tensor([block.forwards], dtype=torch.float64))
        block.record["forwards"] = int(forwards.item())
        names = {"index": block.index, "name": block.name}
        if block.target != "language":
            names["target"] = block.target
        trainer.run.record["blocks"].append(names | block.record)
        folder = trainer.run.folder
        if folder is not None:
            _on_main(trainer, folder, lambda: self._write_block(trainer, pl_module, block, folder))
        trainer.run.recorded.clear()

    def _write_block(self, trainer: "RunTrainer", pl_module: "LVLMModule", block: Block, folder: Path) -> None:
        assert pl_module.folder is not None
        assert isinstance(trainer.run.weights, StreamedWeights)
        clock = Stopwatch(trainer.strategy.root_device)
        written = pl_module.folder.at(folder)
        for parameter, members in _by_parameter(block).items():
            pruned = pl_module.model.get_parameter(parameter).detach()
            if not block.updated.isdisjoint(members) or not trainer.run.weights.is_stored_as_used(parameter):
                pruned = self._in_stored_dtype(trainer, block, parameter, members)
            for key, tensor in trainer.run.weights.to_disk({parameter: pruned}, written).items():
                written.write(key, tensor)
        written.sync()
        if trainer.run.recorded:
            content = save(trainer.run.recorded)
            replace_durably(folder / _statistics_part(block.index), content)
            trainer.run.record.blocks[-1]["statistics"] = record_of_content(content)
        trainer.run.record.blocks[-1]["seconds"]["write"] = clock.lap()
        trainer.run.record.write(folder)

    @staticmethod
    def _in_stored_dtype(
        trainer: "RunTrainer", block: Block, parameter: str, members: Mapping[str, Callable[[Tensor], Tensor]]
    ) -> Tensor:
        """The new value of a parameter on the CPU, where it is stored otherwise than it is used, or weights changed."""
        assert isinstance(trainer.run.weights, StreamedWeights)
        matrices = block.matrices()
        if len(members) == 1 and block.updated.issuperset(members) and parameter.endswith(".weight"):
            (name,) = members
            stored = torch.empty_like(
                matrices[name].weight, device="cpu", dtype=trainer.run.weights.stored_dtype(parameter)
            )
        else:
            # The stored weight, not the one in compute precision: what stays must stay byte by byte.
            stored = trainer.run.weights.stored(parameter)
        for name, part in members.items():
            weight = part(stored)
            if name in block.updated:
                # A narrower dtype can lose the smallest weights; added to zero, none is left as -0.0.
                weight.copy_(matrices[name].weight.detach().to("cpu", weight.dtype) + 0.0)
            zero_(weight, block.masks[name].cpu())
            if name in block.updated:
                trainer.run.record["linears"][f"{block.name}.{name}"]["pruned"] = int((weight == 0).sum())
        return stored

    def on_prune_end(self, trainer: "RunTrainer", pl_module: "LVLMModule") -> None:
        """Verify what was written, and only then make the folder loadable.

        Raises:
            RunError: The folder does not hold what was promised.
        """
        folder = trainer.run.folder
        if trainer.run.record.get("status") == "complete":
            if folder is not None:
                _on_main(trainer, folder, lambda: self._verify_again(trainer, pl_module, folder))
                trainer.run.say(_verified_line(trainer.run.record))
            return
        if folder is None:
            self._summarise(trainer, pl_module)
            return
        trainer.run.record.update(_on_main(trainer, folder, lambda: self._finish(trainer, pl_module, folder)))
        trainer.run.say(_verified_line(trainer.run.record))

    def _verify_again(self, trainer: "RunTrainer", pl_module: "LVLMModule", folder: Path) -> None:
        """Nothing is to be done, but exit status 0 is to say that the folder holds what was promised."""
        record = trainer.run.record
        if not record.get("files") and record.get("versions", {}).get("lvlm_prune") == __version__:
            raise InputError("output", folder, f"its {PRUNING_RECORD} does not say which files were written")
        refuse_changed(folder, record.get("files", {}))
        found = self._verify(trainer, pl_module, folder)
        refuse_other_findings(record["linears"], found)
        # What is said next stands in the record, and is to be what was found.
        pruning, now = trainer.run.find(BlockwisePruning), deepcopy(record)
        assert pruning is not None
        _note_findings(now, found)
        _note_achieved(now)
        now["pattern"] = str(pruning.pattern)
        if "parts" not in now["sparsity"]:
            now["sparsity"]["target"] = pruning.mean_target()
        if now != record:
            raise InputError("output", folder, f"its {PRUNING_RECORD} says something else than what is found there")
        assert pl_module.folder is not None
        if line := verify_card(folder, read_card(pl_module.folder.path), is_dense=True):
            trainer.run.say(line)
        _remove_parts(folder)

    @staticmethod
    def _verify(trainer: "RunTrainer", pl_module: "LVLMModule", folder: Path) -> dict[str, Any]:
        assert pl_module.folder is not None
        pruning = trainer.run.find(BlockwisePruning)
        assert pruning is not None
        if others := trainer.run.record["linears"].keys() ^ pruning.shapes.keys():
            problem = f"its {PRUNING_RECORD} does not name the Linears that are pruned ({min(others)})"
            raise InputError("output", folder, problem)
        expectations = {
            name: Expectation(
                entry["pruned"],
                pruning.solver_of(entry).expected_zeros(
                    (entry["shape"][0], entry["shape"][1]), entry["target"], pruning.pattern.at(entry["target"])
                ),
                pruning.solver_of(entry).updates_weights,
            )
            for name, entry in trainer.run.record["linears"].items()
            if "note" not in entry
        }
        weights = pl_module.weights(torch.device("cpu"))
        assert isinstance(weights, StreamedWeights)
        written = pl_module.folder.at(folder)
        return verify_checkpoint(pl_module.folder, written, weights, expectations, pl_module.expert_matrices())

    def _finish(self, trainer: "RunTrainer", pl_module: "LVLMModule", folder: Path) -> Manifest:
        pruning = trainer.run.find(BlockwisePruning)
        assert pruning is not None
        refuse_changed(folder, _needed(trainer.run.record))
        found = self._verify(trainer, pl_module, folder)
        _note_findings(trainer.run.record, found)
        self._summarise(trainer, pl_module)
        trainer.run.record["pattern"] = str(pruning.pattern)
        trainer.run.record["updates_weights"] = pruning.chosen_solver.updates_weights
        self._join_statistics(trainer, folder)
        assert pl_module.folder is not None
        write_card(folder, read_card(pl_module.folder.path), trainer.run.record)
        release(folder)
        trainer.run.record["status"] = "complete"
        trainer.run.record.write(folder)
        _remove_parts(folder)
        return trainer.run.record

    @staticmethod
    def _summarise(trainer: "RunTrainer", pl_module: "LVLMModule") -> None:
        pruning = trainer.run.find(BlockwisePruning)
        assert pruning is not None
        trainer.run.record["memory"]["measured"] = trainer.run.memory.measured()
        trainer.run.record["method"] = describe(pruning)
        parts = dict.fromkeys(part.target for part in pl_module.parts if "vision" in pl_module.targets)
        found: dict[str, Any] = {"target": pruning.mean_target(), "achieved": 0.0}
        if parts:
            found["parts"] = {target: {"target": pruning.sparsity_of(target)} for target in parts}
        trainer.run.record["sparsity"] = found
        _note_achieved(trainer.run.record)

    @staticmethod
    def _join_statistics(trainer: "RunTrainer", folder: Path) -> None:
        """One `statistics.safetensors` out of the parts that each block left."""
        parts = [folder / _statistics_part(block["index"]) for block in trainer.run.record["blocks"]]
        joined: dict[str, Tensor] = {}
        for part in parts:
            if part.is_file():
                joined.update(load_file(part))
        if joined:
            content = save(joined)
            replace_durably(folder / STATISTICS_NAME, content)
            trainer.run.record["files"][STATISTICS_NAME] = record_of_content(content)


def _note_findings(manifest: Manifest, found: dict[str, Any]) -> None:
    """Put what verification found into the record."""
    linears, digests = manifest.linears, found["digests"]
    for name, zeros in found["zeros"].items():
        rows, columns = linears[name]["shape"]
        linears[name] |= {"zeros": zeros, "achieved": zeros / (rows * columns)}
        if name in digests:
            linears[name]["digest"] = digests[name]
    manifest["verified"] = {name: found[name] for name in found if name not in ("zeros", "digests")}


def _note_achieved(manifest: Manifest) -> None:
    """Put the share of zeros of all Linears into the record, and of each part where the vision tower is one."""
    found = manifest["sparsity"]
    found["achieved"] = manifest.achieved_sparsity()
    for target, part in found.get("parts", {}).items():
        part["achieved"] = manifest.achieved_sparsity(manifest.blocks_of(target))


def _verified_line(manifest: Manifest) -> str:
    target, achieved = manifest["sparsity"]["target"], manifest["sparsity"]["achieved"]
    untouched = manifest["verified"]["untouched_tensors"]
    left = sum("note" in entry for entry in manifest["linears"].values())
    note = f", {left} Linears left dense that saw too few calibration tokens, none, or zeros alone" if left else ""
    promised = f"target {readable_percent(target)}, {manifest['pattern']}"
    parts = "".join(
        f", {name} {readable_percent(part['achieved'])} (target {readable_percent(part['target'])})"
        for name, part in manifest["sparsity"].get("parts", {}).items()
    )
    found = f"sparsity {readable_percent(achieved)} ({promised}){parts}"
    return f"verified: {found}, {untouched} other tensors untouched{note}"


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


def _needed(manifest: Manifest) -> dict[str, FileRecord]:
    """What an unfinished run left in its folder, besides weights, and needs to go on."""
    parts = {
        _statistics_part(block["index"]): block["statistics"] for block in manifest["blocks"] if "statistics" in block
    }
    return {**manifest.get("files", {}), **parts}


def _remove_parts(folder: Path) -> None:
    for part in folder.glob(_statistics_part("*")):
        part.unlink()


def _statistics_part(block: int | str) -> str:
    return f"statistics.{block}.part"


def _on_main(trainer: "RunTrainer", folder: Path, work: Callable[[], Result]) -> Result:
    """Write on the main process only.

    Raises:
        RunError: The disk is full, or cannot be written for another reason.
    """

    def written() -> Result:
        with writing(folder):
            return work()

    return trainer.run.processes.on_main(written)
