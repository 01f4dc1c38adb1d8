"""A survey of the dense model runs once, changes nothing, and gives the same allocation on any number of processes."""

import json
import re
from statistics import median

import pytest
import torch
from transformers import AutoModelForImageTextToText

import lvlm_prune
from lvlm_prune.blocks import BlockRunner
from lvlm_prune.blocks.remaining import RemainingDecoderBlocks
from lvlm_prune.callbacks import BlockwisePruning, PluginSurvey, PruneCallback
from lvlm_prune.cli import main
from lvlm_prune.data import TensorSource
from lvlm_prune.methods.allocation import DASAllocation, ECoFLaPAllocation, KLAllocation, OWLAllocation
from lvlm_prune.methods.patterns import parse_pattern
from lvlm_prune.methods.pools import MixedPool
from lvlm_prune.methods.scorers import MagnitudeScorer
from lvlm_prune.methods.solvers import ALPSSolver
from lvlm_prune.methods.survey import surveyed_samples
from lvlm_prune.recovery.masks import ZeroMask, verify_zeros
from tests.conftest import ALL_SAMPLES, GOLDEN, MODEL
from tests.families import FAMILIES, Sample, make_inputs, tiny_model

SOURCE = TensorSource(str(GOLDEN / "calib.safetensors"))


def golden_model():
    return AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)


class Onlooker(PruneCallback):
    """Looks at everything in a survey, and changes nothing."""

    wants_survey = True
    survey_needs = frozenset({"outputs", "attention_mean"})

    def __init__(self):
        self.seen, self.sums, self.hooks = [], [], []

    def on_survey_start(self, trainer, pl_module):
        self.hooks.append("start")

    def on_survey_block_start(self, trainer, pl_module, block, tail):
        tail.losses([lambda sample: torch.no_grad()])

    def on_survey_batch_end(self, trainer, pl_module, block, sample):
        tokens = sample.tokens(needs=self.survey_needs)
        assert tokens.outputs.keys() == block.linears.keys()
        self.seen.append((block.index, sample.sample))
        self.sums.append(tokens.hidden_out.sum().item())

    def on_survey_end(self, trainer, pl_module):
        self.hooks.append("end")


def test_wanda_after_a_survey_that_nobody_needed_is_byte_identical(golden_arguments, tmp_path):
    arguments = [*golden_arguments, ALL_SAMPLES, "--pruning.pool=MixedPool", "--pruning.record=true"]
    assert main([*arguments, f"--output={tmp_path / 'plain'}"]) == 0
    onlooker = "--trainer.callbacks=tests.integration.test_surveys.Onlooker"
    assert main([*arguments, onlooker, f"--output={tmp_path / 'surveyed'}"]) == 0
    for name in ("model.safetensors", "statistics.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "surveyed" / name).read_bytes()
    survey = json.loads((tmp_path / "surveyed" / "pruning.json").read_text())["survey"]
    # Once through each block, and for the losses from each block to the last.
    assert survey["block_forwards"] == 8 * 2 + 8 * (2 + 1)


def test_a_survey_sees_each_sample_once_per_block_as_the_dense_model_computes_it():
    model, onlooker = golden_model(), Onlooker()
    runner, expected = BlockRunner(golden_model()), []
    for index in range(len(SOURCE)):
        batch = runner.catch(SOURCE[index])
        for block in range(len(runner)):
            expected.append(((block, index), runner.advance(block, batch).sum().item()))
    lvlm_prune.prune(model, SOURCE, BlockwisePruning(pool=MixedPool()), callbacks=[onlooker])
    assert onlooker.hooks == ["start", "end"]
    assert sorted(onlooker.seen) == sorted(key for key, _ in expected)
    assert dict(zip(onlooker.seen, onlooker.sums)) == dict(expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "make",
    [
        DASAllocation,
        OWLAllocation,
        lambda: ECoFLaPAllocation(samples=2),
        lambda: KLAllocation(samples=2, levels=[0.3, 0.7]),
    ],
)
def test_every_family_can_be_surveyed(make, family):
    """A sample with an image and one of text alone, in decoders that skip blocks, add features or share experts."""
    model = tiny_model(family)
    samples = [make_inputs(family, model, [sample]) for sample in (Sample(3, 0, 5), Sample(4, None, 3))]
    pruning = BlockwisePruning(pool=MixedPool(), allocation=make(), experts="keep")
    lvlm_prune.prune(model, samples, pruning)
    sizes = {name: rows * columns for name, (rows, columns) in pruning.shapes.items()}
    mean = sum(pruning.targets[name] * size for name, size in sizes.items()) / sum(sizes.values())
    assert mean == pytest.approx(0.5, abs=1e-6)
    assert min(pruning.targets.values()) < 0.5 < max(pruning.targets.values())


@pytest.mark.parametrize(
    "make", [DASAllocation, OWLAllocation, lambda: ECoFLaPAllocation(samples=2), lambda: KLAllocation(samples=2)]
)
def test_streamed_and_in_memory_allocate_alike(make, golden_arguments, tmp_path):
    model, allocation = golden_model(), make()
    pruning = BlockwisePruning(pool=MixedPool(), allocation=allocation)
    lvlm_prune.prune(model, SOURCE, pruning)
    arguments = [*golden_arguments, ALL_SAMPLES, "--pruning.pool=MixedPool"]
    arguments.append(f"--pruning.allocation={type(allocation).__name__}")
    if isinstance(allocation, (ECoFLaPAllocation, KLAllocation)):
        arguments.append("--pruning.allocation.samples=2")
    assert main([*arguments, f"--output={tmp_path / 'out'}"]) == 0
    streamed = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, weight in streamed.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_magnitude_with_an_allocation_catches_samples_for_the_survey_alone():
    class Counter(PruneCallback):
        forwards = 0

        def on_block_end(self, trainer, pl_module, block):
            self.forwards += block.forwards

    model, counter = golden_model(), Counter()
    pruning = BlockwisePruning(scorer=MagnitudeScorer(), allocation=OWLAllocation())
    manifest = lvlm_prune.prune(model, SOURCE, pruning, callbacks=[counter])
    assert manifest["survey"]["block_forwards"] == 8 * 2
    assert counter.forwards == 0


def test_excluded_linears_take_no_part_in_the_mean(golden_arguments, tmp_path):
    arguments = [*golden_arguments, "--pruning.allocation=DASAllocation", "--pruning.exclude=*.down_proj"]
    assert main([*arguments, f"--output={tmp_path / 'out'}"]) == 0
    manifest = json.loads((tmp_path / "out" / "pruning.json").read_text())
    entries = manifest["linears"]
    assert not any("down_proj" in name for name in [*entries, *manifest["survey"]["allocation"]["diversity"]])
    sizes = {name: entry["shape"][0] * entry["shape"][1] for name, entry in entries.items()}
    mean = sum(entries[name]["target"] * size for name, size in sizes.items()) / sum(sizes.values())
    assert mean == pytest.approx(0.5, abs=1e-6)


def test_losses_of_a_tail_are_the_models_own(golden_arguments):
    """Unchanged weights: the loss of the model's own forward on the text tokens, whatever block the tail starts at."""
    model = golden_model()
    seen = {}

    class Losses(PruneCallback):
        wants_survey, survey_samples = True, 3

        def on_survey_block_start(self, trainer, pl_module, block, tail: RemainingDecoderBlocks):
            for sample, losses in tail.losses([lambda sample: torch.no_grad()]).items():
                seen[block.index, sample] = losses[0]

    lvlm_prune.prune(model, SOURCE, BlockwisePruning(scorer=MagnitudeScorer()), callbacks=[Losses()])
    dense = golden_model()
    assert seen.keys() == {(block, sample) for block in range(2) for sample in surveyed_samples(3, range(8))}
    for (_, sample), loss in seen.items():
        inputs = SOURCE[sample]
        labels = inputs["input_ids"].clone()
        labels[(labels == dense.config.image_token_id) | (inputs["attention_mask"] == 0)] = -100
        with torch.no_grad():
            own = dense(**inputs, labels=labels).loss.item()
        assert loss == pytest.approx(own, rel=1e-5)


def test_ecoflap_importances_are_directional_derivatives():
    """|L(W + eps z) - L(W - eps z)| / 2 eps against z times the gradient of the model's own loss, over samples."""
    model, allocation = golden_model(), ECoFLaPAllocation(samples=3, seed=1)
    noise, samples = {}, surveyed_samples(3, range(8))
    for name, parameter in model.named_parameters():
        if ".layers." in name and name.endswith("proj.weight"):
            for sample in samples:
                dense = parameter.data.clone()
                with allocation._moved(parameter, name.removesuffix(".weight"), 1, sample):
                    noise[name, sample] = (parameter.data - dense) / allocation.epsilon
                assert torch.equal(parameter.data, dense)
    lvlm_prune.prune(golden_model(), SOURCE, BlockwisePruning(pool=MixedPool(), allocation=allocation))
    importance = allocation.survey_end(lambda values: values)["importance"]
    expected = dict.fromkeys(importance, 0.0)
    for sample in samples:
        inputs = SOURCE[sample]
        labels = inputs["input_ids"].clone()
        labels[labels == model.config.image_token_id] = -100
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        for name, parameter in model.named_parameters():
            if (name, sample) in noise:
                slope = (parameter.grad.double() * noise[name, sample].double()).sum().item()
                expected[name.removesuffix(".weight")] += abs(slope)
    assert len(expected) == 14
    for name, value in importance.items():
        assert value == pytest.approx(expected[name], rel=0.05, abs=2e-3), name


def test_ecoflap_says_its_cost_before_it_starts(golden_arguments, tmp_path, capsys):
    arguments = [*golden_arguments, "--pruning.allocation=ECoFLaPAllocation", "--pruning.allocation.samples=2"]
    assert main([*arguments, f"--output={tmp_path / 'out'}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cost = next(index for index, line in enumerate(lines) if line.startswith("survey for "))
    # 2 samples x 7 Linears x there and back x (2 + 1) blocks, and each sample once through each block
    assert lines[cost].startswith("survey for ECoFLaPAllocation: 88 block forwards and 56 losses per process, about ")
    assert any(re.fullmatch(r"surveyed: sparsity [\d.]+% to [\d.]+% per Linear", line) for line in lines[cost:])


@pytest.mark.parametrize("method", ["--pruning.scorer=WandaScorer", "--pruning.solver=ALPSSolver"])
def test_n_of_m_below_its_sparsity_leaves_dense_what_moves_answers_most(method, golden_arguments, tmp_path):
    """Each Linear is 2:4 or as it was, and those that stay move answers more for each weight."""
    options = ["--pruning.allocation=KLAllocation", "--pruning.pattern=2:4", "--pruning.sparsity=0.3"]
    assert main([*golden_arguments, method, *options, f"--output={tmp_path / 'out'}"]) == 0
    manifest = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert 0.3 <= manifest["sparsity"]["achieved"] < 0.35
    written = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    dense, sparse = golden_model().state_dict(), written.state_dict()
    zeros = {name: sparse[f"{name}.weight"] == 0 for name in manifest["linears"]}
    for name, entry in manifest["linears"].items():
        assert entry["target"] in (0.0, 0.5)
        assert set(zeros[name].unflatten(1, (-1, 4)).sum(2).unique().tolist()) == {4 * entry["target"]}
        assert entry["target"] or torch.equal(dense[f"{name}.weight"], sparse[f"{name}.weight"])
    (kl,) = [found["kl"] for found in manifest["survey"].values() if isinstance(found, dict)]
    costs = {True: [], False: []}
    for name, (value,) in kl.items():
        costs[bool(manifest["linears"][name]["target"])].append(value / zeros[name].numel())
    assert median(costs[True]) < median(costs[False]) / 2


def test_of_several_patterns_each_linear_gets_one_and_recovery_keeps_it(golden_arguments, tmp_path):
    """And the mean is reached; what differs from Linear to Linear is what answers say."""
    options = ["--pruning.allocation=KLAllocation", "--pruning.allocation.samples=2"]
    options += ["--pruning.pattern=3:4,2:4,1:4", "--pruning.sparsity=0.5"]
    output = tmp_path / "out"
    assert main([*golden_arguments, ALL_SAMPLES, "--pruning.pool=MixedPool", *options, f"--output={output}"]) == 0
    manifest = json.loads((output / "pruning.json").read_text())
    assert 0.5 <= manifest["sparsity"]["achieved"] < 0.55
    written = AutoModelForImageTextToText.from_pretrained(output, dtype=torch.float32)
    weights, pattern = written.state_dict(), parse_pattern(manifest["pattern"])
    targets = {name: entry["target"] for name, entry in manifest["linears"].items()}
    assert len(set(targets.values())) > 2
    model = golden_model()
    allocation = KLAllocation(samples=2)
    method = BlockwisePruning(pool=MixedPool(), allocation=allocation, pattern="1:4,2:4,3:4", sparsity=0.5)
    lvlm_prune.prune(model, SOURCE, method)
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    for name, target in targets.items():
        zeros = (weights[f"{name}.weight"] == 0).unflatten(1, (-1, 4)).sum(2)
        assert target in (0.0, 0.25, 0.5, 0.75)
        assert set(zeros.unique().tolist()) == {4 * target}, name
        if target:  # what recovery asks
            mask = ZeroMask(weights[f"{name}.weight"])
            verify_zeros(name, mask, weights[f"{name}.weight"], pattern)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pruning.pattern=2:4,1:4"], "--pruning.pattern 2:4,1:4: several patterns need --pruning.allocation KL"),
        (["--pruning.pattern=2:4,4:8", "--pruning.allocation=KLAllocation"], "give 4:8, which allows more masks"),
        (
            ["--pruning.pattern=2:4,3:4", "--pruning.allocation=KLAllocation", "--pruning.sparsity=0.6"],
            "contradicts pattern 3:4,2:4, whose highest sparsity is 0.5",
        ),
        (["--pruning.pattern=2:4", "--pruning.sparsity=0.4"], "KLAllocation reaches a lower mean"),
        (
            ["--pruning.pattern=2:4", "--pruning.sparsity=0.6", "--pruning.allocation=KLAllocation"],
            "contradicts pattern 2:4, whose sparsity is 0.5",
        ),
        (["--pruning.allocation=OWLAllocation", "--pruning.pattern=2:4"], "cannot be used with 2:4"),
        (
            ["--pruning.allocation=DASAllocation", "--pruning.allocation.max_sparsity=0.4"],
            "--pruning.allocation.max_sparsity 0.4: below the target 0.5",
        ),
        (["--pruning.allocation=DASAllocation", "--pruning.allocation.pairs=some"], "--pruning.allocation.pairs some"),
    ],
)
def test_allocations_that_cannot_be_are_refused_before_anything_is_written(
    options, message, golden_arguments, tmp_path, capsys
):
    assert main([*golden_arguments, *options, f"--output={tmp_path / 'out'}"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "out").exists()


def test_custom_sparsities_from_a_configuration_file(golden_arguments, tmp_path):
    config = tmp_path / "custom.yaml"
    config.write_text(
        "pruning:\n  allocation:\n    class_path: lvlm_prune.methods.allocation.CustomAllocation\n    init_args:\n"
        '      sparsities: {"*.layers.0.*": 0.25, "*.v_proj": 0.0}\n'
    )
    assert main([*golden_arguments, f"--config={config}", f"--output={tmp_path / 'out'}"]) == 0
    entries = json.loads((tmp_path / "out" / "pruning.json").read_text())["linears"]
    for name, entry in entries.items():
        if ".layers.0." in name:
            assert entry["target"] == 0.25
        elif name.endswith("v_proj"):
            assert entry["achieved"] == 0
        else:
            assert entry["target"] > 0.5
    assert main(["prune", f"--config={tmp_path / 'out' / 'config.yaml'}", f"--output={tmp_path / 'again'}"]) == 0


# ---- KL --------------------------------------------------------------------------------------------------------------
def test_kl_says_its_cost_and_keeps_to_it(golden_arguments, tmp_path, capsys):
    """Two samples, 2 blocks of 7 Linears, 3 levels: 42 changes, each through its block and those after it."""
    arguments = [*golden_arguments, "--pruning.allocation=KLAllocation", "--pruning.allocation.samples=2"]
    assert main([*arguments, f"--output={tmp_path / 'out'}"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("survey for "))
    # The dense model's logits are made once per sample and block; every sample goes once more through each block, as
    # in every survey.
    assert line.startswith("survey for KLAllocation: 138 block forwards and 88 losses per process, about ")
    survey = json.loads((tmp_path / "out" / "pruning.json").read_text())["survey"]
    assert survey["block_forwards"] == 138
    assert len(survey["allocation"]["kl"]) == 14
    assert all(len(values) == 3 for values in survey["allocation"]["kl"].values())
    assert main([*arguments, f"--output={tmp_path / 'planned'}", "--plan=true"]) == 0
    (planned,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("survey first")]
    assert "for KLAllocation: 2 samples, 138 block forwards and 88 losses; it decides the sparsity" in planned


@pytest.mark.parametrize("groups", ["kind", "block"])
def test_kl_of_groups_of_linears(groups):
    model = golden_model()
    pruning = BlockwisePruning(pool=MixedPool(), allocation=KLAllocation(samples=2, groups=groups), sparsity=0.6)
    manifest = lvlm_prune.prune(model, SOURCE, pruning)
    assert len(manifest["survey"]["allocation"]["kl"]) == {"kind": 4, "block": 2}[groups]
    assert manifest["sparsity"]["achieved"] == pytest.approx(0.6, abs=0.01)


def test_kl_tries_the_methods_own_solver_and_leaves_the_dense_model_as_it_was(monkeypatch):
    """The survey's solves are those of the method, on its own statistics; afterwards every weight is what it was."""
    solved, before = [], golden_model().state_dict()

    class Watched(ALPSSolver):
        def quick(self):
            return self

        def solve(self, problem):
            solved.append((problem.name, problem.sparsity))
            return super().solve(problem)

    def compare(self, trainer, pl_module):
        for name, weight in pl_module.model.state_dict().items():
            assert torch.equal(weight, before[name]), name

    monkeypatch.setattr(PluginSurvey, "on_survey_restored", compare)
    monkeypatch.setattr(BlockwisePruning, "on_block_start", lambda *_, **__: 1 // 0)
    pruning = BlockwisePruning(pool=MixedPool(), solver=Watched(), allocation=KLAllocation(samples=2), sparsity=0.6)
    with pytest.raises(ZeroDivisionError):
        lvlm_prune.prune(golden_model(), SOURCE, pruning)
    assert len(solved) == 14 * 3
    assert {round(sparsity, 6) for _, sparsity in solved} == {0.45, 0.6, 0.7}


def test_kl_gives_more_where_the_answers_hang_on_it():
    """A block whose output is scaled down to nothing can lose nearly everything."""
    model = golden_model()
    layer = model.model.language_model.layers[1]
    layer.mlp.down_proj.weight.data *= 1e-4
    pruning = BlockwisePruning(pool=MixedPool(), allocation=KLAllocation(samples=4), sparsity=0.6)
    lvlm_prune.prune(model, SOURCE, pruning)
    name = next(name for name in pruning.targets if "layers.1" in name and name.endswith("up_proj"))
    assert pruning.targets[name] == pytest.approx(0.75, abs=1e-3)


@pytest.mark.slow
def test_kl_in_memory_and_streamed_give_the_same_weights(golden_arguments, tmp_path):
    model, allocation = golden_model(), KLAllocation(samples=2, groups="kind")
    pruning = BlockwisePruning(pool=MixedPool(), solver=ALPSSolver(schedule="paper"), allocation=allocation)
    lvlm_prune.prune(model, SOURCE, pruning)
    options = ["solver=ALPSSolver", "solver.schedule=paper", "pool=MixedPool"]
    options += ["allocation=KLAllocation", "allocation.samples=2", "allocation.groups=kind"]
    arguments = [f"--pruning.{option}" for option in options]
    assert main([*golden_arguments, ALL_SAMPLES, *arguments, f"--output={tmp_path / 'out'}"]) == 0
    written = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, weight in written.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
