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
from lvlm_prune.errors import InputError


class MixtureSource(CalibrationSource):
    """A source made of sources, from each of which a fixed share of the calibration set comes.

    The shares are exact: of n samples in the ratios r, part d gives `n r_d / sum(r)`; where that is no whole number,
    the largest remainders are rounded up (the first of equal ones). Within its share each part chooses as it would on
    its own. Parts may be of different kinds: conversations, documents and ready-made model inputs.

    The statistics of all samples are added up. With the ratios as weights of the sets this is Eq. 11 of MLLM-Pruner
    (OpenReview jmQKr47S77), whose example is 120 samples of three sets in equal parts.

    Args:
        sources: The parts.
        ratios: Share of each part, in any unit: `[1, 1, 1]` are three equal parts.

    Raises:
        InputError: There is no part, or not one positive ratio for each.
    """

    def __init__(self, sources: list[CalibrationSource], ratios: list[float]) -> None:
        if not sources:
            raise InputError("data.source.sources", "[]", "needs at least one source")
        if len(ratios) != len(sources):
            problem = f"{len(ratios)} ratios for {len(sources)} sources; give one for each"
            raise InputError("data.source.ratios", ratios, problem)
        for ratio in ratios:
            if not (math.isfinite(ratio) and ratio > 0):
                raise InputError("data.source.ratios", ratio, "must be a finite number larger than 0")
        self.sources = list(sources)
        self.ratios = list(ratios)
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
        most = min(len(source) * sum(self.ratios) / ratio for source, ratio in zip(self.sources, self.ratios))
        # Rounding up a remainder may ask a part for one more than it has, rounding down for one less.
        bound = math.floor(most) + len(self.sources)
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
            InputError: A part has fewer samples than its share.
        """
        shares = self.shares(count)
        placed: list[tuple[float, int, int]] = []
        for part, (source, share) in enumerate(zip(self.sources, shares)):
            if share > len(source):
                name = type(source).__name__
                problem = f"part {part + 1} ({name}) holds only {len(source)} samples, its share is {share}"
                raise InputError("data.num_samples", count, problem)
            for place, index in enumerate(source.choose(share, seed)):
                placed.append(((place + 0.5) / share, part, self._offsets()[part] + index))
        return [index for _, _, index in sorted(placed)]
