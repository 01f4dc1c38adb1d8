"""Reference numbers of the scorers, and statistics over their tokens."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lvlm_prune.methods.statistics import Statistic

GOLDEN = Path(__file__).parents[3] / "golden"


@pytest.fixture(scope="session")
def reference() -> Callable[[str], dict[str, Tensor]]:
    """`reference("wanda")` gives weight, tokens and results of the released code."""
    return lambda name: load_file(GOLDEN / name / f"{name}.safetensors")


@pytest.fixture(scope="session")
def gathered() -> Callable[..., Statistic]:
    """`gathered(Gram, samples)` adds samples of shape (T, C), all tokens or with one weight vector per sample."""

    def gather(kind: type[Statistic], samples: Tensor | list[Tensor], weights: list[Tensor] | None = None) -> Statistic:
        statistic = kind(samples[0].shape[-1])
        for index, tokens in enumerate(samples):
            every = torch.ones(len(tokens), dtype=torch.bool)
            statistic.add(tokens, every if weights is None else weights[index])
        return statistic

    return gather
