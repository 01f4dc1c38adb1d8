"""Sites are found by what feeds a Linear, and tokens are cut out of whatever shape a Linear sees."""

import pytest
import torch
from torch import nn

from lvlm_prune.blocks import CaughtBatch
from lvlm_prune.errors import RunError
from lvlm_prune.loop.activations import Activations, recording, rows_of


class Config:
    image_token_id = 9

    def get_text_config(self, decoder=False):
        return self


def caught(input_ids, attention_mask=None, width=4):
    hidden = torch.arange(input_ids.numel() * width, dtype=torch.float32).view(*input_ids.shape, width)
    return CaughtBatch(hidden, {}, frozenset(), (), {}, None, input_ids=input_ids, attention_mask=attention_mask)


@pytest.fixture
def padded():
    """Two samples: 5 tokens (2 visual), and 3 tokens (1 visual) with 2 of padding on the left."""
    ids = torch.tensor([[1, 9, 9, 2, 3], [0, 0, 9, 4, 5]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    return caught(ids, mask)


def activations_of(batch, row, values):
    rows = rows_of(batch, Config(), [10, 11])
    linear = nn.Linear(values.shape[-1], 2)
    with recording({"linear": linear}) as record, torch.no_grad():
        linear(values)
    return Activations(rows[row], record, record.sites(), batch.hidden, batch.hidden + 1, block=3)


def test_padding_is_nowhere(padded):
    sample = activations_of(padded, 1, padded.hidden)
    tokens = sample.tokens()
    assert sample.sample == 11
    assert tokens.visual.tolist() == [True, False, False]
    assert torch.equal(tokens.hidden_in, padded.hidden[1, 2:])
    assert torch.equal(tokens.hidden_out, padded.hidden[1, 2:] + 1)
    (fed,) = sample.site_inputs()
    site, inputs, repeats = fed.name, fed.inputs, fed.repeats
    assert (site, repeats) == ("linear", 1)
    assert torch.equal(inputs, padded.hidden[1, 2:])


@pytest.mark.parametrize("shape", [(10, 4), (2, 1, 5, 4), (2, 5, 4)])
def test_flattened_tokens_are_told_apart_by_sample(padded, shape):
    (fed,) = activations_of(padded, 1, padded.hidden.reshape(shape)).site_inputs()
    inputs, repeats = fed.inputs, fed.repeats
    assert repeats == 1
    assert torch.equal(inputs, padded.hidden[1, 2:])


def test_parallel_streams_hold_every_token_once_each(padded):
    streams = torch.stack([padded.hidden, padded.hidden * 2, padded.hidden * 3])
    (fed,) = activations_of(padded, 1, streams).site_inputs()
    inputs, repeats = fed.inputs, fed.repeats
    assert repeats == 3
    assert torch.equal(inputs, torch.cat([padded.hidden[1, 2:] * factor for factor in (1, 2, 3)]))


def test_tokens_that_are_not_the_decoders_own_belong_to_their_sample(padded):
    image_features = torch.randn(2, 7, 4)
    (fed,) = activations_of(padded, 1, image_features).site_inputs()
    inputs, repeats = fed.inputs, fed.repeats
    assert repeats == 0
    assert torch.equal(inputs, image_features[1])


def test_linears_fed_by_one_tensor_are_one_site():
    one, other = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    linears = {name: nn.Linear(4, 4) for name in ("q", "k", "v", "o")}
    with recording(linears) as record, torch.no_grad():
        linears["q"](one)
        linears["k"](one)
        linears["v"](one.view(1, 3, 4))
        linears["o"](other)
    assert record.sites() == {"q": ["q", "k", "v"], "o": ["o"]}


def test_an_input_changed_in_place_is_noticed():
    value, linear = torch.randn(1, 3, 4), nn.Linear(4, 4)
    with recording({"linear": linear}) as record, torch.no_grad():
        linear(value)
        value.add_(1)
    with pytest.raises(RuntimeError, match="in place"):
        record.sites()


def test_a_linear_that_is_called_twice_is_refused_where_its_one_output_is_asked_for():
    linear = nn.Linear(4, 4)
    needs = frozenset({"outputs"})
    with recording({"linear": linear}, needs), pytest.raises(RunError, match="more than once"), torch.no_grad():
        linear(linear(torch.randn(1, 3, 4)))


def test_every_call_of_a_linear_counts(padded):
    linear, row = nn.Linear(4, 4), rows_of(padded, Config(), [10, 11])[1]
    with recording({"linear": linear}) as record, torch.no_grad():
        linear(padded.hidden)
        linear(padded.hidden * 2)
    sample = Activations(row, record, record.sites(), padded.hidden, padded.hidden, block=3)
    first, second = (fed.inputs for fed in sample.site_inputs())
    assert torch.equal(first, padded.hidden[1, 2:])
    assert torch.equal(second, padded.hidden[1, 2:] * 2)


def test_a_linear_called_twice_that_shares_its_input_is_refused():
    linears, shared = {name: nn.Linear(4, 4) for name in ("q", "k")}, torch.randn(1, 3, 4)
    with recording(linears) as record, torch.no_grad():
        linears["q"](shared)
        linears["k"](linears["k"](shared))
    with pytest.raises(RunError, match="shares its first input"):
        record.sites()


def test_hooks_are_gone_afterwards():
    linear = nn.Linear(4, 4)
    with pytest.raises(ZeroDivisionError), recording({"linear": linear}):
        1 / 0  # noqa: B018
    assert not linear._forward_pre_hooks
