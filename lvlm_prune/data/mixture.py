"""Several sources in exact ratios.

Example:
    >>> import tempfile
    >>> from pathlib import Path
    >>> from lvlm_prune.data import CalibrationDataModule, TextSource
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("web", "chat"):
    ...     _ = (folder / f"{name}.txt").write_text("".join(f"{name} {number}\\n\\n" for number in range(50)))
    >>> source = MixtureSource([TextSource(str(folder / "web.txt")), TextSource(str(folder / "chat.txt"))], [1, 3])
    >>> numbers = CalibrationDataModule(source, num_samples=12).select()
    >>> [source.part_of(number) for number in numbers]
    [1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from lvlm_prune.data.source import CalibrationSource, Sample
from lvlm_prune.errors import RunError


class MixtureSource(CalibrationSource):
    r"""A source made of sources, from each of which a fixed share of the calibration set comes.

    The shares are exact: of n samples in the ratios r, part d gives `n r_d / sum(r)`; where that is no whole number,
    the largest remainders are rounded up (the first of equal ones). Within its share each part chooses as it would on
    its own. Parts may be of different kinds: conversations, documents and ready-made model inputs.

    .. math:: S = \sum_d \alpha_d S_d, \quad S_d = \frac{1}{n_d} \sum_{j \in d} S_j

    with :math:`S_j` the statistics of sample j and :math:`n_d` the number of samples of part d (MLLM-Pruner, OpenReview
    jmQKr47S77, Eq. 11, whose example is 120 samples of three sets in equal parts). Without `weights`
    :math:`\alpha_d = n_d / n`: all samples count the same.

    Args:
        sources: The parts.
        ratios: Share of each part, in any unit: `[1, 1, 1]` are three equal parts.
        weights: Weight of each part's statistics, in any unit, whatever its share of the samples is. The statistics of
            scorers are weighted; the budget of an adaptive pool and the survey of an allocation see samples as they
            are. Default: the part's share of the samples.

    Raises:
        ValueError: There is no part, or not one positive ratio (and weight, if any are given) for each.
    """

    def __init__(
        self, sources: list[CalibrationSource], ratios: list[float], weights: list[float] | None = None
    ) -> None:
        if not sources:
            raise ValueError("`sources` []: needs at least one source")
        for name, values in (("ratios", ratios), ("weights", weights)):
            if values is None:
                continue
            if len(values) != len(sources):
                problem = f"{len(values)} {name} for {len(sources)} sources; give one for each"
                raise ValueError(f"`{name}` {values}: {problem}")
            for value in values:
                if not (math.isfinite(value) and value > 0):
                    raise ValueError(f"`{name}` {value}: must be a finite number larger than 0")
        self.sources = list(sources)
        self.ratios = list(ratios)
        self.weights = None if weights is None else list(weights)
        # Ready-made inputs need no processor, but one part of another kind is enough to need one.
        self.needs_processor = any(source.needs_processor for source in sources)  # type: ignore[misc]

    def setup(self) -> None:
        for source in self.sources:
            source.setup()

    def verify(self, indices: Sequence[int]) -> None:
        for part, source in enumerate(self.sources):
            source.verify([index - self._offsets()[part] for index in indices if self.part_of(index) == part])

    def __len__(self) -> int:
        return self._offsets()[-1]

    def __getitem__(self, index: int) -> Sample:
        part = self.part_of(index)
        return self.sources[part][index - self._offsets()[part]]

    def part_of(self, index: int) -> int:
        """Number of the source that sample `index` is of: the samples of the first come first."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return sum(index >= end for end in self._offsets()[1:])

    def _offsets(self) -> list[int]:
        return [0, *accumulate(len(source) for source in self.sources)]

    @property
    def available(self) -> int:
        """The most samples that can be chosen in the ratios."""
        # A share that is rounded down may be of almost one sample more than the part has.
        most = min((len(source) + 1) * sum(self.ratios) / ratio for source, ratio in zip(self.sources, self.ratios))
        bound = min(math.ceil(most), len(self))
        return next(count for count in range(bound, -1, -1) if self._fits(count))

    def _fits(self, count: int) -> bool:
        return all(share <= len(source) for share, source in zip(self.shares(count), self.sources))

    def shares(self, count: int) -> list[int]:
        """How many of `count` samples come from each part.

        Example:
            >>> from lvlm_prune.data import TextSource
            >>> MixtureSource([TextSource("a"), TextSource("b"), TextSource("c")], [1, 1, 2]).shares(10)
            [3, 2, 5]
        """
        exact = [count * ratio / sum(self.ratios) for ratio in self.ratios]
        # 0.1 + 0.2 is not 0.3: a share within rounding error of a whole number is that number.
        whole = [math.floor(share + 1e-9) for share in exact]
        remainders = [share - number for share, number in zip(exact, whole)]
        for part in sorted(range(len(exact)), key=lambda part: (-round(remainders[part], 9), part)):
            if sum(whole) < count:
                whole[part] += 1
        return whole

    def choose(self, count: int, seed: int) -> list[int]:
        """Each part's own choice, dealt out evenly: any beginning of the calibration set is mixed as well.

        Raises:
            ValueError: A part has fewer samples than its share, or a weight and no share.
        """
        shares = self.shares(count)
        placed: list[tuple[float, int, int]] = []
        for part, (source, share) in enumerate(zip(self.sources, shares)):
            if share > len(source):
                problem = f"{self._label(part)} holds only {len(source)} samples, its share is {share}"
                raise ValueError(f"`num_samples` {count}: {problem}")
            if self.weights is not None and share == 0:
                problem = f"leaves no sample for {self._label(part)}, which has a weight"
                raise ValueError(f"`num_samples` {count}: {problem}")
            for place, index in enumerate(source.choose(share, seed)):
                placed.append(((place + 0.5) / share, part, self._offsets()[part] + index))
        return [index for _, _, index in sorted(placed)]

    def sample_weights(self, indices: Sequence[int]) -> list[float]:
        """See `CalibrationSource.sample_weights`; every part's samples together count as much as its weight says.

        Raises:
            RunError: No sample of a part that has a weight was read.
        """
        weights = [1.0] * len(indices)
        for part, source in enumerate(self.sources):
            places = [place for place, index in enumerate(indices) if self.part_of(index) == part]
            factor = 1.0
            if self.weights is not None:
                if not places:
                    raise RunError(f"no sample of {self._label(part)} could be read, which has a weight")
                factor = self.weights[part] / sum(self.weights) * len(indices) / len(places)
            within = source.sample_weights([indices[place] - self._offsets()[part] for place in places])
            for place, weight in zip(places, within):
                weights[place] = factor * weight
        return weights

    def _label(self, part: int) -> str:
        return f"part {part + 1} ({type(self.sources[part]).__name__})"
