"""What plugins of all kinds promise alike, and how it is looked at."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lvlm_prune.methods.contract import PluginFault, name_of, refuse_no_plain_data
from lvlm_prune.methods.patterns import ZeroCount


@contextmanager
def unchanged(where: str, **given: Tensor | Iterable[Tensor]) -> Iterator[None]:
    """Within, a plugin looks at tensors that others look at after it.

    Args:
        where: The method that gets them.
        given: Name -> tensor, or some.

    Raises:
        PluginFault: One has changed.
    """
    held = {name: [value] if isinstance(value, Tensor) else list(value) for name, value in given.items()}
    before = {name: [tensor.clone() for tensor in tensors] for name, tensors in held.items()}
    yield
    for name, tensors in held.items():
        if not all(map(torch.equal, tensors, before[name])):
            raise PluginFault(f"{where}: changes `{name}`, which others still need")


def check_zeros(where: str, weight: Tensor, counts: Sequence[ZeroCount], under: str) -> None:
    """A pruned weight has the zeros that were promised of it.

    Raises:
        PluginFault: It has fewer, or more.
    """
    for count in counts:
        zeros = count.of(weight)
        if (zeros < count.least).any() or (count.most is not None and (zeros > count.most).any()):
            found, most = f"{int(zeros.min())} to {int(zeros.max())}", "" if count.most is None else f" to {count.most}"
            promised = f"{count.least}{most} are promised {under}"
            raise PluginFault(f"{where}: {found} zeros among {count.size} weights, {promised}")


def check_notes(plugin: Any, where: str, notes: Any) -> None:
    """Notes of a Linear are plain data, and their summary is text.

    Raises:
        PluginFault: They are not.
    """
    refuse_no_plain_data(where, notes)
    if not isinstance(plugin.summary({"layers.0.q_proj": notes} if notes else {}), str):
        raise PluginFault(f"{name_of(plugin)}.summary: expected text")


def check_numbers(plugin: Any, values: Mapping[str, Any], least: float = 0.0) -> None:
    """What is said for the plan, by the name of the method: numbers that are large enough.

    Raises:
        PluginFault: One is none, or less than `least`.
    """
    for name, value in values.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value < least:
            raise PluginFault(f"{name_of(plugin)}.{name}: {value!r}, expected a number, {least:g} or larger")


def check_refusal(plugin: Any, error: ValueError) -> None:
    """What `check` refuses names an argument, as the one that mounts the plugin reads it.

    Raises:
        PluginFault: It names none.
    """
    if not re.match(r"`[^`]+` .*: ", str(error)):
        problem = "a refusal begins with the argument in backticks, its value and a colon"
        raise PluginFault(f"{name_of(plugin)}.check: {str(error)!r}; {problem}") from None
