"""Attention read under sdpa, held against the maps that eager attention returns."""

import pytest
import torch
from transformers.modeling_utils import AttentionInterface

from lvlm_prune.blocks import BlockRunner, prunable_linears
from lvlm_prune.blocks.attention import AttentionCall, SampleAttention, recorded_attention
from lvlm_prune.errors import RunError
from lvlm_prune.loop.activations import Activations, recording, rows_of
from lvlm_prune.methods.tokens import ATTENTION_NEEDS
from tests.families import FAMILIES, Sample, make_inputs, tiny_model

SAMPLES = [
    Sample(before=3, image=0, after=9),
    Sample(before=2, image=1, after=4),
    Sample(before=7, image=None, after=5),
]
CROSS_ATTENTION = {"mllama"}


def tokens_of(model, inputs, needs=ATTENTION_NEEDS, blocks=range(4)):
    """Tokens of every block and sample, by (block, sample)."""
    runner = BlockRunner(model)
    batch = runner.catch(inputs)
    found = {}
    for index in range(len(runner)):
        if runner.calls(index, batch) and index in blocks:
            linears = prunable_linears(runner.block(index))
            with recording(linears, needs) as record:
                hidden = runner.run(index, batch)
            for row in rows_of(batch, model.config, range(len(inputs["input_ids"]))):
                sample = Activations(row, record, record.sites(), batch.hidden, hidden, index)
                found[index, row.sample] = sample.tokens(("image", "video", "audio"), needs, asked_by="a test")
        runner.advance(index, batch)
    return found


def eager_maps(model, inputs):
    """Head-averaged attention maps (B, S, S) of each block, as the model's own eager forward returns them."""
    model.set_attn_implementation("eager")
    maps = model(**inputs, use_cache=False, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return [None if one is None else one.float().mean(1) for one in maps]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - CROSS_ATTENTION))
def test_equals_eager_attention(family, side):
    samples = SAMPLES[:1] if family in ("paligemma", "gemma3") and side == "left" else SAMPLES
    model = tiny_model(family)
    inputs = make_inputs(family, model, samples, side=side)
    expected = eager_maps(model, inputs)
    found = tokens_of(model, inputs)
    assert len(found) == 4 * len(samples)
    for (block, sample), tokens in found.items():
        real = inputs["attention_mask"][sample].nonzero().flatten()
        reference = expected[block][sample][real][:, real]
        close = {"rtol": 0, "atol": 1e-6}
        torch.testing.assert_close(tokens.attention_map, reference, **close)
        torch.testing.assert_close(tokens.attention_last, reference[-1], **close)
        torch.testing.assert_close(tokens.attention_mean, reference.mean(0), **close)
        to_visual = reference[tokens.text][:, tokens.visual].mean(0)
        torch.testing.assert_close(tokens.attention_text_to_visual, to_visual, **close)
        assert len(to_visual) == (0 if samples[sample].image is None else tokens.num_visual) == tokens.num_visual


def test_eager_attention_is_read_as_well():
    model = tiny_model("llava_onevision")
    inputs = make_inputs("llava_onevision", model, SAMPLES)
    under_sdpa = tokens_of(model, inputs)
    model.set_attn_implementation("eager")
    for key, tokens in tokens_of(model, inputs).items():
        torch.testing.assert_close(tokens.attention_map, under_sdpa[key].attention_map, rtol=0, atol=1e-6)


def test_stripes_give_the_same_numbers(monkeypatch):
    model = tiny_model("llava")
    inputs = make_inputs("llava", model, SAMPLES)
    whole = tokens_of(model, inputs, blocks=[1])
    monkeypatch.setattr("lvlm_prune.blocks.attention.HELD_ATTENTION", 64)
    for key, tokens in tokens_of(model, inputs, blocks=[1]).items():
        for need in ATTENTION_NEEDS:
            torch.testing.assert_close(getattr(tokens, need), getattr(whole[key], need), rtol=0, atol=1e-6)


def test_the_largest_tensor_is_one_stripe_and_not_all_heads_at_once(monkeypatch):
    monkeypatch.setattr("lvlm_prune.blocks.attention.HELD_ATTENTION", 512)
    largest = 0
    softmax = torch.softmax

    def watched(logits, dim):
        nonlocal largest
        largest = max(largest, logits.numel())
        return softmax(logits, dim=dim)

    monkeypatch.setattr(torch, "softmax", watched)
    call = AttentionCall(torch.nn.Identity(), torch.randn(1, 8, 40, 4), torch.randn(1, 2, 40, 4), None, {}, None)
    SampleAttention(call, 0).mean_of_rows(torch.arange(40))
    assert largest <= 512 < 8 * 40 * 40


@pytest.mark.parametrize("kind", ["boolean", "per head", "additive", "window", "softcap", "bidirectional"])
def test_masks_and_logits_of_every_kind(kind):
    """Against the plain formula on full matrices."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 7, 8, generator=generator), torch.randn(2, 2, 7, 8, generator=generator)
    logits = query @ key.repeat_interleave(2, dim=1).mT * 0.3
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    mask, arguments = None, {"scaling": 0.3}
    if kind in ("boolean", "per head"):
        mask = (torch.rand(2, 4 if kind == "per head" else 1, 7, 7, generator=generator) > 0.4) & causal
        mask |= torch.eye(7, dtype=torch.bool)
        logits = logits.masked_fill(~mask, -torch.inf)
    elif kind == "additive":
        mask = torch.randn(1, 1, 7, 7, generator=generator)
        logits = logits + mask
    elif kind == "window":
        arguments["sliding_window"] = 3
        logits = logits.masked_fill(~(causal & ~causal.tril(-3)), -torch.inf)
    elif kind == "softcap":
        arguments["softcap"] = 0.5
        logits = (torch.tanh(logits / 0.5) * 0.5).masked_fill(~causal, -torch.inf)
    else:
        arguments["is_causal"] = False
    expected = logits.softmax(-1).mean(1)
    call = AttentionCall(torch.nn.Identity(), query, key, mask, arguments, None)
    for row in range(2):
        found = call.sample(row).rows(torch.arange(7))
        torch.testing.assert_close(found, expected[row], rtol=0, atol=1e-6)


def test_the_models_own_result_and_interface_are_untouched():
    model = tiny_model("qwen2_vl")
    inputs = make_inputs("qwen2_vl", model, SAMPLES)
    before = dict(AttentionInterface.__dict__)
    dense = model(**inputs).logits
    calls = []
    with recorded_attention(calls):
        assert torch.equal(model(**inputs).logits, dense)
    assert len(calls) > 4
    assert dict(AttentionInterface.__dict__) == before
    count = len(calls)
    model(**inputs)
    assert len(calls) == count


def test_cross_attention_is_a_clear_error():
    model = tiny_model("mllama")
    inputs = make_inputs("mllama", model, SAMPLES[:1])
    with pytest.raises(RunError, match=r"a test needs the attention of block \d, which attends to other things"):
        tokens_of(model, inputs)


def test_a_block_without_softmax_attention_is_a_clear_error():
    model = tiny_model("llava")
    inputs = make_inputs("llava", model, SAMPLES[:1])

    def linear_attention(hidden_states, **_):
        return hidden_states.cumsum(1), None

    model.model.language_model.layers[2].self_attn.forward = linear_attention
    with pytest.raises(RunError, match=r"a test needs the attention of block 2, which has no softmax attention"):
        tokens_of(model, inputs)


def test_an_unknown_need_names_the_plugin():
    model = tiny_model("llava")
    with pytest.raises(ValueError, match=r"a test needs \['attention_lost'\]; there are \['attention_last'"):
        tokens_of(model, make_inputs("llava", model, SAMPLES[:1]), frozenset({"attention_lost"}))
