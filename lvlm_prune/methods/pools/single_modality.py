"""Pools of one modality, the two ends between which asymmetric calibration lies."""

from lvlm_prune.methods.pools.base import Pool
from lvlm_prune.methods.tokens import Selection, Tokens


class TextOnlyPool(Pool):
    """The text tokens, special tokens included.

    Example:
        >>> import torch
        >>> TextOnlyPool().select(Tokens(torch.eye(2), torch.eye(2), torch.tensor([False, True]))).weights
        tensor([ True, False])
    """

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
