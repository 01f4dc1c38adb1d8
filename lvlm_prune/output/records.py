"""What stands in `pruning.json` and its like, as far as it is read again; `docs/file_formats.md` has the whole files.

A file that is read is held against these types: it may be of another version, or of another tool."""

from typing import Annotated, Any, Required, TypedDict

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

    index: Required[Count]
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


class MeasuredLinear(TypedDict):
    """A Linear, or a matrix of a routed expert, and how much of it is zero."""

    shape: tuple[Count, Count]
    """(out, in)."""
    achieved: Share
    """Share that is zero."""


class LinearRecord(MeasuredLinear, total=False):
    """One that was to be pruned."""

    block: Required[Count]
    target: Required[Share]
    """Share of its weights that was to go."""
    pruned: Count
    """Weights that were set to zero; missing where there is a `note`."""
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


class RecoveredLinear(MeasuredLinear):
    """A pruned Linear that was recovered."""

    zeros: Count


class ProbedLinear(TypedDict):
    """A Linear that was probed: its block, and the overlap of masks at each sparsity."""

    block: Count
    iou: dict[str, float]


class CalibrationRecord(TypedDict, total=False):
    """The samples that a run calibrated on."""

    source: dict[str, Any]
    """The plugin, as `class_path` and `init_args`."""
    seed: int | None
    num_samples: Count
    fingerprint: str
    tokens: dict[str, float]
    """Modality -> tokens of all samples."""
    counted: dict[str, float]
    """Modality -> those of them that counted at a block of the decoder, the mean; where a checkpoint was recovered."""
    skipped: list[tuple[str, str] | str]
    """Name and reason of each sample that could not be read; left out with what is private."""


class QualityRecord(TypedDict, total=False):
    """What pruning cost, on a few samples; numbers are null where they are infinite."""

    samples: Required[Count]
    tokens: Required[Count]
    held_back: Required[bool]
    dense_perplexity: Required[float | None]
    perplexity: Required[float | None]
    kl: Required[float | None]
    agreement: Share


class NoQuality(TypedDict):
    """Why it could not be measured."""

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


class PluginRecord(TypedDict, total=False):
    """A plugin, or a callback with every plugin, and the parameters."""

    class_path: str
    init_args: dict[str, Any]


class PartSparsity(TypedDict):
    """The same of the decoder, or of the vision tower."""

    target: float
    achieved: Share


class SparsityRecord(TypedDict, total=False):
    """Share of zeros over all weights that were to be pruned."""

    target: float
    achieved: Share
    parts: dict[str, PartSparsity]


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

    source: dict[str, Any]
    examined: ExaminedRecord


class AskedRecord(TypedDict):
    """What scored a run's models, where it reads its questions from a file that may change."""

    engine: str
    fingerprint: str


class TrainingRecord(TypedDict):
    """What a recovery did; there is more in it, by its method."""

    trainable_parameters: Count
    steps: Count


class VerifiedRecord(TypedDict):
    """What verification found."""

    sparsity: Share
    untouched_tensors: Count


class SurveyingRecord(TypedDict):
    """How far a survey has come: what an interrupted run goes on from, by option of each plugin."""

    blocks: Count
    block_forwards: Count
    seconds: float
    found: dict[str, dict[str, Any]]


class MemoryRecord(TypedDict, total=False):
    """Peaks of a run of `prune` in bytes, of `device`, `host` and `disk`; null without such a device."""

    measured: dict[str, Count | None]


class RunRecord(TypedDict, total=False):
    """What every command that reads it again expects in the record of a run; there is more in it."""

    status: Required[str]
    config: dict[str, Any]
    model: OriginRecord
    first_fingerprint: str
    calibration: CalibrationRecord
    data: TrainingDataRecord
    asked: AskedRecord
    versions: dict[str, Any]
    survey: dict[str, Any]
    surveying: SurveyingRecord
    blocks: list[BlockRecord]
    files: dict[str, FileRecord]
    quality: QualityRecord | NoQuality
    verified: VerifiedRecord
    pattern: str
    seconds: float


class PruningEvaluation(TypedDict):
    """Scores before and after pruning."""

    dense: ScoresRecord
    pruned: ScoresRecord
    retention: RetentionRecord


class PruningRecord(RunRecord, total=False):
    """`pruning.json`."""

    method: PluginRecord
    linears: dict[str, LinearRecord]
    sparsity: SparsityRecord
    input_zeros: Share
    memory: MemoryRecord
    evaluation: PruningEvaluation
    search: "FoundRecord"


class CompletePruning(TypedDict):
    """What the record of a finished run has in any case."""

    model: OriginRecord
    calibration: CalibrationRecord
    method: PluginRecord
    linears: dict[str, LinearRecord]
    sparsity: SparsityRecord
    verified: VerifiedRecord


class RecoveryEvaluation(TypedDict):
    """Scores after recovery, and of which shares of the dense model's."""

    recovered: ScoresRecord
    retention: dict[str, RetentionRecord]


class RecoveryRecord(RunRecord, total=False):
    """`recovery.json`."""

    method: str
    training: TrainingRecord
    linears: dict[str, RecoveredLinear]
    dense: OriginRecord
    pruned: "PrunedHow"
    evaluation: RecoveryEvaluation


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


class PrunedHow(TypedDict, total=False):
    """What the record of a recovery keeps of how its base was pruned."""

    method: PluginRecord
    calibration: CalibrationRecord
    sparsity: SparsityRecord
    pattern: str
    input_zeros: Share


class CellRecord(TypedDict, total=False):
    """A cell of the grid of a probe, with its scores where they were measured."""

    pathway: Required[str]
    pool: Required[str]
    sparsity: Required[float]
    scores: ScoresRecord
    retention: RetentionRecord


class PackingRecord(RunRecord, total=False):
    """`packing.json`; texts of files that unpacking gives back, None where there was none."""

    original_config: str | None
    original_index: str | None
    original_card: str | None
    shards: dict[str, int]
    """Name of each shard -> CRC-32 of the one that it was made from."""


class ProbeRecord(RunRecord, total=False):
    """`probe.json`."""

    linears: dict[str, ProbedLinear]
    dense: ScoresRecord
    grid: list[CellRecord]


class PackedSizes(TypedDict):
    """Bytes of the tensors that were packed, before and after."""

    tensors: Count
    dense: Count
    packed: Count


class PackingConfig(TypedDict):
    """How it was packed."""

    format: str


class CompletePacking(TypedDict):
    """What the record of a finished packing has in any case."""

    config: PackingConfig
    packed: PackedSizes


class CompleteProbe(TypedDict):
    """What the record of a finished probe has in any case."""

    calibration: CalibrationRecord
    files: dict[str, FileRecord]


class TriedRecord(TypedDict):
    """A line of `search.jsonl`, and what a search found: a try of `prune --keep`."""

    recipe: str
    level: Annotated[int, (1, 10**6)]
    sparsity: Share
    agreement: Share
    kl: float | None
    """Null where it is infinite."""
    seconds: float


class FoundRecord(TriedRecord, total=False):
    """What a search found, and how."""

    keep: Required[Share]
    measured_on: str
    tries: Required[list[TriedRecord]]
