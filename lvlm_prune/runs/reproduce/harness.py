"""How the benchmarks of a table are asked."""

from __future__ import annotations

from dataclasses import dataclass, field

from lvlm_prune.errors import InputError


@dataclass(frozen=True)
class Harness:
    """How lmms-eval is to be run on the benchmarks of a table.

    Args:
        python: Interpreter that has `lmms_eval`; default: this one.
        model_args: More arguments of the model, for example `{device_map: cpu}`.
        limit: Questions per task. Default: all, as in the papers.
        arguments: More of its command line, for example `[--batch_size, '8']`.

    Raises:
        InputError: `limit` is not positive.
    """

    python: str = ""
    model_args: dict[str, str] = field(default_factory=dict)
    limit: int | None = None
    arguments: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise InputError("harness.limit", self.limit, "must be at least 1")
