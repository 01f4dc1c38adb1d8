"""Water-filling: a budget of weights to keep, dealt out over groups of Linears in proportion to their scores.

keep │ ██ full      each group first keeps what the largest allowed sparsity leaves it,
     │ ██ ▓▓        the rest of the budget is poured in proportion to score,
     │ ██ ▓▓ ░░     what a full group cannot hold flows on to the others
     └─────────────
"""

from collections.abc import Mapping, Sequence

from lvlm_prune.methods.allocation.base import Allocation

MARGIN = 0.1
"""How far above the target the sparsity of a group may rise, as in the scripts of ECoFLaP and TAMP."""


def water_filling(scores: Sequence[float], sizes: Sequence[int], sparsity: float, maximum: float) -> list[float]:
    r"""Sparsity of each group; the more a group scores, the more of it stays.

    .. math:: k_g \leftarrow n_g (1 - s_{max}), \quad
              k_g \leftarrow \min\Bigl(n_g,\; k_g + \frac{c_g}{\sum_h c_h} \bigl(N (1 - s) - \sum_h k_h\bigr)\Bigr)

    repeated over the groups h that are not full, until the budget :math:`N (1 - s)` is used; groups without any score
    share what the others cannot hold in proportion to their size. Source: `return_sparsity` of ECoFLaP (ICLR 2024) and
    TAMP (ACL Findings 2025), whose counts are rounded up to whole weights at every step and add up to the budget only
    roughly; here they are real numbers and add up to it.

    Args:
        scores: Score of each group, not negative.
        sizes: Number of weights of each group.
        sparsity: Share of all weights that is to go.
        maximum: Largest sparsity that a group may get.

    Raises:
        ValueError: The target is larger than the maximum.

    Example:
        >>> [round(value, 3) for value in water_filling([3.0, 1.0], [100, 100], sparsity=0.5, maximum=0.6)]
        [0.45, 0.55]
        >>> [round(value, 3) for value in water_filling([99.0, 1.0], [10, 100], sparsity=0.5, maximum=0.6)]
        [0.0, 0.55]
    """
    if sparsity > maximum:
        problem = f"cannot be reached: no Linear may get more than {maximum:g} (`allocation.max_sparsity`)"
        raise ValueError(f"`sparsity` {sparsity}: {problem}")
    kept = [size * (1 - maximum) for size in sizes]
    budget = sum(sizes) * (1 - sparsity)
    open_groups = [index for index, size in enumerate(sizes) if kept[index] < size]
    # Each round either uses up the budget or fills a group.
    while open_groups and (rest := budget - sum(kept)) > 0:
        shares = {index: float(scores[index]) for index in open_groups}
        if not max(shares.values()) > 0:
            shares = {index: float(sizes[index]) for index in open_groups}
        largest = max(shares.values())
        shares = {index: share / largest for index, share in shares.items()}  # their sum is a number, however large
        total = sum(shares.values())
        poured = {index: kept[index] + share / total * rest for index, share in shares.items()}
        for index, level in poured.items():
            kept[index] = min(level, float(sizes[index]))
        full = {index for index, level in poured.items() if level >= sizes[index]}
        if not full:
            break
        open_groups = [index for index in open_groups if index not in full]
    return [min(max(1 - keep / size, 0.0), 1.0) for keep, size in zip(kept, sizes)]


def fill_groups(
    scores: Mapping[str, float],
    shapes: Mapping[str, tuple[int, int]],
    groups: Mapping[str, str],
    sparsity: float,
    maximum: float,
    average: bool = False,
) -> dict[str, float]:
    """Water-filling over groups of Linears that get the same sparsity.

    Args:
        scores: Name of each Linear -> score; a group scores the sum.
        shapes: Name of each Linear -> (C_out, C_in).
        groups: Name of each Linear -> name of its group.
        sparsity: Share of all weights that is to go.
        maximum: Largest sparsity that a group may get.
        average: Divide the score of a group by its number of weights.

    Returns:
        Sparsity of each Linear, in the order of `shapes`.

    Raises:
        ValueError: The target is larger than the maximum.

    Example:
        >>> shapes = {"q_proj": (4, 4), "k_proj": (4, 4), "up_proj": (8, 4)}
        >>> groups = {"q_proj": "attention", "k_proj": "attention", "up_proj": "MLP"}
        >>> fill_groups({"q_proj": 2.0, "k_proj": 1.0, "up_proj": 1.0}, shapes, groups, sparsity=0.5, maximum=0.75)
        {'q_proj': 0.375, 'k_proj': 0.375, 'up_proj': 0.625}
    """
    totals: dict[str, float] = dict.fromkeys((groups[name] for name in shapes), 0.0)
    sizes: dict[str, int] = dict.fromkeys(totals, 0)
    for name, (rows, columns) in shapes.items():
        totals[groups[name]] += scores[name]
        sizes[groups[name]] += rows * columns
    if average:
        totals = {group: total / sizes[group] for group, total in totals.items()}
    found = dict(zip(totals, water_filling(list(totals.values()), list(sizes.values()), sparsity, maximum)))
    return {name: found[groups[name]] for name in shapes}


class WaterFillingAllocation(Allocation):
    """An allocation that deals out by water-filling. Subclass it and call `fill` with the scores.

    Args:
        max_sparsity: Largest sparsity that a group may get. Default: 0.1 above the target.

    Raises:
        ValueError: `max_sparsity` is no share.
    """

    def __init__(self, max_sparsity: float | None = None) -> None:
        if max_sparsity is not None and not 0 < max_sparsity <= 1:
            raise ValueError(f"`max_sparsity` {max_sparsity}: must be larger than 0, and at most 1")
        self.max_sparsity = max_sparsity

    def check(self, shapes: Mapping[str, tuple[int, int]], sparsity: float) -> None:
        """Refuse a target above the maximum."""
        self._maximum(sparsity)

    def fill(
        self,
        scores: Mapping[str, float],
        shapes: Mapping[str, tuple[int, int]],
        groups: Mapping[str, str],
        sparsity: float,
        average: bool = False,
    ) -> dict[str, float]:
        """Sparsity of each Linear, see `fill_groups`."""
        return fill_groups(scores, shapes, groups, sparsity, self._maximum(sparsity), average)

    def _maximum(self, sparsity: float) -> float:
        if self.max_sparsity is None:
            return min(sparsity + MARGIN, 1.0)
        if sparsity > self.max_sparsity:
            problem = f"below the target {sparsity:g}, which no allocation can reach under this maximum"
            raise ValueError(f"`max_sparsity` {self.max_sparsity}: {problem}")
        return self.max_sparsity
