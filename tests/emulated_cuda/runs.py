"""What tests do in the process of the emulated device: run commands there, and tell what came out."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lvlm_prune import load_pruning
from lvlm_prune.blocks import placement
from lvlm_prune.cli import main
from lvlm_prune.data import CalibrationDataModule, TensorSource
from lvlm_prune.module import LVLMModule
from lvlm_prune.trainer import LVLMTrainer
from tests.conftest import GOLDEN, MODEL
from tests.emulated_cuda import device
from tests.emulated_cuda.building import load
from tests.families import Sample

REPOSITORY = Path(__file__).parents[2]
SAMPLES = (Sample(3, 0, 5), Sample(2, 1, 9), Sample(6, 2, 2))
"""Calibration samples for tiny models of any family."""

_NO_BAR = "--trainer.enable_progress_bar=false"


@dataclass(frozen=True)
class Outcome:
    """What a run on the emulated device did.

    Args:
        status: Its exit status.
        screen: What it printed.
        tensors: Name -> digest of the bytes, dtype and shape of each tensor that it wrote.
        races: What happened without order on the device -> how often.
        waits: "operation @ line of code" -> how often the host waited for the device there.
        launches: Operation -> kernels and copies.
        nondeterministic: Sums of floats in any order on a GPU -> how often.
        allocations: Blocks of device memory.
    """

    status: int
    screen: str
    tensors: Mapping[str, str] = field(default_factory=dict)
    races: Mapping[str, int] = field(default_factory=dict)
    waits: Mapping[str, int] = field(default_factory=dict)
    launches: Mapping[str, int] = field(default_factory=dict)
    nondeterministic: Mapping[str, int] = field(default_factory=dict)
    allocations: int = 0

    def waits_in(self, *parts: str) -> int:
        """Host waits on lines of code whose description has one of these parts."""
        return sum(count for line, count in self.waits.items() if any(part in line for part in parts))


def start() -> None:
    """Begin as the process of the emulated device."""
    torch.set_num_threads(1)
    device.turn_on()


def command(arguments: Sequence[str], output: Path, keep: bool = False) -> Outcome:
    """Run a command line that writes `output`; the folder is gone afterwards, unless it is to be kept."""
    return watched(lambda: main([*map(str, arguments), f"--output={output}", _NO_BAR]), output, keep)


def prune(
    recipe: str,
    accelerator: str,
    place: str,
    output: Path,
    samples: int = 4,
    **options: Any,
) -> Outcome:
    """Prune the golden model as a recipe says, from disk to disk, from Python: without the seconds of a command line.

    Args:
        recipe: Name of a file in `configs/prune`.
        accelerator: `cpu` or `cuda`.
        place: Where the samples wait; tensors of any size are moved.
        output: Folder, gone afterwards.
        samples: How many of the golden samples calibrate.
        options: Options of the trainer.
    """

    def work() -> int:
        trainer = LVLMTrainer(
            accelerator=accelerator,
            devices=1,
            hidden_states=place,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[load_pruning(REPOSITORY / "configs" / "prune" / f"{recipe}.yaml")],
            **options,
        )
        data = CalibrationDataModule(TensorSource(str(GOLDEN / "calib.safetensors")), num_samples=samples)
        trainer.prune(LVLMModule(str(MODEL)), data, str(output), evaluate=False, report=False)
        return 0

    with moving_from(1):
        return watched(work, output)


def watched(work: Callable[[], int], output: Path, keep: bool = False) -> Outcome:
    """Do something that writes a folder, and tell what happened; the folder is gone then, unless it is to be kept."""
    shutil.rmtree(output, ignore_errors=True)
    torch.cuda.empty_cache()
    load().forget()
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
        try:
            status = work()
        except SystemExit as end:
            status = int(end.code or 0)
    outcome = Outcome(status, screen.getvalue(), digests(output), **load().report())
    if not keep:
        shutil.rmtree(output, ignore_errors=True)
    return outcome


@contextlib.contextmanager
def moving_from(size: int) -> Iterator[None]:
    """Tensors of so many bytes are moved off the device: those of tiny models would all stay."""
    before, placement._SMALLEST = placement._SMALLEST, size
    try:
        yield
    finally:
        placement._SMALLEST = before


def digests(folder: Path) -> dict[str, str]:
    """Digest of every tensor in the weight files of a folder."""
    tensors = {
        f"{file.name} {name}": value
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }
    return {name: digest(value) for name, value in tensors.items()}


def digest(value: torch.Tensor) -> str:
    """Digest of dtype, shape and bytes of a tensor."""
    content = value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return sha256(f"{value.dtype} {tuple(value.shape)} ".encode() + content).hexdigest()
