"""What stands in `evaluation.json`, `probe.json` and the lines of `sweep.jsonl`; see `records`."""

from typing import Any, Required, TypedDict

from lvlm_prune.output.records import (
    CalibrationRecord,
    Count,
    FileRecord,
    OriginRecord,
    PartSparsity,
    PluginRecord,
    RetentionRecord,
    RunRecord,
    ScoresRecord,
    Share,
)


class TaskRecord(TypedDict, total=False):
    """A task in `evaluation.json`."""

    score: Required[float]
    baseline: Required[float | None]
    retention: Required[float | None]
    questions: Required[Count]
    metric: str
    full_mark: float


class EvaluationRecord(TypedDict, total=False):
    """`evaluation.json`; `asked` tells questions apart that come from elsewhere, as a file that may change.

    Engines add what else they measured.
    """

    tasks: Required[dict[str, TaskRecord]]
    average: Required[float]
    baseline_average: Required[float | None]
    retention: Required[float | None]
    model: OriginRecord
    baseline: OriginRecord | None
    engine: PluginRecord
    asked: str
    perplexity: float | None
    baseline_perplexity: float | None
    kl: float | None
    no_likelihood: str
    likelihood_without: Count
    likelihood_cause: str
    joined_prompts: Count
    config: dict[str, Any]
    versions: dict[str, Any]
    processes: Count
    device: str
    seconds: float
    private_data: str


class DenseRecord(TypedDict, total=False):
    """The line of `sweep.jsonl` about the dense model, of which `model` is the path."""

    identity: Required[str]
    scores: Required[ScoresRecord]
    model: str | OriginRecord
    digest: str


class ReachedSparsity(TypedDict, total=False):
    """What was to go, and what went."""

    target: Required[Share]
    achieved: Required[Share]
    parts: dict[str, PartSparsity]


class MethodCost(TypedDict, total=False):
    """What the method alone took."""

    seconds: Required[float]
    block_forwards: Count


class SweptRecord(DenseRecord, total=False):
    """A line of `sweep.jsonl`: a run that is finished."""

    recipe: str
    method: Required[str]
    options: dict[str, Any]
    seed: int | None
    calibration: str | None
    sparsity: Required[ReachedSparsity]
    retention: float
    seconds: Required[float]
    cost: Required[MethodCost]
    mean_visual_tokens: float
    files: dict[str, FileRecord]
    drift: list[float]
    sparsity_by_kind: dict[str, list[float | None]]


class ProbedLinear(TypedDict):
    """A Linear that was probed: its block, and the overlap of masks at each sparsity."""

    block: Count
    iou: dict[str, float]


class ProbedBlock(TypedDict, total=False):
    """By modality how far tokens move, and how unlike the outputs of each kind of Linear are."""

    index: Required[Count]
    name: str
    drift: dict[str, float]
    diversity: dict[str, dict[str, float]]


class DataSetContributions(TypedDict):
    """What visual tokens of a data set received, mean over its samples, in descending order."""

    samples: Count
    received: list[float]
    singular: list[float]
    """Their part in the singular vectors of the attention map, likewise."""


class ContributionsRecord(TypedDict, total=False):
    """The same of each data set, at a block."""

    block: Count
    sets: dict[str, DataSetContributions]
    problem: str
    """Why there are none."""


class CellRecord(TypedDict, total=False):
    """A cell of the grid of a probe, with its scores where they were measured."""

    pathway: Required[str]
    pool: Required[str]
    sparsity: Required[float]
    scores: ScoresRecord
    retention: RetentionRecord


class ProbeRecord(RunRecord, total=False):
    """`probe.json`."""

    probe: PluginRecord
    blocks: list[ProbedBlock]
    linears: dict[str, ProbedLinear]
    map: dict[str, dict[str, list[tuple[float, float]]]]
    contributions: ContributionsRecord
    dense: ScoresRecord
    grid: list[CellRecord]
    digest: str


class CompleteProbe(TypedDict):
    """What the record of a finished probe has in any case."""

    calibration: CalibrationRecord
    files: dict[str, FileRecord]
