"""Diversity: how far a visual token is from the other visual tokens.

Diversity-based selection (DBS) of asymmetric text-visual pruning (arXiv 2603.16001, section A5.2 of its supplement).
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lvlm_prune.methods.diversity import distance_to_nearest, distance_to_others
from lvlm_prune.methods.saliency.base import Saliency
from lvlm_prune.methods.tokens import Tokens


class DiversitySaliency(Saliency):
    r"""Mean cosine distance of a visual token's block input to the sample's other visual tokens.

    .. math:: s_v = \frac{1}{n-1} \sum_{u \ne v} \bigl(1 - \cos(x^{in}_v, x^{in}_u)\bigr)

    The mean sets the budget; the tokens themselves are chosen by max-min selection on cosine distance, so that they
    cover the image: first one token, then always the one whose nearest chosen token is farthest, ties by lowest index.
    Whatever the budget, the tokens are the first ones of one and the same order.

    Args:
        start: The first token: that of largest `mean` distance to the others, or, as in the code of DivPrune that the
            paper cites, that whose `nearest` other token is farthest.

    Raises:
        ValueError: `start` is unknown.

    Example:
        >>> vectors = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
        >>> tokens = Tokens(vectors, vectors, visual=torch.ones(3, dtype=torch.bool))
        >>> saliency = DiversitySaliency()(tokens)
        >>> DiversitySaliency().ranking(tokens, saliency, 3)
        tensor([2, 0, 1])
    """

    name = "diversity"
    maximum = 2.0

    def __init__(self, start: Literal["mean", "nearest"] = "mean") -> None:
        if start not in ("mean", "nearest"):
            raise ValueError(f"`start` {start}: must be `mean` or `nearest`")
        self.start = start

    def __call__(self, tokens: Tokens) -> Tensor:
        """Saliency of each visual token, float32 of shape (n_visual,), between 0 and 2."""
        return distance_to_others(tokens.hidden_in[tokens.visual_index])

    def ranking(self, tokens: Tokens, saliency: Tensor, count: int) -> Tensor:
        """The first `count` visual tokens in the order of max-min selection."""
        unit = normalize(tokens.hidden_in[tokens.visual_index].float(), dim=-1)
        order = torch.empty(min(count, len(unit)), dtype=torch.int64, device=unit.device)
        first = saliency if self.start == "mean" else distance_to_nearest(unit)
        nearest = torch.full_like(saliency, torch.inf)
        # Indices stay on the device, and are tensors of one element, because to index by a number is to wait for it: a
        # loop that waited at each step would cost more than the distances.
        for step in range(len(order)):
            chosen = (first if step == 0 else nearest).argmax(keepdim=True)
            order[step : step + 1] = chosen
            nearest = torch.minimum(nearest, 1 - (unit @ unit[chosen].T).flatten())
            nearest.index_fill_(0, chosen, -torch.inf)
        return order
