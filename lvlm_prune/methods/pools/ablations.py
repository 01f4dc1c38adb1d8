"""The pools that TAMP compares AMIA with (ACL Findings 2025, table of token selection)."""

import torch

from lvlm_prune.methods.pools.base import Pool
from lvlm_prune.methods.tokens import Selection, Tokens, on_device, random_generator


class AttendedPool(Pool):
    r"""Tokens that the last token attends to more than to the mean token, at each block.

    .. math:: w_t = [a_t > \bar a]

    with :math:`a` the last row of the attention map, mean over heads. Where all tokens get the same, the first counts.

    Example:
        >>> attention = torch.tensor([0.6, 0.1, 0.3])
        >>> tokens = Tokens(torch.eye(3), torch.eye(3), torch.tensor([False, True, True]), attention_last=attention)
        >>> AttendedPool().select(tokens).weights
        tensor([ True, False, False])
    """

    needs = frozenset({"attention_last"})

    def select(self, tokens: Tokens, linear: str | None = None) -> Selection:
        """Weight one for tokens above the mean."""
        attention = tokens.attention_last
        assert attention is not None
        return Selection((attention > attention.mean()).index_fill_(0, attention.argmax(), True))


class RandomTokensPool(Pool):
    """A fixed number of tokens of each sample, drawn anew at each block, text and visual alike.

    The draw depends on the seed, the block and the sample only, so it is the same for any number of processes.

    Args:
        k: Number of tokens per sample, or all where it has fewer; TAMP takes 100.
        seed: Seed of the draw.

    Raises:
        ValueError: `k` is not positive.

    Example:
        >>> RandomTokensPool(k=2).select(Tokens(torch.eye(4), torch.eye(4), torch.ones(4) > 0)).weights.sum()
        tensor(2)
    """

    def __init__(self, k: int = 100, seed: int = 0) -> None:
        if k < 1:
            raise ValueError(f"`k` {k}: must be 1 or larger")
        self.k = k
        self.seed = seed

    def select(self, tokens: Tokens, linear: str | None = None) -> Selection:
        """Weight one for the tokens that are drawn of all, zero for the rest; nothing is held as a candidate."""
        # Drawn on the CPU: a GPU's generator would give other numbers for the same seed.
        order = torch.randperm(len(tokens.visual), generator=random_generator(self.seed, tokens))
        drawn = on_device(order[: self.k].sort().values, tokens.visual.device)
        return Selection(torch.zeros_like(tokens.visual).index_fill_(0, drawn, True), counted=drawn)
