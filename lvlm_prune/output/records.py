"""What stands in `pruning.json` and its like; `docs/file_formats.md` says what it means.

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


class ScoreHistogram(TypedDict):
    """Histogram of scores by powers of ten."""

    first: int
    """Power of ten of the first bin."""
    pruned: list[Count]
    kept: list[Count]
    threshold: list[float]
    """Quartiles."""


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
    mean_drift: float
    scores: ScoreHistogram
    forwards: int
    """Forwards of the block, of all processes."""
    statistics: FileRecord
    """Of the part of the statistics that the block left for the end of the run."""
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
    scored_by: str
    """`magnitude`, where that is why it was not scored as the others."""
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
    pruned_perplexity: float | None
    """Of the base of a recovery, and so are the next two."""
    pruned_kl: float | None
    pruned_agreement: Share


class NoQuality(TypedDict):
    """Why it could not be measured."""

    not_measured: str


class ScoresRecord(TypedDict, total=False):
    """What a checkpoint scored: the mean over tasks and groups, and of each task its score, questions and group."""

    average: Required[float]
    groups: Required[dict[str, float]]
    tasks: Required[dict[str, float]]
    counts: Required[dict[str, Count]]
    task_groups: Required[dict[str, str]]
    metrics: dict[str, str]
    full_marks: dict[str, float]


class RetentionRecord(TypedDict):
    """Which share of the dense model's scores is left."""

    average: float
    groups: dict[str, float]
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


_Class = TypedDict("_Class", {"class": str}, total=False)


class ModelRecord(OriginRecord, _Class, total=False):
    """The model that a run started from; `dtype` is that of its products."""

    dtype: str


class ExaminedRecord(TypedDict, total=False):
    """The samples that a recovery went through before it began."""

    fingerprint: str
    sampled: str
    """The same of some of them, which a run that goes on looks at."""
    tokens: Count
    longest: Count
    answers: Count


class TrainingDataRecord(TypedDict, total=False):
    """What a recovery trained on."""

    source: dict[str, Any]
    seed: int | None
    samples: Count
    examined: ExaminedRecord


class AskedRecord(TypedDict):
    """What scored a run's models, where it reads its questions from a file that may change."""

    engine: str
    fingerprint: str


class VerifiedRecord(TypedDict, total=False):
    """What verification found."""

    sparsity: Required[Share]
    untouched_tensors: Required[Count]
    changed_linears: Count
    """Of a recovery."""


class SurveyingRecord(TypedDict):
    """How far a survey has come: what an interrupted run goes on from, by option of each plugin."""

    blocks: Count
    block_forwards: Count
    seconds: float
    found: dict[str, dict[str, Any]]


class MemoryRecord(TypedDict, total=False):
    """Of a run that calibrates, in bytes."""

    hidden_states: str
    """Where samples waited."""
    baseline: Count
    samples: Count
    phases: dict[str, Count]
    predicted: dict[str, Count | None]
    """Peaks of `device`, `host` and `disk`; null without such a device."""
    measured: dict[str, Count | None]


class PictureRecord(TypedDict):
    """The calibration sample that pages show."""

    sample: Count
    grid: list[Count]


class RunRecord(TypedDict, total=False):
    """What records of all kinds of runs have in common, as far as they have it."""

    status: Required[str]
    config: dict[str, Any]
    model: ModelRecord
    first_fingerprint: str
    calibration: CalibrationRecord
    data: TrainingDataRecord
    asked: AskedRecord
    versions: dict[str, Any]
    processes: Count
    device: str
    survey: dict[str, Any]
    surveying: SurveyingRecord
    files: dict[str, FileRecord]
    memory: MemoryRecord
    quality: QualityRecord | NoQuality
    verified: VerifiedRecord
    pattern: str
    warnings: list[str]
    seconds: float
    catch_seconds: float
    private_data: str


class PruningEvaluation(TypedDict):
    """Scores before and after pruning."""

    dense: ScoresRecord
    pruned: ScoresRecord
    retention: RetentionRecord


class PruningRecord(RunRecord, total=False):
    """`pruning.json`."""

    method: PluginRecord
    blocks: list[BlockRecord]
    linears: dict[str, LinearRecord]
    sparsity: SparsityRecord
    updates_weights: bool
    input_zeros: Share
    mean_visual_tokens: float
    reconstruction: str
    picture: PictureRecord
    evaluation: PruningEvaluation
    search: "FoundRecord"
    work_seconds: float
    size_bytes: Count
    peak_memory_bytes: Count


class CompletePruning(TypedDict):
    """What the record of a finished run has in any case."""

    model: OriginRecord
    calibration: CalibrationRecord
    method: PluginRecord
    linears: dict[str, LinearRecord]
    sparsity: SparsityRecord
    verified: VerifiedRecord


class PackingRecord(RunRecord, total=False):
    """`packing.json`; texts of files that unpacking gives back, None where there was none."""

    format_version: int
    packed: "PackedSizes"
    dense: dict[str, Count]
    weights: dict[str, Count]
    original_config: str | None
    original_index: str | None
    original_card: str | None
    shards: dict[str, int]
    """Name of each shard -> CRC-32 of the one that it was made from."""


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


class TriedRecord(TypedDict, total=False):
    """A try of `prune --keep`, and what was measured of it; numbers are null where they are infinite."""

    recipe: Required[str]
    level: Required[Annotated[int, (1, 10**6)]]
    sparsity: Required[Share]
    agreement: Required[Share]
    kl: Required[float | None]
    seconds: Required[float]
    samples: Count
    tokens: Count
    held_back: bool
    dense_perplexity: float | None
    perplexity: float | None
    input: str
    """What the model is called that was pruned."""
    measured_on: str


class TriedLine(TriedRecord, total=False):
    """A line of `search.jsonl`."""

    identity: Required[str]
    calibration: str | None
    digest: str


class FoundRecord(TriedRecord, total=False):
    """What a search found, and how."""

    keep: Required[Share]
    tries: Required[list[TriedRecord]]
