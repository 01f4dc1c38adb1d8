"""Pools of one modality, the two ends between which asymmetric calibration lies."""

import torch

from lvlm_prune.methods.pools.base import Pool
from lvlm_prune.methods.tokens import Selection, Tokens


class TextOnlyPool(Pool):
    """The text tokens, special tokens included.

    Example:
        >>> import torch
        >>> TextOnlyPool().select(Tokens(torch.eye(2), torch.eye(2), torch.tensor([False, True]))).weights
        tensor([ True, False])
    """

    needs_text = True

    def select(self, tokens: Tokens, linear: str | None = None) -> Selection:
        """Weight one for text tokens."""
        return Selection(tokens.text, counted=tokens.text_index)


class VisualOnlyPool(Pool):
    """The visual tokens. A text-only sample adds nothing; a calibration set without visual tokens is an error.

    Example:
        >>> import torch
        >>> VisualOnlyPool().select(Tokens(torch.eye(2), torch.eye(2), torch.tensor([False, True]))).weights
        tensor([False,  True])
    """

    needs_visual = True

    def select(self, tokens: Tokens, linear: str | None = None) -> Selection:
        """Weight one for visual tokens."""
        return Selection(tokens.visual, counted=tokens.visual_index)


class EarlyVisualPool(Pool):
    """All tokens in the first blocks, the text tokens alone in the others (TAMP, ACL Findings 2025, Table 1).

    Args:
        blocks: In how many blocks all tokens count.

    Raises:
        ValueError: `blocks` is negative.

    Example:
        >>> visual = torch.tensor([False, True])
        >>> EarlyVisualPool(2).select(Tokens(torch.eye(2), torch.eye(2), visual, block=2)).weights
        tensor([ True, False])
    """

    def __init__(self, blocks: int = 2) -> None:
        if blocks < 0:
            raise ValueError(f"`blocks` {blocks}: must be 0 or larger")
        self.blocks = blocks

    def select(self, tokens: Tokens, linear: str | None = None) -> Selection:
        """Weight one for every token, or for text tokens."""
        if tokens.block < self.blocks:
            return Selection(torch.ones_like(tokens.visual), counted=slice(None))
        return Selection(tokens.text, counted=tokens.text_index)
