"""Drift: how far a block moves a visual token.

A token that a block hardly touches says little about which of its weights matter
(Mostly Text, Smart Visuals: asymmetric text-visual pruning, arXiv 2603.16001, Eq. 4).
"""

from torch import Tensor
from torch.nn.functional import cosine_similarity

from lvlm_prune.methods.saliency.base import Saliency
from lvlm_prune.methods.tokens import Tokens


class DriftSaliency(Saliency):
    r"""Cosine distance between a visual token before and after the block.

    .. math:: s_v = 1 - \cos(x^{in}_v, x^{out}_v)

    Computed in float32 whatever the model's dtype: in bfloat16 most values tie.

    Example:
        >>> import torch
        >>> swapped = Tokens(torch.eye(3), torch.eye(3)[[0, 2, 1]], visual=torch.tensor([False, True, True]))
        >>> DriftSaliency()(swapped)
        tensor([1., 1.])
    """

    name = "drift"
    maximum = 2.0

    def __call__(self, tokens: Tokens) -> Tensor:
        """Saliency of each visual token, float32 of shape (n_visual,), between 0 and 2."""
        return drift(tokens.hidden_in[tokens.visual_index], tokens.hidden_out[tokens.visual_index])


def drift(before: Tensor, after: Tensor) -> Tensor:
    """Cosine distance between tokens before and after a block, both of shape (n, D); float32 of shape (n,)."""
    return 1 - cosine_similarity(before.float(), after.float(), dim=-1)
