"""What stands in `pruning.json` about each block and each Linear; `docs/file_formats.md` has the whole file."""

from typing import Any, TypedDict


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

    index: int
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
    statistics: dict[str, Any]
    """`bytes` and `sha256` of the part of the statistics that the block left for the end of the run."""
    adapters: dict[str, Any]
    """The same of its adapters, in a block-wise recovery."""
    seconds: PhaseSeconds
    peak_memory_bytes: int
    """The most that the process, or its GPU, held so far."""


class LinearRecord(TypedDict, total=False):
    """A Linear, or a matrix of a routed expert, that was to be pruned."""

    shape: tuple[int, int]
    """(out, in)."""
    block: int
    target: float
    """Share of its weights that was to go."""
    pruned: int
    """Weights that were set to zero."""
    achieved: float
    """Share that is zero."""
    zeros: int
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
