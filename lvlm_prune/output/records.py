"""What stands in `pruning.json` and its like, and whether a file that is read is of that kind.

`docs/file_formats.md` has the whole files.
"""

import json
from functools import lru_cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

Count = Annotated[int, (0, 2**63 - 1)]
Share = Annotated[float, (0.0, 1.0)]


class FileRecord(TypedDict):
    """What a run expects to find again of a file that it wrote."""

    bytes: Count
    sha256: str


class PhaseSeconds(TypedDict, total=False):
    """Seconds of each phase of a block."""

    read: float
    gather: float
    score: float
    solve: float
    propagate: float
    write: float


class BlockRecord(TypedDict, total=False):
    """A block that is finished: its weights are completely written.

    Plugins add numbers of their own under names of their own, for example `mean_drift`.
    """

    index: Count
    """Its number among all blocks of the run; those of a vision tower come before those of the decoder."""
    name: str
    """Its module path."""
    target: str
    """`vision` for a block of the vision tower; left out for the decoder's."""
    pool: dict[str, float]
    """Modality -> tokens that calibrated, each by its weight, over all samples."""
    visual_tokens: list[int]
    """Visual tokens of each sample that count, in the order of the samples, where the pool is adaptive."""
    scores: dict[str, Any]
    """Histogram of scores: `first` bin, counts of `pruned` and `kept` weights, quartiles of the `threshold`."""
    forwards: int
    """Forwards of the block, of all processes."""
    statistics: FileRecord
    """Of the part of the statistics that the block left for the end of the run."""
    adapters: FileRecord
    """The same of its adapters, in a block-wise recovery."""
    seconds: PhaseSeconds
    peak_memory_bytes: int
    """The most that the process, or its GPU, held so far."""


class LinearRecord(TypedDict, total=False):
    """A Linear, or a matrix of a routed expert, that was to be pruned."""

    shape: tuple[Count, Count]
    """(out, in)."""
    block: Count
    target: float
    """Share of its weights that was to go."""
    pruned: Count
    """Weights that were set to zero."""
    achieved: Share
    """Share that is zero."""
    zeros: Count
    """Zeros that were counted when the output was read again."""
    digest: str
    """Digest of the written weight, where the weights that remain were updated too."""
    error: float
    """Relative error of its outputs on the calibration tokens: norm of the change over norm of the outputs."""
    solver: dict[str, Any]
    """What the solver says of it, for example how often damping was raised."""
    routed_tokens: int
    """Calibration tokens that were sent to the expert, where they were few."""
    note: str
    """Why it was left dense."""


class CalibrationRecord(TypedDict, total=False):
    """The samples that a run calibrated on."""

    source: dict[str, Any]
    """The plugin, as `class_path` and `init_args`."""
    seed: int | None
    num_samples: Count
    fingerprint: str
    tokens: dict[str, float]
    """Modality -> tokens of all samples."""
    skipped: list[tuple[str, str] | str]
    """Name and reason of each sample that could not be read; left out with what is private."""


class QualityRecord(TypedDict, total=False):
    """What pruning cost, on a few samples; numbers are null where they are infinite."""

    samples: Count
    tokens: Count
    held_back: bool
    dense_perplexity: float | None
    perplexity: float | None
    kl: float | None
    agreement: Share
    not_measured: str


class ScoresRecord(TypedDict):
    """What a checkpoint scored: the mean over tasks, and of each task its score, questions and group."""

    average: float
    tasks: dict[str, float]
    counts: dict[str, Count]
    task_groups: dict[str, str]


class RetentionRecord(TypedDict):
    """Which share of the dense model's scores is left."""

    average: float
    tasks: dict[str, float]


class MethodRecord(TypedDict, total=False):
    """A callback with every plugin and parameter."""

    class_path: str
    init_args: dict[str, Any]


class SparsityRecord(TypedDict, total=False):
    """Share of zeros over all weights that were to be pruned."""

    target: float
    achieved: Share
    parts: dict[str, Any]


class OriginRecord(TypedDict, total=False):
    """A checkpoint that something was made from; a model in memory has only its class."""

    path: str | None
    folder: str | None
    fingerprint: str | None


class ExaminedRecord(TypedDict, total=False):
    """The samples that a recovery went through before it began."""

    fingerprint: str


class TrainingDataRecord(TypedDict, total=False):
    """What a recovery trained on."""

    examined: ExaminedRecord


class AskedRecord(TypedDict):
    """What scored a run's models, where it reads its questions from a file that may change."""

    engine: str
    fingerprint: str


class RunRecord(TypedDict, total=False):
    """What every command that reads it again expects in the record of a run; there is more in it."""

    status: str
    config: dict[str, Any]
    model: OriginRecord
    calibration: CalibrationRecord
    data: TrainingDataRecord
    asked: AskedRecord
    versions: dict[str, Any]
    survey: dict[str, Any]
    blocks: list[BlockRecord]
    linears: dict[str, LinearRecord]
    files: dict[str, FileRecord]
    quality: QualityRecord
    verified: dict[str, Any]
    seconds: float


class PruningEvaluation(TypedDict):
    """Scores before and after pruning."""

    dense: ScoresRecord
    pruned: ScoresRecord
    retention: RetentionRecord


class PruningRecord(RunRecord, total=False):
    """`pruning.json`."""

    method: MethodRecord
    sparsity: SparsityRecord
    evaluation: PruningEvaluation


class RecoveryEvaluation(TypedDict):
    """Scores after recovery, and of which shares of the dense model's."""

    recovered: ScoresRecord
    retention: dict[str, RetentionRecord]


class RecoveryRecord(RunRecord, total=False):
    """`recovery.json`."""

    method: str
    training: dict[str, Any]
    dense: OriginRecord
    pruned: dict[str, Any]
    evaluation: RecoveryEvaluation


class CellRequired(TypedDict):
    """Which cell of the grid of a probe."""

    pathway: str
    pool: str
    sparsity: float


class CellRecord(CellRequired, total=False):
    """A cell of the grid of a probe, with its scores where they were measured."""

    scores: ScoresRecord
    retention: RetentionRecord


class ProbeRecord(RunRecord, total=False):
    """`probe.json`."""

    dense: ScoresRecord
    grid: list[CellRecord]


class TaskRecord(TypedDict):
    """A task in `evaluation.json`."""

    score: float
    baseline: float | None
    retention: float | None
    questions: Count


class EvaluationRequired(TypedDict):
    """What every `evaluation.json` has."""

    tasks: dict[str, TaskRecord]
    average: float
    baseline_average: float | None
    retention: float | None


class PluginRecord(TypedDict, total=False):
    """A plugin with its options."""

    class_path: str
    init_args: dict[str, Any]


class EvaluationRecord(EvaluationRequired, total=False):
    """`evaluation.json`; `asked` tells questions apart that come from elsewhere, as a file that may change."""

    engine: PluginRecord
    asked: str


class DenseRecord(TypedDict):
    """The line of `sweep.jsonl` about the dense model."""

    identity: str
    scores: ScoresRecord


class ReachedSparsity(TypedDict):
    """What was to go, and what went."""

    target: Share
    achieved: Share


class MethodCost(TypedDict):
    """What the method alone took."""

    seconds: float


class SweptRecord(DenseRecord):
    """A line of `sweep.jsonl`: a run that is finished; there is more in it."""

    method: str
    sparsity: ReachedSparsity
    seconds: float
    cost: MethodCost


class TriedRecord(TypedDict):
    """A line of `search.jsonl`, and what a search found: a try of `prune --keep`."""

    recipe: str
    level: Annotated[int, (1, 10**6)]
    sparsity: Share
    agreement: Share
    kl: float | None
    """Null where it is infinite."""
    seconds: float


def read_record(path: Path, kind: type) -> dict[str, Any] | None:
    """A JSON file that is of a kind of record, or None where it is not: of another tool or version, or cut short.

    Args:
        path: The file; there may be none.
        kind: A `TypedDict`.
    """
    try:
        if not path.is_file():  # a pipe would be waited for
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if conforms(found, kind) else None


def conforms(value: Any, kind: Any) -> bool:
    """Whether what was read from JSON is of a type: keys that a `TypedDict` does not name may be anything.

    Args:
        value: Mappings, lists, strings, numbers, null.
        kind: A type, as in the classes above; `Annotated[number, (low, high)]` for a range.

    Example:
        >>> conforms({"bytes": 3, "sha256": "ab", "more": None}, FileRecord), conforms({"bytes": -3}, FileRecord)
        (True, False)
    """
    if kind is Any:
        return True
    if is_typeddict(kind):
        hints = _hints(kind)
        return (
            isinstance(value, dict)
            and kind.__required_keys__ <= value.keys()
            and all(conforms(value[key], hints[key]) for key in hints.keys() & value.keys())
        )
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        low, high = parts[1]
        return conforms(value, parts[0]) and low <= value <= high
    if origin in (Union, UnionType):
        return any(conforms(value, part) for part in parts)
    if origin is dict:
        return isinstance(value, dict) and all(conforms(item, parts[1]) for item in value.values())
    if origin is list:
        return isinstance(value, list) and all(conforms(item, parts[0]) for item in value)
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(parts) and all(map(conforms, value, parts))
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


@lru_cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)
