"""Attention: how much the text looks at a visual token.

Attention-based selection (ABS) of asymmetric text-visual pruning (arXiv 2603.16001, section A5.1 of its supplement).
"""

from torch import Tensor

from lvlm_prune.methods.saliency.base import Saliency
from lvlm_prune.methods.tokens import Tokens


class AttentionSaliency(Saliency):
    r"""Attention that a visual token gets from the text tokens, mean over text tokens and heads.

    .. math:: s_v = \frac{1}{n_{text}} \sum_t \bar A_{t \to v}

    All text tokens count, also those before the image, which cannot see it. Values are of the order of one over the
    number of tokens, so an adaptive budget needs scaling to be comparable with that of drift.

    Example:
        >>> import torch
        >>> visual = torch.tensor([False, True, True])
        >>> AttentionSaliency()(Tokens(torch.eye(3), torch.eye(3), visual, attention_text_to_visual=torch.ones(2) / 4))
        tensor([0.2500, 0.2500])
    """

    name = "attention"
    maximum = 1.0
    needs = frozenset({"attention_text_to_visual"})

    def __call__(self, tokens: Tokens) -> Tensor:
        """Saliency of each visual token, float32 of shape (n_visual,), between 0 and 1."""
        assert tokens.attention_text_to_visual is not None
        return tokens.attention_text_to_visual
