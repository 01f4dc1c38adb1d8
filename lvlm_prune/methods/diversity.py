"""How different the tokens of a sample are, within a modality and between modalities.

    text  ·─·─·            within text       mean cosine distance over pairs, here 3
      ╲ ╳ ╱  between                         here 3 x 2 pairs
    visual ▫─▫             within visual     here 1 pair

TAMP (ACL Findings 2025) calls it modality diversity: it says how much of a Linear may go (section 3.2), and how closely
selected tokens have to match all tokens (section 3.4).
"""

from itertools import combinations
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lvlm_prune.methods.modality import AUDIO, IMAGE, TEXT, VIDEO

Pairs = Literal["all", "positive"]

# Image and video tokens are one modality here: both are visual.
_MODALITIES = {"text": (TEXT,), "visual": (IMAGE, VIDEO), "audio": (AUDIO,)}

# Shorter vectors have no direction, as in torch.nn.functional.normalize.
_SHORTEST = 1e-12

# Rows of a matrix of cosines that are held at once, where every single cosine has to be looked at.
_ROWS = 1024


def modality_diversity(outputs: Tensor, modality: Tensor, pairs: Pairs = "all") -> tuple[float, dict[str, float]]:
    r"""Mean of the cosine distances within each modality and between modalities.

    .. math:: s = \tfrac13 (s_v + s_l + s_{vl}), \quad s_m = 1 - \operatorname{mean}_{i<j \in m} \cos(z_i, z_j)

    Source: TAMP, section 3.2. A sample counts the terms that it has: :math:`s_m` needs two tokens of the modality, and
    :math:`s_{vl}` two modalities. Audio is a modality of its own (:math:`s_a`); where a sample has three, the means of
    the three pairs of modalities are averaged. The plain means need no matrix of all pairs: they follow from the sums
    of the unit vectors.

    Args:
        outputs: One vector per token, of shape (T, C), any float dtype.
        modality: Modality code of each token as in `methods.modality`, int8 of shape (T,); padding is left out.
        pairs: `all` pairs of a modality, as in the paper, or only those of `positive` cosine, as in the released code
            (no such pair: a mean cosine of 0, where that code gives NaN). Between modalities all pairs count.

    Returns:
        The score, between 0 (all tokens alike) and about 1 (all orthogonal), 0.0 where there is no term; and the terms
        that there are, of the keys `text`, `visual`, `audio` and `between`.

    Example:
        >>> outputs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [0.0, 3.0]])
        >>> score, terms = modality_diversity(outputs, torch.tensor([0, 0, 1, 1], dtype=torch.int8))
        >>> {name: round(value, 6) for name, value in terms.items()}, round(score, 6)
        ({'text': 1.0, 'visual': 0.0, 'between': 0.5}, 0.5)
    """
    terms = diversity_terms(outputs, modality, pairs)
    if not terms:
        return 0.0, {}
    # One transfer from the device for all terms.
    values = torch.stack(list(terms.values())).tolist()
    return sum(values) / len(values), dict(zip(terms, values))


def diversity_terms(
    outputs: Tensor, modality: Tensor, pairs: Pairs = "all", counts: tuple[int, int, int] | None = None
) -> dict[str, Tensor]:
    """The terms of `modality_diversity`, whose mean is the score, as float64 numbers on the device.

    Args:
        outputs: What the Linear makes of the tokens, shape (T, C_out).
        modality: Modality code of each token, shape (T,).
        pairs: Which pairs of tokens of one modality count, see `modality_diversity`.
        counts: Numbers of text, visual and audio tokens, where they are known: to count them is to wait for a GPU.
    """
    members = torch.stack([_of_modality(modality, codes) for codes in _MODALITIES.values()])
    sums, squares = _sums_of_units(outputs, members)
    known = members.sum(1).tolist() if counts is None else counts
    found = {name: (row, count) for row, (name, count) in enumerate(zip(_MODALITIES, known)) if count}
    terms = {}
    for name, (row, count) in found.items():
        if count < 2:
            continue
        if pairs == "positive":
            cosine = _mean_positive_cosine(outputs[members[row]])
        else:
            cosine = _mean_cosine(sums[row], squares[row], count)
        terms[name] = 1 - cosine
    across = [
        (sums[one] @ sums[other]) / (one_count * other_count)
        for (one, one_count), (other, other_count) in combinations(found.values(), 2)
    ]
    if across:
        terms["between"] = 1 - torch.stack(across).mean()
    return terms


def mean_diversity(outputs: Tensor, pairs: Pairs = "all") -> Tensor:
    """Mean cosine distance over all pairs of tokens, whatever their modality; 0 for fewer than two tokens.

    Args:
        outputs: One vector per token, of shape (T, C), any float dtype; padding left out.
        pairs: `all`, or only the pairs of `positive` cosine as in TAMP's released code.

    Returns:
        float64 without dimension, on the device.

    Example:
        >>> mean_diversity(torch.eye(3))
        tensor(1., dtype=torch.float64)
    """
    count = len(outputs)
    if count < 2:
        return torch.zeros((), dtype=torch.float64, device=outputs.device)
    if pairs == "positive":
        return 1 - _mean_positive_cosine(outputs)
    sums, squares = _sums_of_units(outputs, torch.ones(1, count, dtype=torch.bool, device=outputs.device))
    return 1 - _mean_cosine(sums[0], squares[0], count)


def distance_to_others(vectors: Tensor) -> Tensor:
    r"""Mean cosine distance of each vector to the others.

    .. math:: d_v = \frac{1}{n-1} \sum_{u \ne v} (1 - \cos(x_v, x_u))
        = 1 - \frac{\hat x_v \cdot \sum_u \hat x_u - 1}{n - 1}

    Args:
        vectors: Shape (n, D), any float dtype.

    Returns:
        float32 of shape (n,); 0 for a single vector.

    Example:
        >>> distance_to_others(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
        tensor([0.5000, 0.5000, 1.0000])
    """
    unit = normalize(vectors.float(), dim=-1)
    if len(unit) < 2:
        return unit.new_zeros(len(unit))
    others = unit @ unit.sum(0, dtype=torch.float64).float() - unit.square().sum(-1)
    return 1 - others / (len(unit) - 1)


def distance_to_nearest(unit: Tensor) -> Tensor:
    """Cosine distance of each vector to the nearest of the others.

    Args:
        unit: Vectors of length one, float32 of shape (n, D).

    Returns:
        float32 of shape (n,); infinite for a single vector.

    Example:
        >>> distance_to_nearest(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
        tensor([0., 0., 1.])
    """
    found = [unit.new_empty(0)]
    for start in range(0, len(unit), _ROWS):
        distances = 1 - unit[start : start + _ROWS] @ unit.T
        distances.diagonal(start).fill_(torch.inf)
        found.append(distances.amin(1))
    return torch.cat(found)


def _of_modality(modality: Tensor, codes: tuple[int, ...]) -> Tensor:
    members = modality == codes[0]
    for code in codes[1:]:
        members |= modality == code
    return members


def _sums_of_units(vectors: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the unit vectors of each group, and of their squared lengths (0 for a vector of zeros, else 1).

    Args:
        vectors: Shape (T, C), any float dtype.
        members: Which vectors are in each group, bool of shape (G, T).

    Returns:
        float64 of shape (G, C) and of shape (G,).
    """
    vectors = vectors.float()
    length = torch.linalg.vector_norm(vectors, dim=-1)
    # The unit vectors themselves need not be written down.
    inverse = 1 / length.clamp(min=_SHORTEST)
    sums = (members * inverse) @ vectors
    return sums.double(), members.double() @ (length * inverse).double().square()


def _mean_cosine(total: Tensor, squares: Tensor, count: int) -> Tensor:
    """Mean over the pairs of vectors, whose `total` squared counts each pair twice and each vector once."""
    return (total @ total - squares) / (count * (count - 1))


def _mean_positive_cosine(vectors: Tensor) -> Tensor:
    """Mean over the pairs of positive cosine, a stripe of the matrix of all pairs at a time."""
    unit = normalize(vectors.float(), dim=-1)
    sum_positive = count = torch.zeros((), dtype=torch.float64, device=unit.device)
    for start in range(0, len(unit), _ROWS):
        cosines = (unit[start : start + _ROWS] @ unit[start:].T).triu(1)
        sum_positive = sum_positive + cosines.clamp(min=0).sum(dtype=torch.float64)
        count = count + (cosines > 0).sum()
    return sum_positive / count.clamp(min=1)
