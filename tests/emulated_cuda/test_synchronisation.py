"""The synchronisations that moving samples needs, taken out one by one: each time a race or other bytes show it."""

from __future__ import annotations

import inspect
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from lvlm_prune.blocks import placement
from lvlm_prune.checkpoints import prefetch
from lvlm_prune.memory import run_memory
from lvlm_prune.memory.measuring import Stopwatch
from tests.emulated_cuda import runs
from tests.emulated_cuda.runs import Outcome

pytestmark = pytest.mark.emulated_gpu


@dataclass(frozen=True)
class Edit:
    """A line of the source that is another one, in a run where it matters.

    Args:
        of: The class whose line it is.
        line: What is there.
        instead: What takes its place.
        recipe: A recipe that needs the line.
        place: Where the samples wait.
        in_host: Bytes that there are in host memory; fewer than the samples let them move on to files.
        timed: Whether phases are timed, for which the host waits for the whole device between them.
    """

    of: type = placement.WaitingElsewhere
    line: str = ""
    instead: str = "pass"
    recipe: str = "wanda"
    place: str = "host"
    in_host: int = 2**30
    timed: bool = True


EDITS = {
    "what arrives is not waited for": Edit(line="computing.wait_event(fetched.ready)"),
    # Only there samples are fetched that are not put back afterwards, which orders the two streams as well.
    "what arrives is not recorded on the stream that computes": Edit(
        line="copy.record_stream(computing)", recipe="ecoflap"
    ),
    "what leaves is copied before it is computed": Edit(line="self._copies.wait_event(computed)"),
    "what leaves is not recorded on the stream that copies": Edit(line="span.record_stream(self._copies)"),
    "what was caught moves on before it has arrived": Edit(
        line="torch.cuda.synchronize(self._device)", place="auto", in_host=2**17
    ),
    "files are written before the copy has arrived": Edit(
        line="self._file(span.cpu())",
        instead="self._file(torch.empty_like(span, device='cpu', pin_memory=True).copy_(span, non_blocking=True))",
        place="disk",
    ),
    # The clock's wait behind the reading of a block hides it.
    "weights are used before they have arrived": Edit(
        of=prefetch.PrefetchToGpu, line="computing.wait_stream(self._copies)", place="device", timed=False
    ),
}


def prune_with(edit: Edit, output: Path) -> Outcome:
    """Prune while a line is another one."""
    source = inspect.getsource(edit.of)
    assert edit.line in source
    _redefine(edit.of, source.replace(edit.line, edit.instead) if edit.line else source)
    try:
        untimed = nullcontext() if edit.timed else mock.patch.object(Stopwatch, "lap", return_value=0.0)
        with mock.patch.object(run_memory, "available_host_memory", return_value=edit.in_host), untimed:
            return runs.prune(edit.recipe, "cuda", edit.place, output)
    finally:
        _redefine(edit.of, source)


def _redefine(old: type, source: str) -> None:
    module = sys.modules[old.__module__]
    exec(compile(f"from __future__ import annotations\n{source}", str(module.__file__), "exec"), vars(module))


def tensors_or_failure(process, edit: Edit, output: Path) -> tuple[object, object]:
    try:
        found = process(prune_with, edit, output)
    except Exception as error:
        return type(error).__name__, {}
    return found.tensors, found.races


@pytest.mark.parametrize("name", EDITS)
def test_a_missing_synchronisation_shows(name, process, tmp_path):
    edit = EDITS[name]
    as_it_is = Edit(of=edit.of, recipe=edit.recipe, place=edit.place, in_host=edit.in_host, timed=edit.timed)
    expected, races = tensors_or_failure(process, as_it_is, tmp_path / "out")
    assert not races
    found, races = tensors_or_failure(process, edit, tmp_path / "out")
    assert races or found != expected
