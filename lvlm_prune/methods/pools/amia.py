"""AMIA: attended and diverse tokens, until they are distributed like all tokens (TAMP, ACL Findings 2025, section 3.4).

    contribution a ─► 3 nearest neighbours by cosine ─► take argmax, weaken its neighbours ─► order of all tokens
    kernel exp(-d) ─► distance between the first k of them and all tokens                 ─► smallest k that will do

The order does not depend on where it is cut: the cut is looked for in one stretch of it after another, O(T) per token.
All of it needs a few rows of the distances at a time: of a long sample the whole matrix is never held.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lvlm_prune.methods.asking import Asking, asked_together
from lvlm_prune.methods.diversity import Pairs, diversity_terms
from lvlm_prune.methods.pools.base import Pool
from lvlm_prune.methods.products import HELD_PRODUCTS, inner_products, running_sums
from lvlm_prune.methods.tokens import Selection, Tokens, on_device

NeighbourRule = Literal["released", "paper"]

_NEIGHBOURS = 3
_GAIN = 1.0
_SUPPRESSION = 0.2
_TOLERANCE = 0.1

# Tokens of the order that are found before the cut is looked for. Most samples need few.
_FIRST_STRETCH = 64

# The most distances that are looked at at once, 16 MiB.
_AT_ONCE = 2**22

# Shorter vectors have no direction, as in torch.nn.functional.normalize.
_SHORTEST = 1e-12


class AMIAPool(Pool):
    r"""For each Linear, tokens of its output that are attended, spread out, and together like all tokens.

    With :math:`d_{ij}` the cosine distance of output tokens and :math:`a` the attention of the last token:

    .. math::
        a_i \mathrel{+}= \sum_{j \in N_3(i)} e^{-d_{ij}} a_j, \qquad
        i^* = \arg\max a, \quad a_j \mathrel{-}= e^{-0.2 d_{i^*j}} \max(a_{i^*}, 0) \text{ for } j \in N_3(i^*)

    until, with the kernel :math:`K_{ij} = e^{-d_{ij}}`, chosen tokens :math:`C`, all tokens :math:`C'`, and :math:`s`
    the diversity of the sample (`lvlm_prune.methods.diversity.modality_diversity`),

    .. math:: \bar K(C, C) + \bar K(C', C') - 2 \bar K(C, C') < 0.1 \sqrt s

    Source: TAMP, Eqs. 3 to 5. A token is taken once; a sample whose tokens never match ends with all of them, as it
    does where all are identical (the released code never ends with a single visual token).

    Args:
        pairs: `all` pairs count for the diversity, as in the paper, or only those of `positive` cosine, as in the
            released code.
        neighbours: Whom a token leaves out when it looks for its three nearest ones: itself, as in the `paper`, ties by
            lowest index; or the nearest of all tokens, which the `released` code takes for the token itself, ties as
            `topk` leaves them. The two differ where tokens repeat: the nearest of identical tokens may be another one.

    Raises:
        ValueError: `pairs` or `neighbours` is unknown.

    Example:
        >>> hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [0.0, 1.1]])
        >>> visual, attention = torch.tensor([False, True, True, True]), torch.tensor([0.4, 0.3, 0.2, 0.1])
        >>> tokens = Tokens(hidden, hidden, visual, outputs={"up_proj": hidden}, attention_last=attention)
        >>> AMIAPool().select(tokens, "up_proj").weights
        tensor([False, False,  True, False])
    """

    name = "amia"
    per_linear = True
    needs = frozenset({"outputs", "attention_last"})

    def __init__(self, pairs: Pairs = "all", neighbours: NeighbourRule = "released") -> None:
        if pairs not in ("all", "positive"):
            raise ValueError(f"`pairs` {pairs}: must be `all` or `positive`")
        if neighbours not in ("released", "paper"):
            raise ValueError(f"`neighbours` {neighbours}: must be `released` or `paper`")
        self.pairs, self.neighbours = pairs, neighbours

    def working_bytes(self, tokens: int, visual: int, width: int, widest: int, itemsize: int) -> int:
        """See `Pool.working_bytes`: outputs of unit length, distances while they are held, a stripe of them."""
        copies = 4 if self.pairs == "all" else 12
        held = tokens**2 if tokens**2 <= HELD_PRODUCTS else 0
        return tokens * widest * copies + 4 * held + 12 * min(tokens**2, _AT_ONCE)

    def select(self, tokens: Tokens, linear: str | None = None) -> Selection:
        """Weight one for the tokens that AMIA takes for this Linear, zero for the rest."""
        assert linear is not None
        return self.select_each(tokens, [linear])[linear]

    def select_each(self, tokens: Tokens, linears: Sequence[str]) -> dict[str, Selection]:
        """Weight one for the tokens taken for each Linear; as many are in work at once as may be held."""
        together = max(HELD_PRODUCTS // max(len(tokens.visual), 1) ** 2, 1) if tokens.visual.is_cuda else 1
        found: dict[str, Selection] = {}
        for start in range(0, len(linears), together):
            some = linears[start : start + together]
            found |= zip(some, asked_together([self._choose(tokens, linear) for linear in some]))
        return found

    def _choose(self, tokens: Tokens, linear: str) -> Asking[Selection]:
        assert tokens.attention_last is not None
        count = len(tokens.visual)
        # Streams that run side by side are one vector per token.
        outputs = tokens.outputs[linear].unflatten(0, (-1, count)).movedim(0, 1).flatten(1)
        unit = outputs.to(torch.float32, copy=True)
        unit /= torch.linalg.vector_norm(unit, dim=-1, keepdim=True).clamp_(min=_SHORTEST)
        distances = Distances(unit)
        around = neighbourhoods(distances, self.neighbours)
        terms = list(diversity_terms(unit, tokens.modality, self.pairs, tokens.modality_counts).values())
        del unit
        known = yield [*contributions(around, tokens.attention_last.float()), *terms]
        diversity = sum(float(term) for term in known[3:]) / max(len(terms), 1)
        order = selection_order(*known[:3])
        tolerance = _TOLERANCE * max(diversity, 0.0) ** 0.5
        taken = yield from matching_prefix(distances, around.closeness, order, tolerance)
        return Selection(torch.zeros_like(tokens.visual).index_fill_(0, taken, True))


class Distances:
    """Cosine distances between tokens; the matrix of all of them is held while it is small.

    Args:
        unit: Vectors of length one, float32 of shape (T, C).

    Attributes:
        at_once: How many rows may be asked for at once.
    """

    def __init__(self, unit: Tensor) -> None:
        self._whole = inner_products(unit).neg_().add_(1) if len(unit) ** 2 <= HELD_PRODUCTS else None
        self._unit = unit if self._whole is None else None  # not both are held
        self._count = len(unit)
        self.at_once = max(_AT_ONCE // len(unit), 1)

    def rows(self, which: slice | Tensor) -> Tensor:
        """Distances of some tokens to all, float32 of shape (n, T); not to be changed."""
        if self._whole is not None:
            return self._whole[which]
        assert self._unit is not None
        return (self._unit[which] @ self._unit.T).neg_().add_(1)

    def stripes(self) -> Iterator[Tensor]:
        """All T rows of distances, some at a time, each of shape (rows, T)."""
        for start in range(0, self._count, self.at_once):
            yield self.rows(slice(start, start + self.at_once))


@dataclass(frozen=True)
class Neighbourhoods:
    """What AMIA wants to know about each token before it takes the first one.

    Args:
        neighbours: Its nearest tokens, int64 of shape (T, 3), fewer where there are fewer.
        near: Their distances, float32 of the same shape.
        closeness: Mean of the kernel exp(-distance) to all tokens, float32 of shape (T,).
    """

    neighbours: Tensor
    near: Tensor
    closeness: Tensor


def neighbourhoods(distances: Distances, rule: NeighbourRule = "released") -> Neighbourhoods:
    """Look at every row of the distances once.

    Args:
        distances: Between all T tokens of a sample, row by row.
        rule: Which tokens are the nearest ones of a token, see `AMIAPool`.
    """
    neighbours, near, closeness = [], [], []
    first = 0
    for rows in distances.stripes():
        count = min(1 + _NEIGHBOURS, rows.shape[1])
        if rule == "released":
            found = rows.topk(count, largest=False).indices[:, 1:]
        else:
            found = _others(nearest(rows, count), first)
        neighbours.append(found)
        near.append(rows.gather(1, found))
        closeness.append((-rows).exp_().mean(1))
        first += len(rows)
    return Neighbourhoods(torch.cat(neighbours), torch.cat(near), torch.cat(closeness))


def nearest(distances: Tensor, count: int) -> Tensor:
    """The `count` lowest values of each row, lowest first, ties by lowest index, which `topk` does not promise.

    Args:
        distances: From n tokens to all T, shape (n, T).
        count: How many neighbours of each token, at most T.

    Returns:
        Indices, int64 of shape (n, count).

    Example:
        >>> nearest(torch.tensor([[0.5, 0.0, 0.5, 0.5]]), 2)
        tensor([[1, 0]])
    """
    left = distances.clone()
    found = []
    for _ in range(count):
        found.append(left.argmin(1, keepdim=True))
        left.scatter_(1, found[-1], torch.inf)
    return torch.cat(found, 1)


def _others(found: Tensor, first: int) -> Tensor:
    """All but one of the tokens found for each row: without the row's own token, or else without the last one.

    Args:
        found: Indices, int64 of shape (n, k).
        first: Index of the first row's own token.
    """
    itself = found == torch.arange(first, first + len(found), device=found.device)[:, None]
    # A token with more identical ones than are looked at is not among them.
    itself[:, -1] |= ~itself.any(1)
    place = torch.arange(found.shape[1] - 1, device=found.device)
    return found.gather(1, place + (place >= itself.int().argmax(1, keepdim=True)))


def contributions(around: Neighbourhoods, attention: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `selection_order` is told: contributions, neighbours, and the share by which each is weakened.

    Args:
        around: The neighbours of each token.
        attention: Attention of the last token to each, float32 of shape (T,).
    """
    contribution = attention + (torch.exp(-_GAIN * around.near) * attention[around.neighbours]).sum(-1)
    return contribution, around.neighbours, torch.exp(-_SUPPRESSION * around.near)


def selection_order(contribution: Tensor, neighbours: Tensor, weakening: Tensor) -> Iterator[Tensor]:
    """All tokens in the order in which AMIA takes them, a stretch at a time, each twice as long as the one before.

    Each step changes three numbers and waits for an argmax: on a GPU that would be all waiting.

    Args:
        contribution: Of each token, float32 of shape (T,), on the CPU as the others.
        neighbours: Its nearest tokens, int64 of shape (T, 3) or fewer.
        weakening: The share of its contribution that each of them loses when it is taken, float32 of the same shape.

    Yields:
        Tokens, int64, on the CPU.
    """
    values, weakened, by = contribution.numpy().copy(), neighbours.numpy(), weakening.numpy()
    start, length = 0, _FIRST_STRETCH
    while start < len(values):
        order = np.empty(min(length, len(values) - start), dtype=np.int64)
        for step in range(len(order)):
            order[step] = taken = values.argmax()
            values[weakened[taken]] -= by[taken] * max(values[taken], np.float32(0))
            values[taken] = -np.inf
        yield torch.from_numpy(order)
        start, length = start + length, 2 * length


def matching_prefix(
    distances: Distances, closeness: Tensor, order: Iterable[Tensor], tolerance: float
) -> Asking[Tensor]:
    """The fewest tokens, taken in `order`, whose squared mean discrepancy to all tokens is below `tolerance`.

    Args:
        distances: Between all T tokens of a sample, row by row.
        closeness: Mean of the kernel exp(-distance) of each token to all, float32 of shape (T,).
        order: All tokens in the order in which they are taken, int64, in stretches on the CPU; no more of them are
            asked for than the answer needs.
        tolerance: Bound on the discrepancy.

    Returns:
        Tokens, int64; all of them where fewer will not do.
    """
    everything = closeness.mean()
    taken = torch.empty(0, dtype=torch.int64, device=closeness.device)
    across = inside = torch.zeros((), dtype=torch.float64, device=closeness.device)
    for part in (part for stretch in order for part in stretch.split(distances.at_once)):
        part = on_device(part, closeness.device)
        before, taken = len(taken), torch.cat([taken, part])
        sizes = torch.arange(before + 1, len(taken) + 1, device=taken.device)
        rows = distances.rows(part)[:, taken].neg_().exp_()
        added = 2 * rows.tril(before - 1).sum(1) + rows.diagonal(before)
        inside_sums = inside + running_sums(added.double())
        across_sums = across + running_sums(closeness[part].double())
        discrepancy = everything + inside_sums / sizes**2 - 2 * across_sums / sizes
        (below,) = yield [discrepancy < tolerance]
        if below.any():
            return taken[: before + int(below.int().argmax()) + 1]
        inside, across = inside_sums[-1], across_sums[-1]
    return taken
