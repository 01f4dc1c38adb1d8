"""The records that a test run writes are held against their types and the page; here that a difference is found."""

import copy
import re

import pytest

from lvlm_prune.output.names import PRUNING_RECORD
from tests.documented import undeclared

FILE = {"bytes": 1, "sha256": "ab"}
RECORD = {
    "status": "complete",
    "quality": {"not_measured": "no samples"},
    "blocks": [{"index": 0, "seconds": {"read": 0.1}, "statistics": FILE, "drift_of_a_plugin": 0.5}],
    "linears": {"layers.0.q_proj": {"shape": [2, 3], "achieved": 0.5, "block": 0, "target": 0.5}},
}


@pytest.mark.parametrize(
    ("where", "key", "value", "said"),
    [
        ((), "of_nobody", 1, "of_nobody.*PruningRecord"),
        ((), "seconds", "a text", "seconds is 'a text'"),
        (("quality",), "tokens", 3, "tokens.*NoQuality"),
        (("blocks", 0, "statistics"), "bytes", -1, "bytes is -1"),
        (("blocks", 0, "seconds"), "sleep", 0.1, "sleep.*PhaseSeconds"),
        (("linears", "layers.0.q_proj"), "shape", [2], r"shape is \[2\]"),
    ],
)
def test_what_a_type_does_not_say_is_found_at_every_depth(where, key, value, said):
    assert not undeclared(PRUNING_RECORD, RECORD)
    record = copy.deepcopy(RECORD)
    inner = record
    for name in where:
        inner = inner[name]
    inner[key] = value
    assert re.search(said, " ".join(undeclared(PRUNING_RECORD, record)))


def test_what_the_page_does_not_name_is_found(monkeypatch):
    monkeypatch.setattr("tests.documented._words", lambda name: {"status", "quality", "blocks", "linears"})
    assert "not_measured is not in the page" in undeclared(PRUNING_RECORD, RECORD)
