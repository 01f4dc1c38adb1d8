"""The list of tables, with what each takes: models, GPU memory, disk, time.

Memory and disk follow from the models' sizes; the time is an estimate from two rates, not a measurement.
"""

from __future__ import annotations

from collections.abc import Sequence

from lvlm_prune.runs.reproduce.tables import Part, load_table, table_names
from lvlm_prune.runs.reproduce.text import heading

_BYTES_PER_PARAMETER = 2
# Weights in bfloat16, activations of a question with its images, and what libraries take.
_BESIDE_WEIGHTS = 6e9
# A dense and a pruned checkpoint lie on the disk at once.
_CHECKPOINTS = 2
_QUESTIONS_PER_SECOND = 4.0
_MINUTES_PER_PRUNING = 5.0


def listing() -> str:
    """One entry per table."""
    lines = ["Tables that can be run again, `lvlm-prune reproduce TABLE --output DIR`:", ""]
    for name in table_names():
        table = load_table(name)
        runs = sum(len(part.rows) for part in table.parts)
        models = ", ".join(part.model.path for part in table.parts)
        judges = sorted({benchmark.name for part in table.parts for benchmark in part.measured if benchmark.judge})
        missing = [part.model.missing for part in table.parts if part.model.missing]
        lines += [name, f"    {heading(table)}", f"    {runs} runs · {models}", f"    {_needs(table.parts)}"]
        if judges:
            lines.append(f"    {', '.join(judges)}: answers are judged by a model behind an API, which needs a key")
        lines += [f"    {reason}" for reason in dict.fromkeys(missing)] + [""]
    lines.append("Memory is that of scoring in bfloat16; time is estimated at four questions a second on one A100.")
    return "\n".join(lines)


def _needs(parts: Sequence[Part]) -> str:
    memory = max(_gpu_bytes(part) for part in parts) / 1e9
    disk = max(_disk_bytes(part) for part in parts) / 1e9
    return f"GPU memory {memory:.0f} GB · disk {disk:.0f} GB and the benchmarks · about {hours(parts):.0f} h"


def _gpu_bytes(part: Part) -> float:
    return part.model.parameters * _BYTES_PER_PARAMETER + _BESIDE_WEIGHTS


def _disk_bytes(part: Part) -> float:
    return part.model.parameters * _BYTES_PER_PARAMETER * _CHECKPOINTS


def hours(parts: Sequence[Part]) -> float:
    """Expected time: every row, and the dense model, is asked all questions; every row is pruned once."""
    seconds = 0.0
    for part in parts:
        questions = sum(benchmark.questions for benchmark in part.measured)
        seconds += (len(part.rows) + 1) * questions / _QUESTIONS_PER_SECOND
        seconds += len(part.rows) * _MINUTES_PER_PRUNING * 60
    return seconds / 3600
