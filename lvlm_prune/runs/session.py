"""What every verb repeats around its own work: how a run is entered, and how it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from lvlm_prune.data.embedded import EmbeddedQuestions, EmbeddedSource
from lvlm_prune.data.source import CalibrationSource
from lvlm_prune.demo import is_embedded
from lvlm_prune.distributed.interruption import interruptible
from lvlm_prune.distributed.launching import Children, Launch
from lvlm_prune.errors import InputError
from lvlm_prune.module import LVLMModule
from lvlm_prune.plugins import mounted, plugin_class
from lvlm_prune.processor import multiplies
from lvlm_prune.run import Run, RunTrainer


@contextmanager
def session(
    trainer: RunTrainer, run: Run, children: Children, way_on: Callable[[], str], at_once: bool = True
) -> Iterator[Run]:
    """While the context is open, `run` is the one that is under way.

    An interruption says how to go on, all processes of the run end alike, and its folder is other runs' again.

    Args:
        trainer: Whose callbacks the run is for.
        run: The state that they share.
        children: Processes that the run starts.
        way_on: How an interrupted run goes on; an empty text where it cannot.
        at_once: Whether an interruption may end the process the hard way, where it is all the command's own.
    """
    earlier = trainer.__dict__.get("run")
    trainer.run = run
    try:
        with interruptible(way_on, trainer.owns_process and at_once, children), children.together():
            yield run
    finally:
        if run.lock is not None:
            run.lock.release()
        if earlier is None:
            del trainer.run
        else:
            trainer.run = earlier


def is_foreign(source: CalibrationSource, model: LVLMModule) -> bool:
    """Whether a source shows the embedded model's world to another model."""
    world = isinstance(source, (EmbeddedSource, EmbeddedQuestions))
    return world and model.folder is not None and not is_embedded(model.folder.path)


def prepare_source(model: LVLMModule, source: CalibrationSource) -> None:
    """Load the processor that a source needs.

    Raises:
        InputError: The processor cannot be loaded; or the source shows the embedded model's world to another model.
    """
    if is_foreign(source, model):
        problem = (
            f"shows the embedded model's own world, and {model.path} is another model; say what its samples are, "
            "for example --data.source LlavaJsonSource --data.source.path samples.json"
        )
        raise InputError("data.source", plugin_class(source).__name__, problem)
    with mounted(**{"data.source": source}):
        needs_processor = source.needs_processor
    if needs_processor:
        model.require_processor()


def join(run: Run, launch: Launch) -> None:
    """Bring all processes of a run together; from here on they can talk."""
    launch.start()
    run.processes = launch.processes


def slow_products_line(trainer: RunTrainer, model: LVLMModule, device: torch.device) -> str:
    """How a command can have its answer sooner, where products of the model's dtype are slow; else empty.

    Measured on a processor with AVX2, one thread, 300 tokens through a Linear of 4096 x 4096: bfloat16 takes six times
    as long as float32, float16 five times.

    Args:
        trainer: Whose process it is.
        model: The opened model.
        device: Where blocks run.
    """
    dtype = model.compute_dtype
    if not trainer.owns_process or device.type != "cpu" or multiplies(dtype):
        return ""
    name = str(dtype).removeprefix("torch.")
    return (
        f"products of {name} are slow on this processor: with --model.dtype float32 blocks are several times as fast, "
        "and take twice the memory"
    )


@contextmanager
def ended(raise_hook: Callable[..., None], stage: str) -> Iterator[None]:
    """Callbacks learn how what is inside ended: `on_exception` where it failed, `teardown` in any case.

    Args:
        raise_hook: Called as `raise_hook(name, **arguments)`.
        stage: What `teardown` is told, for example `prune`.
    """
    try:
        yield
    except BaseException as error:
        raise_hook("on_exception", exception=error)
        raise
    finally:
        raise_hook("teardown", stage=stage)
