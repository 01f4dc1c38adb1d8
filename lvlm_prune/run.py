"""The state of a run: what its callbacks share, from its first check to its end.

    verb ─► Run ─► trainer.run ─► callbacks read and fill it ─► gone when the verb returns

Callbacks get the Trainer, as Lightning's do, and find everything about the run under `trainer.run`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lvlm_prune.blocks import Weights
from lvlm_prune.clock import command_began
from lvlm_prune.data import CalibrationDataModule, RecoveryDataModule
from lvlm_prune.distributed.hardware import Hardware, checked_accelerator
from lvlm_prune.distributed.processes import Processes
from lvlm_prune.errors import InputError
from lvlm_prune.loop.catching import CaughtSamples
from lvlm_prune.memory.hidden_states import Wanted, checked_place
from lvlm_prune.memory.run_memory import RunMemory
from lvlm_prune.module import LVLMModule
from lvlm_prune.output.locking import FolderLock
from lvlm_prune.output.manifest import Manifest
from lvlm_prune.plugins import describe

Kind = TypeVar("Kind", bound=Callback)


USUALLY_HELD_BACK = 8
"""Samples on which `prune` measures perplexity and KL unless it is told otherwise."""


@dataclass(frozen=True)
class RunOptions:
    """What a user asked of a run, besides its model, its data and its method.

    Args:
        resume: Go on with the unfinished run in the output folder.
        evaluate: Score the embedded model before and after.
        report: Write a page and its figures.
        plan: Only say what would be done, and what memory and disk that needs.
        quiet: Print nothing.
        held_back: Samples on which the pruned model is measured against the dense one, where it is to be evaluated.
        packed: The folder is packed afterwards; what comes next is said then.
        publishable: What is private goes beside the folder; None: where there is any.
    """

    resume: bool = False
    evaluate: bool = True
    report: bool = True
    plan: bool = False
    quiet: bool = False
    held_back: int = 0
    packed: bool = False
    publishable: bool | None = None

    def __post_init__(self) -> None:
        if self.held_back < 0:
            raise InputError("held_back", self.held_back, "must be 0 or more")


@dataclass
class Run:
    """What the callbacks of one run share; a verb makes it, and it is gone when the verb returns.

    Args:
        options: What the user asked for.
        config: What repeats the run, as plain data: model, data and method, from Python too.
        hardware: Its devices.
        callbacks: Those that take part.
        record: What was done so far; becomes the record in the output folder, for example `pruning.json`.
        folder: What is written; None for a model in memory.
        processes: All processes of the run; a single one until they are started.
        samples: The calibration samples of this process; none before they are caught.
        recorded: Tensors that callbacks want written to `statistics.safetensors`, by name.
        began: What `time.perf_counter` said when the command began, or the call from Python.
        was_complete: Whether an earlier run had finished the folder already.
        lock: Keeps other runs out of `folder` from when that is written until this one ends.

    Attributes:
        weights: Brings the weights of blocks into memory, and releases them; set before `on_prune_start`.
        memory: Memory of this process, and where its samples wait; set before `on_prune_start`.
    """

    options: RunOptions
    config: Mapping[str, Any]
    hardware: Hardware
    callbacks: Sequence[Callback] = ()
    record: Manifest = field(default_factory=Manifest)
    folder: Path | None = None
    processes: Processes = field(default_factory=Processes)
    samples: CaughtSamples = field(default_factory=CaughtSamples)
    recorded: dict[str, Tensor] = field(default_factory=dict)
    began: float = field(default_factory=command_began)
    was_complete: bool = False
    lock: FolderLock | None = None
    weights: Weights = field(init=False)
    memory: RunMemory = field(init=False)

    def say(self, text: str) -> None:
        """Print for the user, once for all processes."""
        if self.processes.is_main and not self.options.quiet:
            print(text, flush=True)

    def find(self, kind: type[Kind]) -> Kind | None:
        """The first callback of a kind that takes part; None where none does."""
        return next((callback for callback in self.callbacks if isinstance(callback, kind)), None)


class RunTrainer(L.Trainer):
    """A Trainer whose callbacks find the state of the run that is under way.

    Attributes:
        run: The run that is under way.
        config: What the command line was given, as plain data; None where a verb is called from Python.
        owns_process: Whether Ctrl-C may end the whole process where the run does not end at once.

    Args:
        hidden_states: Where hidden states and what else belongs to a calibration sample wait for their turn: on the
            `device`, in `host` memory, or on `disk` in memory-mapped files. `auto` takes the first of these with room.
        scratch: Folder on the disk for memory-mapped files, which are nameless and vanish with the process; default:
            the disk of the output folder.
        options: Those of Lightning's Trainer.

    Raises:
        InputError: `hidden_states` is no such place, `scratch` no folder that can be written, or the accelerator an
            Apple GPU.
    """

    callbacks: list[Callback]
    run: Run
    config: Mapping[str, Any] | None = None
    owns_process: bool = False

    def __init__(self, hidden_states: Wanted = "auto", scratch: str = "", **options: Any) -> None:
        self.hidden_states, self.scratch = checked_place(hidden_states), scratch
        if scratch and not os.access(scratch, os.W_OK | os.X_OK):
            raise InputError("trainer.scratch", scratch, "is not a folder that can be written")
        options["accelerator"] = checked_accelerator(options.get("accelerator", "auto"))
        super().__init__(**options)

    def watched_memory(self) -> RunMemory:
        """A context that looks at the memory of the run that is under way, whose folder is known."""
        hardware = self.run.hardware
        return RunMemory(self.hidden_states, hardware.device, self.scratch, self.run.folder, hardware.devices)


def described_config(
    model: LVLMModule, datamodule: CalibrationDataModule | RecoveryDataModule, **sections: Any
) -> dict[str, Any]:
    """What repeats a run that was started from Python, as plain data.

    Args:
        model: The model.
        datamodule: Its data.
        sections: Key of the command line's configuration (`pruning`) -> the object behind it.
    """
    given = {"data": datamodule, **sections}
    return {"model": model.options(), **{name: describe(value)["init_args"] for name, value in given.items()}}
