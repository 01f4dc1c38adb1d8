"""Samples of every shape that a pool may meet."""

import pytest
import torch

from lvlm_prune.methods.modality import AUDIO, IMAGE, TEXT, VIDEO
from lvlm_prune.methods.tokens import Tokens


def make_tokens(text=6, image=9, video=0, audio=0, seed=0, identical=False, channels=8):
    """A random sample with everything that any pool may need; audio does not count as visual."""
    generator = torch.Generator().manual_seed(seed)
    modality = torch.tensor([TEXT] * text + [IMAGE] * image + [VIDEO] * video + [AUDIO] * audio, dtype=torch.int8)
    modality = modality[torch.randperm(len(modality), generator=generator)]
    count = len(modality)

    def vectors(width):
        return torch.ones(count, width) if identical else torch.randn(count, width, generator=generator)

    attention = (
        torch.randn(count, count, generator=generator)
        .tril()
        .masked_fill(~torch.ones(count, count, dtype=torch.bool).tril(), -torch.inf)
    )
    attention = attention.softmax(-1)
    visual = (modality == IMAGE) | (modality == VIDEO)
    return Tokens(
        hidden_in=vectors(channels),
        hidden_out=vectors(channels),
        visual=visual,
        text=modality == TEXT,
        modality=modality,
        outputs={"mlp.up_proj": vectors(12)},
        attention_last=attention[-1],
        attention_mean=attention.mean(0),
        attention_text_to_visual=attention[modality == TEXT][:, visual].sum(0) / max(text, 1),
        attention_map=attention,
    )


SHAPES = {
    "image": {},
    "video": {"image": 0, "video": 12},
    "image and video": {"image": 4, "video": 4},
    "audio": {"image": 0, "audio": 7},
    "image and audio": {"audio": 7},
    "one visual token": {"image": 1},
    "text only": {"image": 0},
    "visual only": {"text": 0},
    "one token": {"text": 1, "image": 0},
    "two tokens": {"text": 1, "image": 1},
    "three tokens": {"text": 2, "image": 1},
    "identical": {"identical": True},
    "identical text": {"image": 0, "identical": True},
}


@pytest.fixture(params=SHAPES)
def any_tokens(request):
    """One sample of each shape."""
    return make_tokens(**SHAPES[request.param])
