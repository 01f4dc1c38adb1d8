"""How close the rescaled embedded model comes to real weights."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.outlier_channels import LINEARS, distance, exponents_of, observe
from lvlm_prune.demo.outliers import EXPONENTS

RECORD = Path(__file__).parents[3] / "benchmarks" / "outlier_channels.json"
# What `fit` chose: spread, share of the channels that become louder, by how many powers of two.
CHOICES = {
    "attention_input": (0.0, 0.005, 2),
    "rotary": (0.8, 0.0, 0),
    "values": (0.6, 0.02, 1),
    "products": (0.5, 0.005, 1),
}
# No pair reaches the input of gate and up.
OUT_OF_REACH = {
    ("mlp.gate_proj", "loudest_channel"),
    ("mlp.gate_proj", "weight_kurtosis"),
    ("mlp.up_proj", "loudest_channel"),
}


@pytest.fixture(scope="module")
def observed():
    return observe("demo")


def test_statistics_are_those_of_real_weights(observed):
    """Medians over the blocks lie where those of real blocks do, but for a tenth, and were mostly far outside."""
    real = json.loads(RECORD.read_text())["gemma-3-270m"]
    before, after = observed[0].statistics({}), observed[0].statistics(load_file(EXPONENTS))
    assert distance(after, real) < distance(before, real) / 2
    for linear, name in set(product(LINEARS, ("loudest_channel", "weight_kurtosis", "correlation"))) - OUT_OF_REACH:
        median, (_, least, greatest) = after[linear][name][0], real[linear][name]
        slack = 0.1 * abs(median)
        assert least - slack <= median <= greatest + slack, (linear, name)


def test_the_exponents_are_those_of_the_choice(observed):
    found, stored = exponents_of(*observed[:1], CHOICES, observed[1]), load_file(EXPONENTS)
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], stored[name]) for name in stored)
