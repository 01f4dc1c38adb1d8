"""What holds for every input, held against inputs that nobody thought of."""

import json
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm_prune.data import MixtureSource
from lvlm_prune.data.source import CalibrationSource
from lvlm_prune.errors import InputError
from lvlm_prune.methods.allocation.water_filling import water_filling
from lvlm_prune.methods.patterns import SemiStructured, Unstructured
from lvlm_prune.methods.statistics import ChannelNorm, Gram
from lvlm_prune.output.manifest import Manifest
from lvlm_prune.output.names import PRUNING_RECORD

settings.register_profile("short", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("short")

# Few different values, so that there are ties; both zeros and infinity.
SCORES = st.sampled_from([0.0, -0.0, 1.0, 1.5, 2.0, 1e-45, 3e38, float("inf")])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def lowest_by_sorting(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` of each row in a stable sort."""
    order = scores.sort(dim=1, stable=True).indices[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, True)


COLUMNS = st.integers(1, 12)


@st.composite
def matrices(draw, columns=COLUMNS) -> torch.Tensor:
    shape = draw(st.integers(1, 5)), draw(columns)
    values = draw(st.lists(SCORES, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    return torch.tensor(values, dtype=torch.float32).reshape(shape)


@given(matrices(), st.floats(0, 1, exclude_max=True), st.sampled_from(["row", "layer"]))
def test_unstructured_masks_are_those_of_a_stable_sort(scores, sparsity, group):
    grouped = scores if group == "row" else scores.reshape(1, -1)
    expected = lowest_by_sorting(grouped, int(grouped.shape[1] * sparsity)).view_as(scores)
    assert Unstructured().mask(scores, sparsity, group).equal(expected)


@given(st.data(), st.integers(2, 8))
def test_semi_structured_masks_are_those_of_a_stable_sort(data, size):
    keep = data.draw(st.integers(1, size - 1))
    scores = data.draw(matrices(st.integers(1, 4).map(lambda groups: groups * size)))
    expected = lowest_by_sorting(scores.reshape(-1, size), size - keep).view_as(scores)
    assert SemiStructured(keep, size).mask(scores, 1 - keep / size).equal(expected)


@given(
    st.lists(st.tuples(st.floats(0, 1e308), st.integers(1, 10**9)), min_size=1, max_size=8),
    st.floats(0.01, 0.99),
    st.floats(0, 1),
)
def test_water_filling_uses_up_its_budget_and_keeps_to_the_maximum(groups, maximum, share):
    scores, sizes = zip(*groups)
    sparsity = maximum * share
    found = water_filling(scores, sizes, sparsity, maximum)
    assert all(0 <= value <= maximum + 1e-9 for value in found)
    mean = sum(value * size for value, size in zip(found, sizes)) / sum(sizes)
    assert abs(mean - sparsity) < 1e-9


class Counted(CalibrationSource):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[index]])}


PARTS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=4)


@given(PARTS, st.integers(0, 3))
def test_a_mixture_gives_as_many_samples_as_its_ratios_allow(parts, seed):
    """Sizes 1 and 13 in the ratio 2 to 17 give 14."""
    sizes, ratios = zip(*parts)
    source = MixtureSource([Counted(size) for size in sizes], [float(ratio) for ratio in ratios])
    allowed = [
        count
        for count in range(sum(sizes) + 1)
        if all(share <= size for share, size in zip(source.shares(count), sizes))
    ]
    assert source.available == max(allowed)
    chosen = source.choose(source.available, seed)
    assert len(set(chosen)) == len(chosen) == source.available
    assert [sum(source.part_of(one) == part for one in chosen) for part in range(len(sizes))] == source.shares(
        source.available
    )


@given(st.data(), st.sampled_from([ChannelNorm, Gram]), st.integers(1, 5), st.integers(1, 6))
def test_statistics_are_the_same_however_samples_are_dealt_out(data, kind, channels, samples):
    """In any order, over any number of processes whose sums are added up."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    inputs = [torch.randn(3, channels, generator=generator) for _ in range(samples)]
    owner = [data.draw(st.integers(0, 2)) for _ in range(samples)]
    order = data.draw(st.permutations(range(samples)))
    alone, shared = kind(channels), [kind(channels) for _ in range(3)]
    for sample in inputs:
        alone.add(sample, torch.ones(3))
    for number in order:
        shared[owner[number]].add(inputs[number], torch.ones(3))
    for own, parts in zip(alone.tensors(), zip(*(one.tensors() for one in shared))):
        torch.testing.assert_close(sum(parts), own, rtol=1e-12, atol=1e-12)


LINEARS = st.fixed_dictionaries({}, optional={"shape": JSON, "achieved": JSON, "block": JSON, "zeros": JSON})
MANIFESTS = JSON | st.fixed_dictionaries(
    {},
    optional={
        "status": JSON | st.sampled_from(["copying", "pruning", "complete"]),
        "blocks": JSON | st.lists(st.fixed_dictionaries({}, optional={"index": JSON, "statistics": JSON}), max_size=2),
        "linears": JSON | st.dictionaries(st.text(max_size=3), LINEARS, max_size=2),
        "config": JSON,
        "model": JSON,
        "calibration": JSON,
        "files": JSON,
    },
)


@given(MANIFESTS)
def test_a_manifest_of_any_json_is_read_or_refused(content):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / PRUNING_RECORD).write_text(json.dumps(content))
        with suppress(InputError):
            manifest = Manifest.read(folder)
            manifest.finished_blocks()
            manifest.achieved_sparsity()
            manifest.refuse_other({"config": {"seed": 0}, "model": {"path": "a", "fingerprint": "b"}}, folder)


@given(st.binary(max_size=60))
def test_a_manifest_of_any_bytes_is_refused(content):
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / PRUNING_RECORD).write_bytes(content)
        with suppress(InputError):
            Manifest.read(Path(name))
