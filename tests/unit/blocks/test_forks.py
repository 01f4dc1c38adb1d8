"""A fork of a batch goes its own way: neither it nor the batch notices the other."""

import pytest
import torch

from lvlm_prune.blocks import BlockRunner, CaughtBatch
from tests.families import FAMILIES, Sample, make_inputs, tiny_model
from tests.unit.blocks.test_decoder_kinds import INPUTS, KINDS, Decoder, toy_model


def assert_forks_leave_no_trace(runner: BlockRunner, batch: CaughtBatch, expected: torch.Tensor) -> None:
    """At every block, forks run to the end, one of them through changed weights, before the batch itself moves on."""
    for start in range(len(runner)):
        for change in (-2.0, 1.0):
            fork = batch.fork()
            for index in range(start, len(runner)):
                parameters = list(runner.block(index).parameters())
                dense = [parameter.data for parameter in parameters]
                for parameter in parameters:
                    parameter.data = parameter.data * change
                runner.advance(index, fork)
                for parameter, data in zip(parameters, dense):
                    parameter.data = data
            found = runner.finish(fork)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        runner.advance(start, batch)
    torch.testing.assert_close(runner.finish(batch), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_forks_in_every_kind_of_decoder(kind: type[Decoder]) -> None:
    model = toy_model(kind)
    runner = BlockRunner(model)
    assert_forks_leave_no_trace(runner, runner.catch(INPUTS[1]), model(**INPUTS[1]))


@pytest.mark.parametrize("family", FAMILIES)
def test_forks_in_every_family(family: str) -> None:
    model = tiny_model(family)
    runner = BlockRunner(model)
    inputs = make_inputs(family, model, [Sample(3, 0, 5), Sample(2, 1, 9)])
    alone = runner.catch(inputs)
    for index in range(len(runner)):
        runner.advance(index, alone)
    assert_forks_leave_no_trace(runner, runner.catch(inputs), runner.finish(alone))
