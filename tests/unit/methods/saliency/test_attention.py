"""ABS against the map that eager attention returns."""

import pytest
import torch

from lvlm_prune.methods.saliency import AttentionSaliency
from tests.families import Sample, make_inputs, tiny_model
from tests.unit.blocks.test_attention import eager_maps, tokens_of


@pytest.mark.parametrize("family", ["llava_next_llama", "qwen2_5_vl", "gemma3", "qwen2_audio"])
def test_is_the_mean_attention_from_text_to_each_visual_token(family):
    samples = [
        Sample(before=3, image=0, after=9),
        Sample(before=2, image=1, after=4),
        Sample(before=6, image=None, after=5),
    ]
    model = tiny_model(family)
    inputs = make_inputs(family, model, samples)
    maps = eager_maps(model, inputs)
    saliency = AttentionSaliency()
    for (block, sample), tokens in tokens_of(model, inputs, saliency.needs).items():
        real = inputs["attention_mask"][sample].nonzero().flatten()
        reference = maps[block][sample][real][:, real]
        expected = reference[~tokens.visual][:, tokens.visual].sum(0) / int((~tokens.visual).sum())
        torch.testing.assert_close(saliency(tokens), expected, rtol=0, atol=1e-6)
        assert saliency(tokens).dtype == torch.float32
        assert len(saliency(tokens)) == tokens.num_visual


def test_nothing_else_of_the_attention_is_computed():
    model = tiny_model("llava")
    inputs = make_inputs("llava", model, [Sample(before=3, image=0, after=9)])
    tokens = tokens_of(model, inputs, AttentionSaliency().needs)[0, 0]
    assert tokens.attention_map is None
    assert tokens.attention_last is None
    assert tokens.attention_mean is None
