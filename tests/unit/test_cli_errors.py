"""What jsonargparse really says becomes one line that names option and value."""

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from lvlm_prune.callbacks import BlockwisePruning
from lvlm_prune.cli_errors import explain


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("--pruning.sparsity=abc", "--pruning.sparsity abc: expected float"),
        ("--pruning.record=maybe", "--pruning.record maybe: expected bool"),
        ("--pruning.pool.rounding=up", "--pruning.pool.rounding up: expected one of floor, released"),
        ("--pruning.pool.beta=1", "--pruning.pool.beta: unknown option"),
        ("--pruning.nothing=1", "--pruning.nothing: unknown option"),
        ("--pruning.scorer=no.such.Scorer", "--pruning.scorer no.such.Scorer: No module named 'no'"),
        ("--pruning.pool=NoPool", "--pruning.pool NoPool: no such class"),
    ],
)
def test_one_line(argument, line):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(BlockwisePruning, "pruning")
    with pytest.raises(ArgumentError) as raised:
        parser.parse_args([argument])
    assert explain(str(raised.value.message), [argument]).startswith(line)
