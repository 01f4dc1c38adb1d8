"""What stands in `recovery.json`; see `records`."""

from typing import Required, TypedDict

from lvlm_prune.output.records import (
    CalibrationRecord,
    Count,
    FileRecord,
    MeasuredLinear,
    OriginRecord,
    PhaseSeconds,
    PluginRecord,
    RetentionRecord,
    RunRecord,
    ScoresRecord,
    Share,
    SparsityRecord,
    TrainingDataRecord,
    VerifiedRecord,
)


class RecoveredLinear(MeasuredLinear, total=False):
    """A pruned Linear that was recovered."""

    zeros: Required[Count]
    digest: str


class TrainingRecord(TypedDict, total=False):
    """What a recovery did, as far as its method has it."""

    trainable_parameters: Required[Count]
    steps: Required[Count]
    seconds: float
    epochs: Count
    train_loss: float | None
    validation_loss: float | None
    history: dict[str, list[tuple[Count, float]]]
    """Steps and losses."""
    error_before: float | None
    error_after: float | None


class ReconstructedBlock(TypedDict, total=False):
    """A block that was recovered by itself; errors are shares of the norm of its outputs."""

    index: Required[Count]
    name: str
    error_before: float
    error_after: float
    steps: Count
    fit_seconds: float
    forwards: Count
    seconds: PhaseSeconds
    peak_memory_bytes: Count
    adapters: FileRecord


class TeacherRecord(TypedDict):
    """What asking the dense model took."""

    seconds: float
    bytes: Count


class PrunedHow(TypedDict, total=False):
    """What the record of a recovery keeps of how its base was pruned."""

    method: PluginRecord
    calibration: CalibrationRecord
    sparsity: SparsityRecord
    pattern: str
    updates_weights: bool
    input_zeros: Share


class RecoveryEvaluation(TypedDict):
    """Scores after recovery, and of which shares of the dense model's."""

    dense: ScoresRecord
    pruned: ScoresRecord
    recovered: ScoresRecord
    retention: dict[str, RetentionRecord]


class RecoveryRecord(RunRecord, total=False):
    """`recovery.json`."""

    method: str
    training: TrainingRecord
    teacher: TeacherRecord
    blocks: list[ReconstructedBlock]
    linears: dict[str, RecoveredLinear]
    origin: str | None
    dense: OriginRecord
    pruned: PrunedHow
    evaluation: RecoveryEvaluation
    evaluation_seconds: float


class CompleteRecovery(TypedDict):
    """What the record of a finished recovery has in any case."""

    model: OriginRecord
    data: TrainingDataRecord
    method: str
    training: TrainingRecord
    linears: dict[str, RecoveredLinear]
    verified: VerifiedRecord
    pattern: str
    seconds: float
