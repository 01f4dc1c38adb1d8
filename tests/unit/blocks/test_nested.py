"""Containers through which blocks hand keys and values on are copied and restored, of whatever kind they are."""

from collections import OrderedDict, UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lvlm_prune.blocks.nested import contents_restored, map_tensors, tensors_in

KINDS: list[Callable[[dict[str, Any]], Any]] = [dict, OrderedDict, UserDict]


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_shares_no_container_and_no_tensor(kind: Callable[[dict[str, Any]], Any]) -> None:
    shared = kind({"keys": (torch.ones(2), torch.zeros(2))})
    copy = map_tensors({0: shared, 1: [shared]}, lambda tensor: tensor + 1)
    assert type(copy[0]) is type(shared)
    assert copy[0] is copy[1][0]
    copy[0]["more"] = torch.ones(1)
    assert list(shared) == ["keys"]
    assert torch.equal(copy[0]["keys"][0], torch.full((2,), 2.0))
    assert torch.equal(shared["keys"][0], torch.ones(2))
    assert len(list(tensors_in(copy))) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_block_leaves_behind_is_gone(kind: Callable[[dict[str, Any]], Any]) -> None:
    shared, several = kind({"old": torch.ones(1)}), [torch.ones(1)]
    with contents_restored(("mask", shared, several)):
        shared["new"] = torch.zeros(1)
        del shared["old"]
        several.append(torch.zeros(1))
    assert list(shared) == ["old"]
    assert len(several) == 1
