"""Random saliency: the control that every saliency has to beat."""

import torch
from torch import Tensor

from lvlm_prune.methods.saliency.base import Saliency
from lvlm_prune.methods.tokens import Tokens, random_generator


class RandomSaliency(Saliency):
    """Uniform on [0, 1), drawn anew for each block and sample.

    The draw depends on the seed, the block and the sample only, so it is the same for any number of processes.

    Args:
        seed: Seed of the draw.

    Example:
        >>> tokens = Tokens(torch.eye(3), torch.eye(3), visual=torch.tensor([False, True, True]))
        >>> bool((RandomSaliency(seed=1)(tokens) == RandomSaliency(seed=1)(tokens)).all())
        True
    """

    name = "random"
    maximum = 1.0

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __call__(self, tokens: Tokens) -> Tensor:
        """Saliency of each visual token, float32 of shape (n_visual,)."""
        # Drawn on the CPU: a GPU's generator would give other numbers for the same seed.
        drawn = torch.rand(tokens.num_visual, generator=random_generator(self.seed, tokens))
        return drawn.to(tokens.visual.device)
