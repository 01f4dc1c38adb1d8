"""Chaining blocks is the model's own forward, bit for bit."""

import inspect

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lvlm_prune.blocks import BlockRunner
from lvlm_prune.checkpoints.versions import CACHE_NAMES
from tests.families import FAMILIES, Sample, make_inputs, tiny_model
from tests.full_forward import own_forward, prune_on_the_way

BATCHES: dict[str, tuple[list[Sample], str]] = {
    "single": ([Sample(3, 0, 5)], "right"),
    "padded_right": ([Sample(3, 0, 5), Sample(2, 1, 9), Sample(6, 2, 2)], "right"),
    "padded_left": ([Sample(3, 0, 5), Sample(2, 1, 9), Sample(6, 2, 2)], "left"),
    "text": ([Sample(4, None, 3)], "right"),
    "text_padded_left": ([Sample(4, None, 3), Sample(2, None, 9)], "left"),
}


def batches_of(family: str, model: nn.Module) -> dict[str, dict[str, Tensor]]:
    return {name: make_inputs(family, model, samples, side) for name, (samples, side) in BATCHES.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_gets_the_input_that_the_own_forward_gives_it(family: str) -> None:
    model = tiny_model(family)
    runner = BlockRunner(model)
    for name, inputs in batches_of(family, model).items():
        expected, last_hidden_state = own_forward(model, inputs)
        batch = runner.catch(inputs)
        for i in range(len(runner)):
            assert runner.calls(i, batch) == (i in expected), (name, i)
            if i in expected:
                torch.testing.assert_close(batch.hidden, expected[i], rtol=0, atol=0, msg=f"{name}, block {i}")
            runner.advance(i, batch)
        torch.testing.assert_close(runner.finish(batch), last_hidden_state, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_pruned_on_the_way_give_the_forward_of_the_pruned_model(family: str) -> None:
    model = tiny_model(family)
    runner = BlockRunner(model)
    inputs = batches_of(family, model)
    _, dense = own_forward(model, inputs["single"])
    batches = [runner.catch(batch_inputs) for batch_inputs in inputs.values()]
    prune_on_the_way(runner, batches)
    for (name, batch_inputs), batch in zip(inputs.items(), batches):
        _, expected = own_forward(model, batch_inputs)
        torch.testing.assert_close(runner.finish(batch), expected, rtol=0, atol=0, msg=name)
    _, pruned = own_forward(model, inputs["single"])
    assert not torch.allclose(dense, pruned, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_chaining_is_exact_in_bfloat16(family: str) -> None:
    model = tiny_model(family, torch.bfloat16)
    runner = BlockRunner(model)
    for name, inputs in batches_of(family, model).items():
        batch = runner.catch(inputs)
        for i in range(len(runner)):
            runner.advance(i, batch)
        assert batch.hidden.dtype == torch.bfloat16
        torch.testing.assert_close(runner.finish(batch), own_forward(model, inputs)[1], rtol=0, atol=0, msg=name)


def test_run_does_not_move_the_batch() -> None:
    model = tiny_model("qwen3_vl")
    runner = BlockRunner(model)
    batch = runner.catch(batches_of("qwen3_vl", model)["padded_left"])
    before = batch.hidden.clone()
    first, second = runner.run(0, batch), runner.run(0, batch)
    assert first.shape == before.shape
    torch.testing.assert_close(batch.hidden, before, rtol=0, atol=0)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3"])
def test_a_replayed_block_sees_no_cache_that_the_model_was_given(family: str) -> None:
    """Whatever this version of transformers calls it: with a cache a block would attend to keys of its earlier runs."""
    model = tiny_model(family)
    inputs = batches_of(family, model)["single"]
    (name,) = set(CACHE_NAMES) & set(inspect.signature(type(model).forward).parameters)
    runner, cache = BlockRunner(model), DynamicCache()
    batch, plain = runner.catch({**inputs, name: cache}), runner.catch(inputs)
    assert all(batch.arguments[i].get(name) is None for i in range(len(runner)))
    for i in range(len(runner)):
        runner.run(i, batch)
        torch.testing.assert_close(runner.advance(i, batch), runner.advance(i, plain), rtol=0, atol=0)
    assert cache.get_seq_length() == 0


def test_catching_touches_no_block_and_leaves_no_trace() -> None:
    """Blocks on the meta device would fail if they were run."""
    model = tiny_model("qwen3_vl")
    reference = BlockRunner(model).catch(batches_of("qwen3_vl", model)["single"])
    runner = BlockRunner(model)
    for layer in runner.decoder.layers:
        layer.to("meta")
    attributes = [set(vars(layer)) for layer in runner.decoder.layers]
    batch = runner.catch(batches_of("qwen3_vl", model)["single"])
    torch.testing.assert_close(batch.hidden, reference.hidden, rtol=0, atol=0)
    assert [set(vars(layer)) for layer in runner.decoder.layers] == attributes
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in runner.decoder.layers)
    assert not runner.decoder.module._forward_hooks
    assert not runner.decoder.module._forward_pre_hooks


def test_text_skips_cross_attention_blocks() -> None:
    model = tiny_model("mllama")
    runner = BlockRunner(model)
    inputs = batches_of("mllama", model)
    batch = runner.catch(inputs["text"])
    assert [runner.calls(i, batch) for i in range(4)] == [True, False, True, False]
    assert runner.run(1, batch) is batch.hidden
    assert all(runner.calls(i, runner.catch(inputs["single"])) for i in range(4))


def test_a_caught_batch_moves_as_one_and_shares_what_blocks_share() -> None:
    model = tiny_model("gemma3")
    runner = BlockRunner(model)
    batch = runner.catch(batches_of("gemma3", model)["padded_right"])
    copy = batch.to("cpu")
    moved = batch.to("meta")
    assert moved.hidden.device.type == "meta"
    assert batch.hidden.device.type == "cpu"
    # Blocks 0 and 2 slide, blocks 1 and 3 do not: two masks, not four.
    masks = [moved.arguments[i]["attention_mask"] for i in range(4)]
    assert masks[0] is masks[2]
    assert masks[1] is masks[3]
    assert masks[0] is not masks[1]
    for i in range(len(runner)):
        runner.advance(i, copy)
        runner.advance(i, batch)
    torch.testing.assert_close(runner.finish(copy), runner.finish(batch), rtol=0, atol=0)


def test_nbytes_counts_shared_memory_once() -> None:
    model = tiny_model("llava")
    runner = BlockRunner(model)
    inputs = batches_of("llava", model)["padded_right"]
    batch = runner.catch(inputs)
    rows, length, width = batch.hidden.shape
    mask = batch.arguments[0]["attention_mask"]
    assert batch.nbytes >= batch.hidden.nbytes + mask.nbytes
    # Far from one mask and one rotary table for each block.
    assert batch.nbytes < batch.hidden.nbytes + 2 * mask.nbytes + 10 * rows * length * width


def test_padding_does_not_reach_other_samples() -> None:
    model = tiny_model("llava")
    runner = BlockRunner(model)
    samples = [Sample(3, 0, 5), Sample(2, 1, 9)]
    together = runner.catch(make_inputs("llava", model, samples, side="left"))
    alone = runner.catch(make_inputs("llava", model, samples[:1]))
    for i in range(len(runner)):
        runner.advance(i, together)
        runner.advance(i, alone)
    torch.testing.assert_close(
        runner.finish(together)[0, -alone.hidden.shape[1] :], runner.finish(alone)[0], rtol=0, atol=1e-6
    )
