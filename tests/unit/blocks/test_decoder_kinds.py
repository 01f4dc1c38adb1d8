"""What decoders of newer families do between and around their blocks, each in a decoder of a dozen lines.

Some hand second outputs from block to block, mix earlier outputs, share keys and values, or carry several residual
streams.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lvlm_prune.blocks import BlockRunner
from lvlm_prune.errors import InputError

WIDTH = 8


class Block(nn.Module):
    """Returns its hidden states, mixed with whatever else it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, other: Any = None, past_key_values: Any = None) -> Any:
        mixed = hidden_states if other is None else hidden_states + other
        return hidden_states + self.linear(mixed).tanh()


class BlockWithSecondOutput(Block):
    def forward(self, hidden_states: Tensor, other: Any = None, past_key_values: Any = None) -> Any:
        output = super().forward(hidden_states, other)
        return output, output.sin()


class BlockThatReturnsATuple(Block):
    def forward(self, hidden_states: Tensor, other: Any = None, past_key_values: Any = None) -> Any:
        return (super().forward(hidden_states, other),)


class BlockThatShares(Block):
    """Leaves something for later blocks in a dictionary that the decoder passes to all of them."""

    def forward(self, hidden_states: Tensor, other: Any = None, past_key_values: Any = None) -> Any:
        output = super().forward(hidden_states, other.get("last"))
        other["last"] = output.cos()
        return output


class Decoder(nn.Module):
    block_class: type[Block] = Block

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.block_class() for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, inputs_embeds: Tensor, use_cache: bool = False) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.norm(self.loop(inputs_embeds)))

    def loop(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class PositionalArguments(Decoder):
    def loop(self, hidden: Tensor) -> Tensor:
        first = hidden.exp()
        for layer in self.layers:
            hidden = layer(hidden, first, "a cache")
        return hidden


class TuplesOfOne(Decoder):
    block_class = BlockThatReturnsATuple

    def loop(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden_states=hidden)[0]
        return hidden


class CarriedOutput(Decoder):
    block_class = BlockWithSecondOutput

    def loop(self, hidden: Tensor) -> Tensor:
        second = None
        for layer in self.layers:
            hidden, second = layer(hidden, other=second)
        return hidden


class OutputCarriedFar(Decoder):
    """The last block takes the second output of the first."""

    block_class = BlockWithSecondOutput

    def loop(self, hidden: Tensor) -> Tensor:
        seconds: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            hidden, second = layer(hidden, other=seconds[0] if index == 3 else None)
            seconds.append(second)
        return hidden


class GlueThatReplaces(Decoder):
    def loop(self, hidden: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden)
            if index == 1:
                hidden = hidden + hidden.flip(1)
        return hidden


class GlueInPlace(Decoder):
    def loop(self, hidden: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden)
            if index in (0, 2):
                hidden[:, 1:] += 1.0
        return hidden


class EarlierOutputs(Decoder):
    """Every block is given the mean of all outputs before it."""

    def loop(self, hidden: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        for layer in self.layers:
            hidden = layer(hidden, other=torch.stack(outputs).mean(0) if outputs else None)
            outputs.append(hidden)
        return hidden


class EarlierOutputsAndGlueInPlace(Decoder):
    def loop(self, hidden: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        for layer in self.layers:
            hidden = layer(hidden, other=torch.stack(outputs).mean(0) if outputs else None)
            hidden *= 1.5
            outputs.append(hidden.sin())
        return hidden


class EmbeddingsScaledInPlace(Decoder):
    def loop(self, hidden: Tensor) -> Tensor:
        hidden *= 3.0
        scaled = hidden.clone()
        for layer in self.layers:
            hidden = layer(hidden) + scaled
        return hidden


class Cache:
    def __init__(self) -> None:
        self.sums: dict[nn.Module, Any] = {}

    def update(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        self.sums[layer] = self.sums.get(layer, 0) + hidden
        return self.sums[layer]


class BlockWithCache(Block):
    """Would see its input twice if it ran again with the same cache."""

    def forward(self, hidden_states: Tensor, other: Any = None, past_key_values: Any = None) -> Any:
        seen = hidden_states if past_key_values is None else past_key_values.update(self, hidden_states)
        return super().forward(seen, other)


class BlockWithRenamedCache(Block):
    """As transformers calls it since 5.24."""

    def forward(self, hidden_states: Tensor, other: Any = None, cache: Any = None) -> Any:
        seen = hidden_states if cache is None else cache.update(self, hidden_states)
        return super().forward(seen, other)


class CacheWhetherAskedForOrNot(Decoder):
    block_class = BlockWithCache
    cache_name = "past_key_values"

    def loop(self, hidden: Tensor) -> Tensor:
        cache = {self.cache_name: Cache()}
        for layer in self.layers:
            hidden = layer(hidden, **cache)
        return hidden


class RenamedCache(CacheWhetherAskedForOrNot):
    block_class = BlockWithRenamedCache
    cache_name = "cache"


class SharedDictionary(Decoder):
    block_class = BlockThatShares

    def loop(self, hidden: Tensor) -> Tensor:
        shared: dict[str, Tensor] = {}
        for layer in self.layers:
            hidden = layer(hidden, other=shared)
        return hidden


class ResidualStreams(Decoder):
    def loop(self, hidden: Tensor) -> Tensor:
        streams = torch.stack([hidden, hidden.sin(), hidden.cos()])
        for layer in self.layers:
            streams = layer(streams)
        return streams.mean(0)


KINDS = [
    Decoder,
    PositionalArguments,
    TuplesOfOne,
    CarriedOutput,
    OutputCarriedFar,
    GlueThatReplaces,
    GlueInPlace,
    EarlierOutputs,
    EarlierOutputsAndGlueInPlace,
    EmbeddingsScaledInPlace,
    CacheWhetherAskedForOrNot,
    RenamedCache,
    SharedDictionary,
    ResidualStreams,
]


class Model(nn.Module):
    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        text_config = SimpleNamespace(num_hidden_layers=len(decoder.layers), model_type="toy")
        self.config = SimpleNamespace(get_text_config=lambda decoder: text_config)
        self.embedding = nn.Embedding(20, WIDTH)
        self.decoder = decoder

    def get_decoder(self) -> nn.Module:
        return self.decoder

    def forward(self, input_ids: Tensor, use_cache: bool = True) -> Tensor:
        return self.decoder(inputs_embeds=self.embedding(input_ids), use_cache=use_cache).last_hidden_state


def toy_model(kind: type[Decoder]) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model(kind()).eval().requires_grad_(False)


INPUTS = [{"input_ids": torch.tensor([[1, 2, 3, 4, 5]])}, {"input_ids": torch.tensor([[6, 7, 8], [9, 10, 11]])}]


@pytest.mark.parametrize("kind", KINDS)
def test_chaining_is_the_own_forward_of_the_model_changed_on_the_way(kind: type[Decoder]) -> None:
    model = toy_model(kind)
    runner = BlockRunner(model)
    batches = [runner.catch(inputs) for inputs in INPUTS]
    for i in range(len(runner)):
        for batch in batches:
            runner.run(i, batch)
        runner.block(i).linear.weight.mul_(-0.5)  # type: ignore[operator, union-attr]
        for batch in batches:
            runner.advance(i, batch)
    for inputs, batch in zip(INPUTS, batches):
        torch.testing.assert_close(runner.finish(batch), model(**inputs), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_moved_between_blocks_chain_as_well(kind: type[Decoder]) -> None:
    """As when hidden states are kept in host memory and brought to the device one by one."""
    model = toy_model(kind)
    runner = BlockRunner(model)
    batch = runner.catch(INPUTS[1])
    for i in range(len(runner)):
        batch = batch.to("cpu")
        runner.advance(i, batch)
    torch.testing.assert_close(runner.finish(batch), model(**INPUTS[1]), rtol=0, atol=0)


@pytest.mark.parametrize("where", ["before all blocks", "behind the last block"])
def test_a_decoder_that_calls_a_block_twice_is_refused(where: str) -> None:
    """Its blocks stand for more layers than there are, and a block's inputs are not those of one call."""

    class Looped(Decoder):
        def loop(self, hidden: Tensor) -> Tensor:
            if where == "before all blocks":
                return super().loop(self.layers[0](hidden))
            return self.layers[-1](super().loop(hidden))

    runner = BlockRunner(toy_model(Looped))
    with pytest.raises(InputError, match=r"calls decoder\.layers\.\d a second time"):
        runner.catch(INPUTS[0])


def test_a_decoder_that_reads_its_embeddings_at_the_end_is_refused() -> None:
    """They are dropped when samples are caught, as they would double what a sample takes."""

    class Skipping(Decoder):
        def loop(self, hidden: Tensor) -> Tensor:
            return super().loop(hidden) + hidden

    runner = BlockRunner(toy_model(Skipping))
    batch = runner.catch(INPUTS[0])
    for index in range(len(runner)):
        runner.advance(index, batch)
    with pytest.raises(InputError, match="reads its embeddings again"):
        runner.finish(batch)


def test_a_decoder_on_another_number_of_positions_is_refused() -> None:
    class Longer(Decoder):
        def loop(self, hidden: Tensor) -> Tensor:
            return super().loop(torch.cat([hidden, hidden], dim=1))

    runner = BlockRunner(toy_model(Longer))
    with pytest.raises(InputError, match="10 positions for 5 token ids"):
        runner.catch(INPUTS[0])


def test_an_error_of_the_model_itself_is_passed_on() -> None:
    runner = BlockRunner(toy_model(Decoder))
    with pytest.raises(IndexError):
        runner.catch({"input_ids": torch.tensor([[99]])})


def test_second_outputs_are_kept_no_longer_than_needed() -> None:
    runner = BlockRunner(toy_model(OutputCarriedFar))
    batch = runner.catch(INPUTS[0])
    kept = []
    for i in range(len(runner)):
        runner.advance(i, batch)
        kept.append(sorted(batch.carried))
    assert kept == [[0], [0], [0], []]


def test_embeddings_are_not_kept_where_nothing_is_replayed() -> None:
    plain = BlockRunner(toy_model(Decoder)).catch(INPUTS[1])
    replayed = BlockRunner(toy_model(GlueInPlace)).catch(INPUTS[1])
    ids = INPUTS[1]["input_ids"].nbytes
    assert plain.nbytes == plain.hidden.nbytes + ids
    assert replayed.nbytes == 2 * replayed.hidden.nbytes + ids
