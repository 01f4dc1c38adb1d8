"""AMIA: attended and diverse tokens, until they are distributed like all tokens (TAMP, ACL Findings 2025, section 3.4).

    contribution a ─► 3 nearest neighbours by cosine ─► take argmax, weaken its neighbours ─► order of all tokens
    kernel exp(-d) ─► distance between the first k of them and all tokens                 ─► smallest k that will do

The order does not depend on where it is cut: the cut is looked for in one stretch of it after another, O(T) per token.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lvlm_prune.diversity import Pairs, modality_diversity
from lvlm_prune.errors import InputError
from lvlm_prune.pools.base import Pool
from lvlm_prune.products import inner_products
from lvlm_prune.tokens import Selection, Tokens

_NEIGHBOURS = 3
_GAIN = 1.0
_SUPPRESSION = 0.2
_TOLERANCE = 0.1

# Tokens of the order that are found before the cut is looked for. Most samples need few.
_FIRST_STRETCH = 64


class AMIAPool(Pool):
    r"""For each Linear, tokens of its output that are attended, spread out, and together like all tokens.

    With :math:`d_{ij}` the cosine distance of output tokens and :math:`a` the attention of the last token:

    .. math::
        a_i \mathrel{+}= \sum_{j \in N_3(i)} e^{-d_{ij}} a_j, \qquad
        i^* = \arg\max a, \quad a_j \mathrel{-}= e^{-0.2 d_{i^*j}} \max(a_{i^*}, 0) \text{ for } j \in N_3(i^*)

    until, with the kernel :math:`K_{ij} = e^{-d_{ij}}`, chosen tokens :math:`C`, all tokens :math:`C'`, and :math:`s`
    the diversity of the sample (`lvlm_prune.diversity.modality_diversity`),

    .. math:: \bar K(C, C) + \bar K(C', C') - 2 \bar K(C, C') < 0.1 \sqrt s

    Source: TAMP, Eqs. 3 to 5. A token is taken once; a sample whose tokens never match ends with all of them, as it
    does where all are identical (the released code never ends with a single visual token).

    Args:
        pairs: `all` pairs count for the diversity, as in the paper, or only those of `positive` cosine, as in the
            released code.

    Raises:
        InputError: `pairs` is unknown.

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

    def __init__(self, pairs: Pairs = "all") -> None:
        if pairs not in ("all", "positive"):
            raise InputError("pruning.pool.pairs", pairs, "must be `all` or `positive`")
        self.pairs = pairs

    def working_bytes(self, tokens: int, visual: int, width: int, widest: int, itemsize: int) -> int:
        """See `Pool.working_bytes`: outputs of unit length, distances, and the kernel."""
        return tokens * widest * (itemsize + 8) + 16 * tokens**2

    def select(self, tokens: Tokens, linear: str | None = None) -> Selection:
        """Weight one for the tokens taken."""
        assert linear is not None
        assert tokens.attention_last is not None
        count = len(tokens.visual)
        # Streams that run side by side are one vector per token.
        outputs = tokens.outputs[linear].unflatten(0, (-1, count)).movedim(0, 1).flatten(1)
        unit = normalize(outputs.float(), dim=-1)
        distance = inner_products(unit).neg_().add_(1)
        order = selection_order(distance, tokens.attention_last.float())
        diversity, _ = modality_diversity(unit, tokens.modality, self.pairs)
        taken = matching_prefix(distance, order, _TOLERANCE * max(diversity, 0.0) ** 0.5)
        return Selection(torch.zeros_like(tokens.visual).index_fill_(0, taken, True))


def selection_order(distance: Tensor, attention: Tensor) -> Iterator[Tensor]:
    """All tokens in the order in which AMIA takes them, a stretch at a time, each twice as long as the one before.

    The nearest token of all is taken to be the token itself, as in the released code: of identical tokens it may be
    another one.

    Args:
        distance: Cosine distances between tokens, float32 of shape (T, T).
        attention: Attention of the last token to each, float32 of shape (T,).

    Yields:
        Tokens, int64.
    """
    nearest = distance.topk(min(1 + _NEIGHBOURS, len(distance)), largest=False)
    near, neighbours = nearest.values[:, 1:], nearest.indices[:, 1:]
    contribution = attention + (torch.exp(-_GAIN * near) * attention[neighbours]).sum(-1)
    # Each step changes three numbers and waits for an argmax: on a GPU that would be all waiting.
    values = contribution.cpu().numpy().copy()
    weakened = neighbours.cpu().numpy()
    by = torch.exp(-_SUPPRESSION * near).cpu().numpy()
    start, length = 0, _FIRST_STRETCH
    while start < len(values):
        order = np.empty(min(length, len(values) - start), dtype=np.int64)
        for step in range(len(order)):
            order[step] = taken = values.argmax()
            values[weakened[taken]] -= by[taken] * max(values[taken], np.float32(0))
            values[taken] = -np.inf
        yield torch.from_numpy(order).to(distance.device)
        start, length = start + length, 2 * length


def matching_prefix(distance: Tensor, order: Iterable[Tensor], tolerance: float) -> Tensor:
    """The fewest tokens, taken in `order`, whose squared mean discrepancy to all tokens is below `tolerance`.

    Args:
        distance: Cosine distances between tokens, float32 of shape (T, T).
        order: All tokens in the order in which they are taken, int64, in stretches; no more of them are asked for than
            the answer needs.
        tolerance: Bound on the discrepancy, with the kernel exp(-distance).

    Returns:
        Tokens, int64; all of them where fewer will not do.
    """
    kernel = (-distance).exp_()
    to_all = kernel.mean(1)
    everything = to_all.mean()
    taken = torch.empty(0, dtype=torch.int64, device=distance.device)
    across = inside = torch.zeros((), dtype=torch.float64, device=distance.device)
    for part in order:
        before, taken = len(taken), torch.cat([taken, part])
        sizes = torch.arange(before + 1, len(taken) + 1, device=distance.device)
        rows = kernel[part[:, None], taken]
        added = 2 * rows.tril(before - 1).sum(1) + rows.diagonal(before)
        inside_sums = inside + added.cumsum(0, dtype=torch.float64)
        across_sums = across + to_all[part].cumsum(0, dtype=torch.float64)
        discrepancy = everything + inside_sums / sizes**2 - 2 * across_sums / sizes
        below = (discrepancy < tolerance).nonzero().flatten()
        if len(below):
            return taken[: before + int(below[0]) + 1]
        inside, across = inside_sums[-1], across_sums[-1]
    return taken
