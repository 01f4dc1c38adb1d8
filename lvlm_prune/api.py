"""Pruning from Python: the same trainer, loop and callbacks as the command line."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os.path import exists, isfile
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lvlm_prune.blocks import Target
from lvlm_prune.callbacks import BlockwisePruning
from lvlm_prune.cli_errors import explain
from lvlm_prune.data import CalibrationDataModule, CalibrationSource
from lvlm_prune.errors import InputError, meant
from lvlm_prune.module import LVLMModule
from lvlm_prune.output.manifest import Manifest
from lvlm_prune.plugins import built_from, refuse_values
from lvlm_prune.recipes import options_of_method, recipe_file, recipe_names
from lvlm_prune.run import RunOptions, RunTrainer
from lvlm_prune.runs.prune.run import PruneRun
from lvlm_prune.runs.publishing import Publication

_METHOD = f"{BlockwisePruning.__module__}.{BlockwisePruning.__qualname__}"


class InputsSource(CalibrationSource):
    """Model inputs that are already in memory, one dictionary per calibration sample.

    Args:
        samples: What `model(**inputs)` takes, each with `input_ids` of shape (1, T).

    Raises:
        InputError: They are none.
    """

    default_num_samples = None
    needs_processor = False

    def __init__(self, samples: Iterable[Mapping[str, Tensor]]) -> None:
        if isinstance(samples, (str, Mapping)) or not isinstance(samples, Iterable):
            raise InputError("calibration", samples, "expected a data module, a source, or model inputs of each sample")
        self._samples = [_checked_inputs(sample, number) for number, sample in enumerate(samples)]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._samples[index]


def _checked_inputs(sample: Any, number: int) -> dict[str, Tensor]:
    """The model inputs of a sample.

    Raises:
        InputError: There is no `input_ids` of shape (1, T) with whole numbers.
    """
    ids = sample.get("input_ids") if isinstance(sample, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) != 1 or not ids.numel() or ids.is_floating_point():
        found = type(ids).__name__ if not isinstance(ids, Tensor) else f"{ids.dtype} of shape {tuple(ids.shape)}"
        problem = f"expected model inputs with `input_ids` of shape (1, T), whole numbers; it has {found}"
        raise InputError("calibration", f"sample {number}", problem)
    return dict(sample)


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """A Trainer made on the way to something else has nothing to announce."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def load_pruning(config: str | Path, **options: Any) -> BlockwisePruning:
    """The method of a recipe as the command line would build it.

    Args:
        config: Name of a recipe (`lvlm-prune methods` lists them), or a YAML file like those in `configs/prune`; only
            its `pruning` key is read.
        options: Options that take the place of the file's, for example `sparsity=0.6`.

    Raises:
        InputError: There is no such recipe, or the file or an option cannot be used.

    Example:
        >>> load_pruning("wanda", sparsity=0.6).sparsity
        0.6
    """
    file = Path(config)
    if not isfile(file) and str(config) in recipe_names():  # a folder may have the name too
        file = recipe_file(str(config))
    elif not exists(file):
        problem = f"no such file, and no recipe of that name; there are {', '.join(recipe_names())}"
        raise InputError("config", config, problem + meant(config, recipe_names()))
    values = options_of_method(file, "config") | options
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(BlockwisePruning, "pruning")
    try:
        parsed = parser.parse_object({"pruning": values})
    except ArgumentError as error:
        raise InputError("config", config, explain(str(error))) from None
    refuse_values({"pruning": {"class_path": _METHOD, "init_args": parsed.pruning.as_dict()}})
    with built_from(parsed.as_dict()):
        return parser.instantiate(parsed).pruning


def prune(
    model: nn.Module | str | Path,
    calibration: CalibrationDataModule | CalibrationSource | Iterable[Mapping[str, Tensor]],
    pruning: BlockwisePruning | None = None,
    output: str | Path | None = "",
    processor: Any = None,
    callbacks: Sequence[Callback] = (),
    trainer: RunTrainer | None = None,
    targets: Sequence[Target] = ("language",),
    resume: bool = False,
    quiet: bool | None = None,
    report: bool = True,
    publishable: bool | None = None,
) -> Manifest:
    """Prune a model in memory in place, or a checkpoint folder into another one.

    Args:
        model: A transformers image-text-to-text model, or the path of a checkpoint folder (then `output` is needed).
        calibration: A data module, a source, or model inputs of the samples.
        pruning: The method; default: ATV-Pruning at 50%.
        output: Folder to write when `model` is a path; default: a new one in `runs`. A model in memory is not written;
            save it yourself.
        processor: The model's processor, where a model in memory is calibrated from conversations.
        callbacks: More callbacks on the same lifecycle.
        trainer: A trainer of your own (devices, loggers); its callbacks must hold the method then.
        targets: What is pruned: the `language` decoder, the `vision` tower, or both.
        resume: Go on with the unfinished run in `output`, which had the same method, model and data.
        quiet: Print nothing; default: unless there is a trainer of your own.
        report: Write a page with figures into `output`, which takes seconds.
        publishable: Keep what is private out of `output`, beside it in `OUTPUT.private`: local paths, ids of samples,
            and the picture of one. Default: unless model and data are the embedded ones.

    Returns:
        The manifest: what was done, to what, with what result.

    Raises:
        InputError: Something does not fit; nothing was changed.

    Example:
        >>> from transformers import AutoModelForImageTextToText
        >>> from lvlm_prune.demo import CHECKPOINT
        >>> import torch
        >>> model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT)
        >>> samples = [{"input_ids": torch.arange(5, 25)[None]}, {"input_ids": torch.arange(40, 60)[None]}]
        >>> manifest = prune(model, samples, BlockwisePruning(sparsity=0.5))
        >>> sparsity = manifest["sparsity"]
        >>> round(sparsity["achieved"], 3)
        0.5
        >>> bool((model.get_decoder().layers[0].mlp.up_proj.weight == 0).float().mean() == 0.5)
        True
    """
    if pruning is not None and not isinstance(pruning, BlockwisePruning):
        problem = 'must be a BlockwisePruning; `load_pruning("wanda", sparsity=0.6)` makes one'
        raise InputError("pruning", pruning, problem)
    in_memory = isinstance(model, nn.Module)
    if isinstance(model, nn.Module):
        module = LVLMModule.from_model(model, processor, list(targets))
    else:
        module = LVLMModule(str(model), targets=list(targets))
    if isinstance(calibration, CalibrationDataModule):
        data = calibration
    elif isinstance(calibration, CalibrationSource):
        data = CalibrationDataModule(calibration)
    else:
        data = CalibrationDataModule(InputsSource(calibration))
    quiet = trainer is None if quiet is None else quiet
    if trainer is None:
        accelerator, devices = _where(model)
        with _quiet_lightning():
            trainer = RunTrainer(
                accelerator=accelerator,
                devices=devices,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[pruning or BlockwisePruning(), *callbacks],
            )
    options = RunOptions(resume=resume, evaluate=False, report=report, quiet=quiet, publishable=publishable)
    run = PruneRun(trainer, module, data, "" if in_memory or output is None else str(output), options)
    manifest = run()
    Publication(publishable=publishable)(run.run.folder, quiet)
    return manifest


def _where(model: nn.Module | str | Path) -> tuple[str, int | list[int]]:
    """Accelerator and devices for a model: those that one in memory is on."""
    device = next(model.parameters()).device if isinstance(model, nn.Module) else torch.device("meta")
    if device.type == "cuda":
        return "cuda", [device.index]
    return (device.type if device.type in ("cpu", "mps") else "auto"), 1
