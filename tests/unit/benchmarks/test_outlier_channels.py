"""The embedded model with outlier channels is the same function."""

import torch
from transformers import AutoModelForImageTextToText

from benchmarks.outlier_channels import SITES, channel_statistics, rescale
from lvlm_prune.demo import CHECKPOINT


def test_a_rescaled_model_answers_bit_by_bit_as_before_and_has_louder_channels():
    tokens = torch.randint(5, 400, (1, 40), generator=torch.Generator().manual_seed(0))
    for dtype in (torch.bfloat16, torch.float32):
        model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=dtype).eval()
        layers = model.model.language_model.layers
        before, loud = model(input_ids=tokens).logits, channel_statistics(layers, model, [{"input_ids": tokens}])
        rescale(layers, strength=0.75, share=0.02, factor=8.0)
        after, louder = model(input_ids=tokens).logits, channel_statistics(layers, model, [{"input_ids": tokens}])
        assert torch.equal(before, after)
        for site in SITES:
            assert louder[site]["loudest_channel"] > loud[site]["loudest_channel"]
            assert louder[site]["weight_kurtosis"] > loud[site]["weight_kurtosis"]
