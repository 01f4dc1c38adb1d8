"""What a plugin sees of one calibration sample at one block, and what a pool answers."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lvlm_prune.methods.modality import AUDIO, IMAGE, TEXT
from lvlm_prune.seeds import combined_seed

ATTENTION_NEEDS = frozenset({"attention_last", "attention_text_to_visual", "attention_mean", "attention_map"})
"""Fields of `Tokens` that are computed from queries and keys."""

NEEDS = ATTENTION_NEEDS | {"outputs"}
"""Fields of `Tokens` that are filled only where a plugin declares that it needs them."""

EXPERTS = "experts"
"""Not a field: what a callback names that needs the inputs of routed experts."""


@dataclass(frozen=True)
class Tokens:
    """The real tokens of one calibration sample at one decoder block; padding is already removed.

    Args:
        hidden_in: Block input, shape (T, D), in the model's dtype.
        hidden_out: Block output before this block is pruned, shape (T, D).
        visual: Which tokens count as visual, bool of shape (T,).
        text: Which tokens are text, bool of shape (T,). Defaults to every token that is not visual; a token may be
            neither (audio where only images and videos count as visual).
        modality: Modality code of each token as in `methods.modality`, int8 of shape (T,). Defaults to image for
            visual tokens, text for text tokens, audio for others.
        outputs: Output of each Linear, name relative to the block -> shape (T, C_out); needs `outputs`.
        attention_last: Attention of the last token to each token, mean over heads, float32 of shape (T,); needs
            `attention_last`, as each of the following needs its own name.
        attention_text_to_visual: Attention that each visual token gets from the text tokens, mean over text tokens and
            heads, float32 of shape (n_visual,); zero without text.
        attention_mean: Attention that each token gets, mean over all tokens and heads, float32 of shape (T,).
        attention_map: Attention of each token (row) to each token (column), mean over heads, float32 of shape (T, T).
        block: Index of the block.
        sample: Number of the sample in the whole calibration set, the same for any number of processes.
        visual_index: Indices of the visual tokens, int64 of shape (n_visual,). Follow from `visual` by default; handed
            over where they are known already, because to find them on a GPU is to wait for it.
        text_index: Indices of the text tokens, int64 of shape (n_text,); the same.
        modality_counts: Numbers of text, visual (image and video) and audio tokens, where they are known already.

    Example:
        >>> tokens = Tokens(torch.zeros(3, 2), torch.zeros(3, 2), visual=torch.tensor([False, True, True]))
        >>> tokens.text
        tensor([ True, False, False])
        >>> tokens.num_visual, tokens.num_text
        (2, 1)
    """

    hidden_in: Tensor
    hidden_out: Tensor
    visual: Tensor
    text: Tensor = None  # type: ignore[assignment]
    modality: Tensor = None  # type: ignore[assignment]
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    attention_last: Tensor | None = None
    attention_text_to_visual: Tensor | None = None
    attention_mean: Tensor | None = None
    attention_map: Tensor | None = None
    block: int = 0
    sample: int = 0
    visual_index: Tensor = None  # type: ignore[assignment]
    text_index: Tensor = None  # type: ignore[assignment]
    modality_counts: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.text is None:
            object.__setattr__(self, "text", ~self.visual)
        if self.modality is None:
            modality = torch.full(self.visual.shape, AUDIO, dtype=torch.int8, device=self.visual.device)
            modality[self.visual], modality[self.text] = IMAGE, TEXT
            object.__setattr__(self, "modality", modality)
        if self.visual_index is None:
            object.__setattr__(self, "visual_index", self.visual.nonzero().flatten())
        if self.text_index is None:
            object.__setattr__(self, "text_index", self.text.nonzero().flatten())

    @property
    def num_visual(self) -> int:
        """Number of visual tokens."""
        return len(self.visual_index)

    @property
    def num_text(self) -> int:
        """Number of text tokens."""
        return len(self.text_index)


@dataclass(frozen=True)
class Selection:
    """Which tokens calibrate, and how much each counts.

    A pool whose budget is known only after all samples have run answers in two parts: the tokens that count in any
    case, and candidates from which `Pool.cutoffs` later takes the first ones.

    Args:
        weights: Weight of each token in any case, shape (T,), bool or float, not negative.
        candidates: Token indices, int64, best first; how many of them count is said by `Pool.cutoffs`.
        saliency: Saliency of each visual token where one was computed, float32 of shape (n_visual,); for the record.
        counted: Which tokens have a weight that is not zero, where the pool knows it without looking: their indices,
            int64 and ascending, or a slice. A statistic that leaves the others out need not make a GPU wait then.
    """

    weights: Tensor
    candidates: Tensor | None = None
    saliency: Tensor | None = None
    counted: Tensor | slice | None = None

    def with_candidates(self, count: int) -> "Selection":
        """The same, now that the first `count` candidates are known to count.

        Example:
            >>> Selection(torch.tensor([True, False, False, False]), torch.tensor([3, 1])).with_candidates(1).weights
            tensor([ True, False, False,  True])
        """
        if self.candidates is None or not count:
            return replace(self, candidates=None)
        weights = self.weights.clone()
        weights[self.candidates[:count]] = 1
        return Selection(weights, saliency=self.saliency)


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """Values of the CPU on a device; a GPU gets them from pinned memory, and is not waited for."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def random_generator(seed: int, tokens: Tokens, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on seed, block and sample only, never on what other samples or processes drew."""
    generator = torch.Generator(device=device)
    generator.manual_seed(combined_seed(seed, tokens.block, tokens.sample))
    return generator
