"""Whatever the shapes and the scores: the weighted mean is the target, or there is one clear error."""

import random

import pytest

from lvlm_prune.methods.allocation import (
    CustomAllocation,
    DASAllocation,
    ECoFLaPAllocation,
    OWLAllocation,
    UniformAllocation,
)
from lvlm_prune.methods.allocation.base import block_of

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def random_shapes(generator):
    return {
        f"model.layers.{block}.{kind}": (generator.randint(1, 300), generator.randint(1, 300))
        for block in range(generator.randint(1, 6))
        for kind in KINDS
    }


def random_scores(generator, names):
    """Ordinary, heavy-tailed, and mostly zero ones."""
    kind = generator.randrange(3)
    draw = [generator.random, lambda: generator.paretovariate(0.3), lambda: float(generator.random() < 0.2)][kind]
    return {name: draw() for name in names}


def allocations(generator, shapes):
    scores = random_scores(generator, shapes)
    blocks = list(dict.fromkeys(block_of(name) for name in shapes))
    yield UniformAllocation(), {}
    for variant in ("linears", "per_block"):
        for aggregate in ("sum", "avg"):
            yield DASAllocation(variant, aggregate=aggregate), {"diversity": scores}
    yield DASAllocation(max_sparsity=0.93), {"diversity": scores}
    yield OWLAllocation(width=0.05), {"outlier_ratio": random_scores(generator, blocks)}
    yield ECoFLaPAllocation(), {"importance": scores}


@pytest.mark.parametrize("seed", range(40))
def test_the_weighted_mean_is_the_target(seed):
    generator = random.Random(seed)
    shapes, target = random_shapes(generator), generator.uniform(0.12, 0.88)
    for allocation, findings in allocations(generator, shapes):
        allocation.check(shapes, target)
        if findings:
            allocation.use_survey(findings)
        found = allocation.allocate(shapes, target)
        assert list(found) == list(shapes)
        assert all(0 <= value <= 1 for value in found.values())
        sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
        mean = sum(found[name] * sizes[name] for name in shapes) / sum(sizes.values())
        assert mean == pytest.approx(target, abs=1e-6), allocation


SHAPES = {"0.q_proj": (10, 10), "0.up_proj": (30, 10)}


@pytest.mark.parametrize("kind", [DASAllocation, ECoFLaPAllocation])
def test_a_target_above_the_maximum_is_refused_before_anything_runs(kind):
    with pytest.raises(ValueError, match=r"`max_sparsity` 0.4: below the target 0.5"):
        kind(max_sparsity=0.4).check(SHAPES, 0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DASAllocation(variant="layer"), "`variant` layer"),
        (lambda: DASAllocation(pairs="some"), "`pairs` some"),
        (lambda: DASAllocation(max_sparsity=1.5), "`max_sparsity` 1.5"),
        (lambda: OWLAllocation(threshold=0), "`threshold` 0"),
        (lambda: OWLAllocation(width=-0.1), "`width` -0.1"),
        (lambda: ECoFLaPAllocation(epsilon=0), "`epsilon` 0"),
        (lambda: ECoFLaPAllocation(samples=0), "`samples` 0"),
        (lambda: CustomAllocation({"*": 1.2}), "`sparsities` *: 1.2"),
    ],
)
def test_options_out_of_range(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value).startswith(message)


def test_owl_refuses_a_width_that_leaves_the_range():
    allocation = OWLAllocation(width=0.2)
    allocation.use_survey({"outlier_ratio": {"0": 0.0, "1": 1.0}})
    with pytest.raises(ValueError, match=r"sparsities from 0.700 to 1.100; choose a smaller width"):
        allocation.allocate({"0.q_proj": (10, 10), "1.q_proj": (10, 10)}, 0.9)


@pytest.mark.parametrize(
    ("sparsities", "problem"),
    [
        ({"*.k_proj": 0.5}, "*.k_proj: matches no Linear that is pruned"),
        ({"*": 0.5, "*.q_proj": 0.4}, "*.q_proj: an earlier pattern counts for every Linear that this one matches"),
        ({"*.q_proj": 0.2, "*.up_proj": 0.4}, "their mean over all weights is 0.35"),
        ({"*.up_proj": 0.9}, "all other Linears would need a sparsity of -0.7"),
    ],
)
def test_custom_sparsities_that_cannot_be(sparsities, problem):
    with pytest.raises(ValueError) as error:
        CustomAllocation(sparsities).check(SHAPES, 0.5)
    assert problem in str(error.value)


def test_custom_sparsities_of_everything_must_come_to_the_target():
    found = CustomAllocation({"*.q_proj": 0.2, "*": 0.6}).allocate(SHAPES, 0.5)
    assert found == {"0.q_proj": 0.2, "0.up_proj": 0.6}
