"""Scorers in whole runs: what they promise, report and share."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import lvlm_prune
from lvlm_prune.callbacks import BlockwisePruning
from lvlm_prune.cli import main
from lvlm_prune.data import TensorSource
from lvlm_prune.errors import InputError
from lvlm_prune.methods.pools import MixedPool, Pool
from lvlm_prune.methods.scorers import RIAScorer, SparseGPTScorer, WandaScorer
from lvlm_prune.methods.solvers import ALPSSolver, RefitSolver, SparseGPTSolver, SparseSwapsSolver
from lvlm_prune.methods.tokens import Selection, Tokens
from tests.conftest import ALL_SAMPLES, GOLDEN, MODEL

SOURCE = TensorSource(str(GOLDEN / "calib.safetensors"))
SPARSEGPT = ["--pruning.pool=MixedPool", "--pruning.scorer=SparseGPTScorer"]


def golden_model():
    return AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)


class OnesPool(Pool):
    """Every token counts, with the real weight 1."""

    def select(self, tokens: Tokens, linear: str | None = None) -> Selection:
        return Selection(torch.ones(len(tokens.visual)))


@pytest.mark.parametrize("scorer", [WandaScorer(), WandaScorer(variant=True), RIAScorer(), SparseGPTScorer()])
def test_a_pool_whose_weights_are_all_one_is_the_mixed_pool(scorer):
    mixed, ones = golden_model(), golden_model()
    lvlm_prune.prune(mixed, SOURCE, BlockwisePruning(pool=MixedPool(), scorer=scorer))
    lvlm_prune.prune(ones, SOURCE, BlockwisePruning(pool=OnesPool(), scorer=scorer))
    for name, weight in mixed.state_dict().items():
        assert torch.equal(weight, ones.state_dict()[name]), name


class ForgetfulScorer(WandaScorer):
    """Prunes by an argument that nobody could read from it."""

    def __init__(self, power: float = 1.0) -> None:
        super().__init__()
        self._exponent = power


class ForgetfulSolver(SparseGPTSolver):
    """The same as part of another plugin."""

    def __init__(self, power: float = 1.0) -> None:
        super().__init__(damping=power)


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ({"scorer": ForgetfulScorer(2.0)}, "pruning.scorer ForgetfulScorer"),
        ({"solver": RefitSolver(start=ForgetfulSolver())}, "pruning.solver.start ForgetfulSolver"),
    ],
)
def test_a_method_of_which_no_record_could_tell_is_refused(method, option):
    model = golden_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(InputError) as error:
        lvlm_prune.prune(model, SOURCE, BlockwisePruning(**method))
    assert str(error.value) == (
        f"--{option}: does not keep its argument `power`, so that no record would tell it; write self.power = power"
    )
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_sparsegpt_keeps_the_outputs_closer_to_the_dense_model_than_wanda():
    dense = golden_model()
    sample = SOURCE[0]
    expected = dense(**sample).logits

    def error(scorer):
        model = golden_model()
        lvlm_prune.prune(model, SOURCE, BlockwisePruning(pool=MixedPool(), scorer=scorer, sparsity=0.6))
        return (model(**sample).logits - expected).square().mean().item()

    with torch.no_grad():
        assert error(SparseGPTScorer()) < error(WandaScorer())


def test_each_site_is_factorised_once(monkeypatch):
    factorise, calls = torch.linalg.cholesky_ex, []
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda *args, **out: calls.append(1) or factorise(*args, **out))
    # The small weight on which a scorer is tried before the run is not counted.
    monkeypatch.setattr("lvlm_prune.pruning.faults.try_scorer", lambda scorer: None)
    lvlm_prune.prune(golden_model(), SOURCE, BlockwisePruning(pool=MixedPool(), scorer=SparseGPTScorer()))
    assert len(calls) == 2 * 4  # q/k/v, o, gate/up, down; 14 Linears


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_sparsegpt_writes_updated_weights_and_verifies_them(pattern, golden_arguments, tmp_path):
    output = tmp_path / "out"
    arguments = [*SPARSEGPT, "--pruning.scorer.block_size=32", f"--pruning.pattern={pattern}"]
    assert main([*golden_arguments, *arguments, "--pruning.record=true", f"--output={output}"]) == 0
    manifest = json.loads((output / "pruning.json").read_text())
    assert manifest["status"] == "complete"
    assert manifest["updates_weights"]
    assert "warnings" not in manifest
    dense, sparse = (load_file(folder / "model.safetensors") for folder in (MODEL, output))
    changed = [key for key in dense if not torch.equal(dense[key], sparse[key])]
    assert len(changed) == 14
    for key in changed:
        weight, rows = sparse[key], len(sparse[key])
        kept = weight != 0
        assert not torch.equal(weight[kept], dense[key][kept])
        blocks = [int((part == 0).sum()) for part in weight.split(32, dim=1)]
        assert blocks == [rows * 16 + (pattern == "unstructured")] * len(blocks)
    # Channel norms are recorded whatever the statistic is.
    assert load_file(output / "statistics.safetensors")["scaler_row.0.self_attn.q_proj"].shape == (64,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sparsegpt_on_narrow_checkpoints(dtype, golden_arguments, tmp_path):
    """float16 loses the smallest updated weights: zeros that nobody pruned, and no broken promise."""
    model = golden_model()
    for name, parameter in model.named_parameters():
        if name.endswith("up_proj.weight"):
            parameter.data *= 1e-5
    model.to(dtype)
    for parameter in model.parameters():  # no zeros of its own that would excuse new ones
        parameter.data[parameter == 0] = 2.0**-24
    model.save_pretrained(tmp_path / "narrow")
    arguments = [argument for argument in golden_arguments if "model.path" not in argument]
    arguments += [f"--model.path={tmp_path / 'narrow'}", "--model.dtype=float32", f"--output={tmp_path / 'out'}"]
    assert main([*arguments, *SPARSEGPT]) == 0
    for key, weight in load_file(tmp_path / "out" / "model.safetensors").items():
        if key.endswith("proj.weight") and ".layers." in key:
            assert weight.dtype == dtype
            assert not torch.signbit(weight[weight == 0]).any()


def test_damping_that_had_to_be_raised_is_one_line(golden_arguments, tmp_path, capsys):
    """One sample of few tokens and no damping: every Gram matrix is singular."""
    output = tmp_path / "out"
    arguments = [*SPARSEGPT, "--pruning.scorer.damping=0", "--pruning.pool=TextOnlyPool", "--data.num_samples=1"]
    assert main([*golden_arguments, *arguments, f"--output={output}"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "singular Gram matrix" in line]
    assert len(lines) == 1
    manifest = json.loads((output / "pruning.json").read_text())
    assert manifest["warnings"] == [lines[0].removeprefix("warning: ")]
    raised = {name: entry["solver"]["damping"] for name, entry in manifest["linears"].items() if "solver" in entry}
    assert f"at {len(raised)} Linears" in lines[0]
    assert all(damping > 0 for damping in raised.values())


def test_a_linear_that_sees_only_zeros_is_left_dense(capsys):
    """Nothing is known about its weights; SparseGPT would take all its columns for dead."""
    model = golden_model()
    for layer in model.model.language_model.layers:
        layer.self_attn.v_proj.weight.data.zero_()
        layer.self_attn.v_proj.bias.data.zero_()
    before = model.model.language_model.layers[0].self_attn.o_proj.weight.clone()
    manifest = lvlm_prune.prune(model, SOURCE, BlockwisePruning(pool=MixedPool(), scorer=SparseGPTScorer()))
    left = [
        name
        for name, entry in manifest["linears"].items()
        if entry.get("note") == "saw no calibration token, or zeros alone"
    ]
    assert len(left) == 2
    assert all(name.endswith("o_proj") for name in left)
    assert torch.equal(before, model.model.language_model.layers[0].self_attn.o_proj.weight)


def test_a_block_that_sees_only_zeros_is_not_the_fault_of_the_pool():
    model = golden_model()
    layer = model.model.language_model.layers[0]
    for silent in (layer.input_layernorm.weight, layer.post_attention_layernorm.weight, layer.self_attn.v_proj.bias):
        silent.data.zero_()
    with pytest.raises(InputError, match="selects tokens that are 0 in every channel, in all calibration samples"):
        lvlm_prune.prune(model, SOURCE, BlockwisePruning(pool=MixedPool()))


# ---- solvers ---------------------------------------------------------------------------------------------------------
ALPS = ["--pruning.pool=MixedPool", "--pruning.solver=ALPSSolver"]


def error_of(pruning):
    """Squared distance of the logits from the dense model's, on a calibration sample."""
    sample, model = SOURCE[0], golden_model()
    with torch.no_grad():
        expected = model(**sample).logits
        lvlm_prune.prune(model, SOURCE, pruning)
        return (model(**sample).logits - expected).square().mean().item()


def test_each_solver_stays_nearer_to_the_dense_model_than_the_one_before():
    options = {"pool": MixedPool(), "sparsity": 0.6}
    wanda, refit, alps = (
        error_of(BlockwisePruning(**options, scorer=WandaScorer(), solver=solver))
        for solver in (None, RefitSolver(), ALPSSolver())
    )
    assert alps < refit < wanda


def test_a_solver_named_beside_its_scorer_gives_the_scorers_bytes():
    by_scorer, by_solver = golden_model(), golden_model()
    lvlm_prune.prune(by_scorer, SOURCE, BlockwisePruning(pool=MixedPool(), scorer=SparseGPTScorer(block_size=32)))
    lvlm_prune.prune(by_solver, SOURCE, BlockwisePruning(pool=MixedPool(), solver=SparseGPTSolver(block_size=32)))
    for name, weight in by_scorer.state_dict().items():
        assert torch.equal(weight, by_solver.state_dict()[name]), name


@pytest.mark.parametrize("solver", ["ALPSSolver", "RefitSolver"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_solved_weights_are_written_and_verified(solver, pattern, golden_arguments, tmp_path):
    output = tmp_path / "out"
    arguments = ["--pruning.pool=MixedPool", f"--pruning.solver={solver}", f"--pruning.pattern={pattern}"]
    assert main([*golden_arguments, *arguments, f"--output={output}"]) == 0
    manifest = json.loads((output / "pruning.json").read_text())
    assert manifest["status"] == "complete"
    assert manifest["updates_weights"]
    assert manifest["method"]["init_args"]["solver"]["class_path"].endswith(solver)
    dense, sparse = (load_file(folder / "model.safetensors") for folder in (MODEL, output))
    changed = [key for key in dense if not torch.equal(dense[key], sparse[key])]
    assert len(changed) == 14
    for key in changed:
        zeros = sparse[key] == 0
        assert int(zeros.sum()) == zeros.numel() // 2
        if pattern == "2:4":
            assert set(zeros.unflatten(1, (-1, 4)).sum(dim=2).flatten().tolist()) == {2}


@pytest.mark.parametrize("solver", [ALPSSolver(), RefitSolver(), SparseSwapsSolver()])
def test_solvers_in_memory_and_streamed_give_the_same_weights(solver, golden_arguments, tmp_path):
    model = golden_model()
    lvlm_prune.prune(model, SOURCE, BlockwisePruning(pool=MixedPool(), solver=solver))
    arguments = ["--pruning.pool=MixedPool", f"--pruning.solver={type(solver).__name__}"]
    assert main([*golden_arguments, ALL_SAMPLES, *arguments, f"--output={tmp_path / 'out'}"]) == 0
    written = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, weight in written.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_what_a_solver_met_is_one_line(golden_arguments, tmp_path, capsys):
    """One sample of few tokens and no damping: every Gram matrix is singular."""
    arguments = [*ALPS, "--pruning.solver.damping=0", "--pruning.pool=TextOnlyPool", "--data.num_samples=1"]
    assert main([*golden_arguments, *arguments, f"--output={tmp_path / 'out'}"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "nearly singular Gram matrix" in line]
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("option", "value"), [("iterations", "0"), ("schedule", "slow"), ("damping", "-1"), ("damping", "nan")]
)
def test_bad_options_of_a_solver_are_one_line(option, value, golden_arguments, tmp_path, capsys):
    assert main([*golden_arguments, *ALPS, f"--pruning.solver.{option}={value}", f"--output={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert f"--pruning.solver.{option} {value}" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
