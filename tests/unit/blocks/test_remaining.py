"""Losses from a cached block input on are the same whether weights stay in memory or stream from disk."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lvlm_prune.blocks.remaining as tails
from lvlm_prune.blocks import BlockRunner, ResidentWeights, Weights
from lvlm_prune.blocks.remaining import RemainingDecoderBlocks, WaitingSample
from lvlm_prune.methods.survey import Change
from tests.families import FAMILIES, Sample, make_inputs, tiny_model
from tests.unit.blocks.test_streaming import save, stream


def scaled(weight: nn.Parameter, factor: float) -> Change:
    @contextmanager
    def change(sample: int):
        dense = weight.data
        weight.data = dense * factor
        try:
            yield
        finally:
            weight.data = dense

    return change


def losses(
    runner: BlockRunner, weights: Weights, inputs: list[dict[str, Tensor]], first: int
) -> dict[int, list[float]]:
    weights.load_non_block_weights()
    batches = [runner.catch(one) for one in inputs]
    weights.release_non_block_weights(any(batch.needs_token_embedding for batch in batches))
    for index in range(first):
        weights.load_block(index)
        for batch in batches:
            runner.advance(index, batch)
        weights.release_block(index)
    weights.load_block(first)
    samples = []
    for batch in batches:
        assert batch.input_ids is not None
        for row, ids in enumerate(batch.input_ids):
            samples.append(WaitingSample(len(samples), batch, row, predicted=ids > 2))
    linear = [module for module in runner.block(first).modules() if isinstance(module, nn.Linear)][-1]
    tail = RemainingDecoderBlocks(runner, weights, samples, first)
    found = tail.losses([scaled(linear.weight, factor) for factor in (1.0, 1.5, 0.0)])
    before = [batch.hidden.clone() for batch in batches]
    assert found == tail.losses([scaled(linear.weight, factor) for factor in (1.0, 1.5, 0.0)])
    assert all(torch.equal(hidden, batch.hidden) for hidden, batch in zip(before, batches))
    return found


@pytest.mark.parametrize("held", [1, 2**32])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_losses_are_those_in_memory(family: str, held: int, tmp_path: Path, monkeypatch) -> None:
    """However many samples go through the later blocks together."""
    monkeypatch.setattr(tails, "HELD_BYTES", held)
    save(family, tmp_path)
    model = tiny_model(family)
    inputs = [
        make_inputs(family, model, samples) for samples in ([Sample(3, 0, 5), Sample(2, 1, 9)], [Sample(4, 2, 3)])
    ]
    resident = losses(BlockRunner(model), ResidentWeights(), inputs, first=1)
    runner, weights = stream(tmp_path)
    streamed = losses(runner, weights, inputs, first=1)
    assert streamed == resident
    assert len(resident) == 3
    if family != "mllama":  # the gates of its cross-attention blocks start closed
        assert all(values[0] != values[1] != values[2] for values in resident.values())
    weights.release_block(1)
    head = runner.model.get_output_embeddings()  # type: ignore[operator]
    assert head.weight.device.type == "meta"


def test_the_output_embedding_is_in_memory_only_while_answers_are_compared(tmp_path: Path, monkeypatch) -> None:
    save("qwen2_vl", tmp_path)
    runner, weights = stream(tmp_path)
    inputs = make_inputs("qwen2_vl", tiny_model("qwen2_vl"), [Sample(3, 0, 5)])
    weights.load_non_block_weights()
    batch = runner.catch(inputs)
    weights.release_non_block_weights(batch.needs_token_embedding)
    weights.load_block(0)
    assert batch.input_ids is not None
    tail = RemainingDecoderBlocks(runner, weights, [WaitingSample(0, batch, 0, batch.input_ids[0] > 2)], 0)
    head = runner.model.get_output_embeddings()  # type: ignore[operator]
    seen, compared = list[str](), list[str]()

    @contextmanager
    def change(sample: int):
        seen.append(head.weight.device.type)
        yield

    def advance(index, batch, run=runner.advance):
        seen.append(head.weight.device.type)
        return run(index, batch)

    def logits(hidden, make=tail._logits):
        compared.append(head.weight.device.type)
        return make(hidden)

    monkeypatch.setattr(runner, "advance", advance)
    monkeypatch.setattr(tail, "_logits", logits)
    tail.seconds()
    found = tail.divergences([change], tail.answers())
    losses = tail.losses([change])
    assert found[0] == [0.0]
    assert losses[0][0] > 0
    assert set(seen) == {"meta"}
    assert len(compared) > 3
    assert set(compared) == {"cpu"}
    assert head.weight.device.type == "meta"


@pytest.mark.parametrize("family", FAMILIES)
def test_divergences_are_those_of_the_whole_models_answers(family: str) -> None:
    """From the input of a block in the middle on, or by the model's own forward with the same changed weight."""
    model = tiny_model(family)
    inputs = make_inputs(family, model, [Sample(3, 0, 7)])
    runner = BlockRunner(model)
    batch = runner.catch(inputs)
    runner.advance(0, batch)
    assert batch.input_ids is not None
    predicted = batch.input_ids[0] > 2
    tail = RemainingDecoderBlocks(runner, ResidentWeights(), [WaitingSample(0, batch, 0, predicted)], 1)
    linear = [module for module in runner.block(1).modules() if isinstance(module, nn.Linear)][-1]
    change = scaled(linear.weight, 0.5)
    found = tail.divergences([change, scaled(linear.weight, 1.0)], tail.answers())[0]
    with torch.no_grad():
        before = model(**inputs).logits[0].float().log_softmax(-1)
        with change(0):
            after = model(**inputs).logits[0].float().log_softmax(-1)
    at = predicted[1:].nonzero().flatten()
    expected = (before[at].exp() * (before[at] - after[at])).sum(dim=-1).mean().item()
    assert found[0] == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert abs(found[1]) < 1e-7
