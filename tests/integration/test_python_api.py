"""Runs from Python are recorded and go on as those of the command line."""

import json
import re

import lightning as L
import pytest
import torch

import lvlm_prune
from lvlm_prune.callbacks import BlockwisePruning, PruneCallback, PruningReport, SparseLoRA
from lvlm_prune.data import CalibrationDataModule, RecoveryDataModule, TensorSource
from lvlm_prune.errors import InputError, RunError
from lvlm_prune.methods.allocation import OWLAllocation
from lvlm_prune.methods.pools import MixedPool, TextOnlyPool
from lvlm_prune.methods.scorers import MagnitudeScorer
from lvlm_prune.methods.solvers import ALPSSolver, LinearProblem, Solution, Solver
from lvlm_prune.methods.statistics import Statistic
from lvlm_prune.module import LVLMModule
from lvlm_prune.recovery.distillation import Distillation
from lvlm_prune.recovery.reconstruction import Reconstruction
from lvlm_prune.run import RunTrainer
from lvlm_prune.trainer import LVLMTrainer
from tests.conftest import GOLDEN, MODEL


def test_from_python_a_resume_with_another_method_is_refused(tmp_path, monkeypatch, blank_figures):
    """A run from Python records its method as the command line does."""
    folder = tmp_path / "out"
    source = TensorSource(str(GOLDEN / "calib.safetensors"))

    def run(pruning: BlockwisePruning, **options):
        return lvlm_prune.prune(MODEL, source, pruning, folder, **options)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(PruningReport, "on_block_end", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(BlockwisePruning(sparsity=0.5, pool=MixedPool()))
    begun = json.loads((folder / "pruning.json").read_text())
    assert begun["config"]["pruning"]["sparsity"] == 0.5
    others = {
        "pruning.sparsity": BlockwisePruning(sparsity=0.8, pool=MixedPool()),
        "pruning.pattern": BlockwisePruning(pattern="2:4", pool=MixedPool()),
        "pruning.pool.class_path": BlockwisePruning(sparsity=0.5, pool=TextOnlyPool()),
        "pruning.scorer.class_path": BlockwisePruning(sparsity=0.5, pool=MixedPool(), scorer=MagnitudeScorer()),
        "pruning.solver": BlockwisePruning(sparsity=0.5, pool=MixedPool(), solver=ALPSSolver()),
        "pruning.allocation": BlockwisePruning(sparsity=0.5, pool=MixedPool(), allocation=OWLAllocation()),
        "pruning.exclude": BlockwisePruning(sparsity=0.5, pool=MixedPool(), exclude="*.down_proj"),
        "pruning.sequential": BlockwisePruning(sparsity=0.5, pool=MixedPool(), sequential=True),
    }
    for option, other in others.items():
        with pytest.raises(InputError) as refused:
            run(other, resume=True)
        assert refused.value.option.startswith((option, "pruning.name"))
    assert run(BlockwisePruning(sparsity=0.5, pool=MixedPool()), resume=True)["status"] == "complete"


class RowOfAMask(Solver):
    """Its mask would be broadcast over all rows."""

    def solve(self, problem: LinearProblem) -> Solution:
        mask = problem.pattern.mask(problem.weight.float().abs(), problem.sparsity)
        return Solution(problem.weight.masked_fill(mask, 0.0), mask[:1])


class OneSum(Statistic):
    """Says nothing of how wide its site is."""

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, inputs: torch.Tensor, weights: torch.Tensor) -> None:
        self.total += inputs.double().square().sum()

    def tensors(self) -> list[torch.Tensor]:
        return [self.total]


class OfOneSum(RowOfAMask):
    statistic = OneSum


@pytest.mark.parametrize(
    ("solver", "said"), [(RowOfAMask, "RowOfAMask.solve, mask: bool of shape (1, "), (OfOneSum, "OneSum.tensors: ")]
)
def test_what_a_solver_gives_and_sums_is_looked_at_in_every_run(solver, said, tmp_path):
    source = TensorSource(str(GOLDEN / "calib.safetensors"))
    method = BlockwisePruning(pool=MixedPool(), solver=solver())
    with pytest.raises(RunError, match=re.escape(said)):
        lvlm_prune.prune(MODEL, source, method, tmp_path / "out", report=False)


def recovery_trainer(callbacks: list[L.Callback], **options) -> LVLMTrainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return LVLMTrainer(accelerator="cpu", devices=1, callbacks=callbacks, **quiet, **{"max_epochs": 1} | options)


@pytest.mark.parametrize(
    ("method", "options", "others"),
    [
        ("lora", {}, {"lora.alpha": {"lora": SparseLoRA(rank=4, alpha=64)}, "method": {"method": "full"}}),
        (
            "lora",
            {"distillation": Distillation(weight=1.0)},
            {
                "distillation.weight": {"distillation": Distillation(weight=0.2)},
                "dense": {"dense": "", "distillation": Distillation()},
            },
        ),
        ("blockwise", {}, {"reconstruction.epochs": {"reconstruction": Reconstruction(epochs=3)}}),
    ],
)
def test_from_python_a_recovery_goes_on_only_as_it_began(method, options, others, bases, labelled, tmp_path):
    class Stop(PruneCallback):
        def on_train_batch_end(self, *_) -> None:
            raise KeyboardInterrupt

        def on_block_start(self, *_, **__) -> None:
            raise KeyboardInterrupt

    def recover(stop: bool = False, **given):
        given = {"method": method, "lora": SparseLoRA(rank=4), **options, **given}
        needs_dense = given["method"] == "blockwise" or given.get("distillation", Distillation()).weight
        given = {"dense": str(bases / "dense-float32") if needs_dense else "", **given}
        trainer = recovery_trainer([given.pop("lora"), *([Stop()] if stop else [])])
        data = RecoveryDataModule(TensorSource(str(labelled)), batch_size=2)
        said = {"evaluate": False, "report": False, "resume": not stop}
        return trainer.recover(
            LVLMModule(str(bases / "unstructured-float32")), data, str(tmp_path / "out"), **said, **given
        )

    with pytest.raises(KeyboardInterrupt):
        recover(stop=True)
    for option, other in others.items():
        with pytest.raises(InputError) as refused:
            recover(**other)
        assert refused.value.option.startswith(option)
    assert recover()["status"] == "complete"


def test_a_trainer_is_left_as_it_was_and_does_not_recover_twice(bases, labelled, tmp_path):
    trainer = recovery_trainer([SparseLoRA(rank=4)], max_epochs=None, max_steps=2)
    strategy = trainer.strategy
    before = trainer.callbacks, strategy.launcher, type(strategy.checkpoint_io)

    def recover(name: str):
        data = RecoveryDataModule(TensorSource(str(labelled)), batch_size=2)
        model = LVLMModule(str(bases / "unstructured-float32"))
        return trainer.recover(model, data, str(tmp_path / name), evaluate=False, report=False)

    assert recover("out")["training"]["steps"] == 2
    assert (trainer.callbacks, strategy.launcher, type(strategy.checkpoint_io)) == before
    with pytest.raises(InputError, match="has trained before"):
        recover("again")
    assert not (tmp_path / "again").exists()


def test_a_folder_that_python_wrote_holds_nothing_private_either(tmp_path):
    place = tmp_path / "patients"
    place.mkdir()
    (place / "calibration.safetensors").write_bytes((GOLDEN / "calib.safetensors").read_bytes())
    data = CalibrationDataModule(TensorSource(str(place / "calibration.safetensors")), num_samples=2)
    for name, options in (("out", {}), ("whole", {"publishable": False})):
        method = lvlm_prune.load_pruning("magnitude", sparsity=0.5)
        lvlm_prune.prune(MODEL, data, method, tmp_path / name, report=False, **options)
    assert str(place) not in (tmp_path / "out" / "pruning.json").read_text()
    assert str(place) in (tmp_path / "out.private" / "pruning.json").read_text()
    assert str(place) in (tmp_path / "whole" / "pruning.json").read_text()
    assert not (tmp_path / "whole.private").exists()


IDS = torch.arange(5, 25)[None]
NO_INPUTS = {
    "nothing": None,
    "a path": "samples.json",
    "a number": [5],
    "no tokens": [{}],
    "a list of tokens": [{"input_ids": [[5, 6]]}],
    "one dimension": [{"input_ids": IDS[0]}],
    "two samples in one": [{"input_ids": IDS.repeat(2, 1)}],
    "none at all": [{"input_ids": IDS[:, :0]}],
    "no whole numbers": [{"input_ids": IDS.float()}],
}


@pytest.mark.parametrize("calibration", NO_INPUTS.values(), ids=NO_INPUTS)
def test_what_are_no_model_inputs_is_refused(calibration, tmp_path):
    with pytest.raises(InputError) as refused:
        lvlm_prune.prune(MODEL, calibration, output=tmp_path / "out")
    assert refused.value.option == "calibration"
    assert not (tmp_path / "out").exists()


def test_the_name_of_a_recipe_for_a_method_is_refused():
    with pytest.raises(InputError, match=r'load_pruning\("wanda"'):
        lvlm_prune.prune(MODEL, [{"input_ids": IDS}], "wanda")


def test_callbacks_of_which_none_prunes_are_refused(tmp_path):
    with pytest.raises(InputError, match="none of them prunes"):
        lvlm_prune.prune(MODEL, [{"input_ids": IDS}], trainer=RunTrainer(logger=False), output=tmp_path / "a")


def test_no_output_is_the_default_one(tmp_path, monkeypatch):
    """And no folder that is called None."""
    monkeypatch.chdir(tmp_path)
    source = TensorSource(str(GOLDEN / "calib.safetensors"))
    lvlm_prune.prune(MODEL, source, lvlm_prune.load_pruning("magnitude"), output=None, report=False)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_null_for_a_plugin_in_a_recipe_is_one_line(tmp_path):
    (tmp_path / "mine.yaml").write_text("pruning: {scorer: null}")
    with pytest.raises(InputError, match=r"pruning\.scorer null: expected Scorer"):
        lvlm_prune.load_pruning(tmp_path / "mine.yaml")


def test_a_recipe_that_there_is_not_is_one_line():
    with pytest.raises(InputError, match=r"^--config wand: no such file, and no recipe .*; there are .*wanda"):
        lvlm_prune.load_pruning("wand")
