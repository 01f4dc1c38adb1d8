"""The mixed pool: every real token counts the same."""

import torch

from lvlm_prune.methods.pools.base import Pool
from lvlm_prune.methods.tokens import Selection, Tokens


class MixedPool(Pool):
    """All real tokens, text and visual alike (the default of Wanda and SparseGPT).

    Example:
        >>> MixedPool().select(Tokens(torch.eye(2), torch.eye(2), torch.tensor([False, True]))).weights
        tensor([True, True])
    """

    in_towers = True

    def select(self, tokens: Tokens, linear: str | None = None) -> Selection:
        """Weight one for every token."""
        return Selection(torch.ones_like(tokens.visual), counted=slice(None))
