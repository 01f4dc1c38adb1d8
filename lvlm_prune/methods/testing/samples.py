"""Small samples, weights and processes to try plugins on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lvlm_prune.methods.patterns import Pattern, SemiStructured, Unstructured
from lvlm_prune.methods.survey import SumOverProcesses
from lvlm_prune.methods.tokens import ATTENTION_NEEDS, Tokens

LINEAR = "mlp.up_proj"
"""The Linear whose outputs the samples hold."""

WIDTH = 16
CHANNELS = 24
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PATTERNS: tuple[tuple[Pattern, float], ...] = (
    (Unstructured(), 0.5),
    (Unstructured(), 0.3),
    (SemiStructured(2, 4), 0.5),
    (SemiStructured(4, 8), 0.5),
)

Answer = TypeVar("Answer")


def make_tokens(
    seed: int,
    text: int = 6,
    visual: int = 9,
    needs: Iterable[str] = (),
    dtype: torch.dtype = torch.float32,
    padding: int = 0,
) -> Tokens:
    """A sample of random tokens, visual ones between text; the same for the same seed.

    Args:
        seed: Also the number of the sample.
        text: Number of text tokens.
        visual: Number of visual tokens.
        needs: Optional fields of `Tokens` to fill; others stay None.
        dtype: Of hidden states and outputs.
        padding: So many tokens of NaN lie on both sides of the tokens in memory, as in a padded batch; attention too.
    """
    generator = torch.Generator().manual_seed(seed)
    needs, count = frozenset(needs), text + visual
    is_visual = torch.zeros(count, dtype=torch.bool)
    is_visual[text // 2 : text // 2 + visual] = True
    hidden = torch.randn(count, WIDTH, generator=generator)
    changed = hidden + 0.3 * torch.randn(count, WIDTH, generator=generator)
    outputs = torch.randn(count, 2 * CHANNELS, generator=generator)
    attention = torch.rand(count, count, generator=generator).tril() + 1e-3 * torch.eye(count)
    attention /= attention.sum(-1, keepdim=True)
    of_text = attention[~is_visual][:, is_visual]
    fields = {
        "attention_last": attention[-1],
        "attention_text_to_visual": of_text.mean(0) if text else of_text.new_zeros(visual),
        "attention_mean": attention.mean(0),
        "attention_map": attention,
    }
    return Tokens(
        _padded(hidden.to(dtype), padding),
        _padded(changed.to(dtype), padding),
        is_visual,
        outputs={LINEAR: _padded(outputs.to(dtype), padding)} if "outputs" in needs else {},
        sample=seed,
        **{name: _padded(fields[name], padding) for name in ATTENTION_NEEDS & needs},  # type: ignore[arg-type]
    )


def _padded(values: Tensor, padding: int) -> Tensor:
    """The same values, of any shape, as a part of a tensor that is longer in the first dimension and NaN there."""
    around = values.new_full((len(values) + 2 * padding, *values.shape[1:]), float("nan"))
    around[padding : padding + len(values)] = values
    return around[padding : padding + len(values)]


def make_weight(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A random weight of shape (rows, columns) without zeros and without ties."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return (weight.sign() * (weight.abs() + 0.05)).to(dtype)


class FewBlocks:
    """Stands for `RemainingBlocks`: one block, whose loss is a smooth function of its weights and the sample.

    Args:
        linears: Names and shapes of the Linears of the block.
        samples: Numbers of the samples that go through it.
        answers: Of the unchanged model, the same at each block; default: what this block makes of the samples.
    """

    def __init__(
        self, linears: dict[str, nn.Linear], samples: Sequence[int], answers: dict[int, Tensor] | None = None
    ) -> None:
        self._linears, self._samples, self._answers = linears, samples, answers
        self.block = nn.ModuleDict({name.replace(".", "_"): linear for name, linear in linears.items()})

    def __len__(self) -> int:
        return 1

    @property
    def num_samples(self) -> int:
        return len(self._samples)

    @torch.no_grad()
    def losses(self, changes: Any) -> dict[int, list[float]]:
        found: dict[int, list[float]] = {}
        for sample in self._samples:
            inputs = torch.randn(4, CHANNELS, generator=torch.Generator().manual_seed(sample))
            for change in changes:
                with change(sample):
                    total = sum((inputs @ linear.weight.T.float()).square().mean() for linear in self._linears.values())
                found.setdefault(sample, []).append(float(total))
        return found

    @torch.no_grad()
    def answers(self) -> dict[int, Tensor]:
        return self._answers or {sample: torch.cat(list(self._outputs(sample)), dim=1) for sample in self._samples}

    @torch.no_grad()
    def divergences(self, changes: Any, dense: Mapping[int, Tensor]) -> dict[int, list[float]]:
        found: dict[int, list[float]] = {}
        for sample in self._samples:
            for change in changes:
                with change(sample):
                    moved = torch.cat(list(self._outputs(sample)), dim=1) - dense[sample]
                found.setdefault(sample, []).append(float(moved.square().mean()))
        return found

    def _outputs(self, sample: int) -> Iterable[Tensor]:
        inputs = torch.randn(4, CHANNELS, generator=torch.Generator().manual_seed(sample))
        return (inputs @ linear.weight.T.float() for linear in self._linears.values())

    def seconds(self) -> tuple[float, float]:
        return (0.01, 0.01) if self._samples else (0.0, 0.0)


def alone(values: Tensor) -> Tensor:
    """The sum over the one process that there is."""
    return values


def on_two_processes(work: Callable[[int, SumOverProcesses], Answer]) -> list[Answer]:
    """What two processes answer that sum tensors with each other; threads stand for them.

    Args:
        work: Gets the number of the process, and the sum over both.
    """
    barrier, given, answers, errors = threading.Barrier(2), [Tensor(), Tensor()], {}, []

    def run(rank: int) -> None:
        def total(values: Tensor) -> Tensor:
            given[rank] = values.clone()
            barrier.wait(timeout=30)
            result = given[0] + given[1]
            barrier.wait(timeout=30)
            return result

        try:
            answers[rank] = work(rank, total)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    return [answers[0], answers[1]]
