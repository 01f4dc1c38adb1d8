"""What a solver may ask for: the dense model's inputs beside the pruned one's, sites in turn, sums per modality."""

from pathlib import Path

import pytest
import torch

from benchmarks.families.tiny_config import tiny_model as tiny_decoder
from benchmarks.families.visual_inputs import image_samples, text_samples
from lvlm_prune import prune
from lvlm_prune.callbacks import BlockwisePruning
from lvlm_prune.cli import main
from lvlm_prune.methods.pools import MixedPool
from lvlm_prune.methods.scorers import WandaScorer
from lvlm_prune.methods.solvers import DenseTargetSolver, RefitSolver, Solver, SparseGPTSolver, VisualWeightSolver
from lvlm_prune.output.manifest import Manifest
from tests.conftest import GOLDEN_ARGUMENTS
from tests.families import FAMILIES, Sample, make_inputs, tiny_model
from tests.full_forward import compute_experts_one_by_one, prune_by_full_forwards, solve_by_full_forwards, zeros
from tests.recipes import interrupt_and_go_on

SOLVERS = "lvlm_prune.methods.solvers"
DENSE_TARGET = [f"--pruning.solver={SOLVERS}.DenseTargetSolver", f"--pruning.solver.start={SOLVERS}.ALPSSolver"]
BY_SITE = ["--pruning.sequential=true"]
SAMPLES = Sample(3, 0, 5), Sample(2, 1, 9), Sample(4, None, 6)


@pytest.mark.parametrize("sequential", [False, True], ids=["all sites", "site by site"])
@pytest.mark.parametrize(
    ("family", "solver"),
    [
        ("llava", DenseTargetSolver(SparseGPTSolver())),
        ("qwen2_5_vl", DenseTargetSolver(RefitSolver(WandaScorer().solver()), share=0.5, damping=0.1)),
        ("gemma3", DenseTargetSolver(WandaScorer().solver())),
        # Nothing comes before its queries: they are fed the samples themselves.
        ("exaone4_5", DenseTargetSolver(SparseGPTSolver())),
    ],
)
def test_weights_are_those_of_whole_forwards(family: str, solver: Solver, sequential: bool) -> None:
    if family in FAMILIES:
        model, reference, dense = (tiny_model(family) for _ in range(3))
        batches = [make_inputs(family, model, [sample]) for sample in SAMPLES]
    else:
        model, reference, dense = (tiny_decoder(family) for _ in range(3))
        batches = [*image_samples(model), *text_samples(2)]
    expected = solve_by_full_forwards(reference, dense, batches, solver, sequential)
    prune(model, batches, BlockwisePruning(sparsity=0.5, pool=MixedPool(), solver=solver, sequential=sequential))
    for name, weight in expected.items():
        found = model.get_submodule(name).weight
        assert ((found == 0) != (weight == 0)).sum() <= 2 + weight.numel() // 500, name
        assert (found - weight).norm() <= 0.02 * weight.norm(), name


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "aria"])
def test_sites_of_experts_come_one_after_the_other(family: str) -> None:
    model, reference = (compute_experts_one_by_one(tiny_decoder(family)) for _ in range(2))
    batches = [*image_samples(model), *text_samples(2)]
    expected = prune_by_full_forwards(reference, batches, experts=True, sequential=True)
    method = BlockwisePruning(sparsity=0.5, pool=MixedPool(), sequential=True, min_expert_tokens=1)
    entries = prune(model, batches, method)["linears"]
    rare = {name for name, entry in entries.items() if entry.get("scored_by") == "magnitude"}
    assert set(expected) == {name for name, entry in entries.items() if "note" not in entry} - rare
    assert any(name.endswith("down_proj") and ".experts." in name for name in expected)
    different = sum(int((zeros(model, name) != mask).sum()) for name, mask in expected.items())
    assert different <= max(4, 1e-4 * sum(mask.numel() for mask in expected.values()))


# ---- runs ------------------------------------------------------------------------------------------------------------
AT_ONCE = "--pruning.sequential=false"
COMPOSITIONS = {"dense": [*DENSE_TARGET, AT_ONCE], "by site": BY_SITE, "both": DENSE_TARGET}


@pytest.fixture(scope="module", params=COMPOSITIONS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    folder = tmp_path_factory.mktemp("whole") / "out"
    arguments = [*GOLDEN_ARGUMENTS, *COMPOSITIONS[request.param], "--pruning.record=true", "--data.num_samples=3"]
    assert main([*arguments, f"--output={folder}"]) == 0
    return arguments, folder


def assert_same(whole: Path, found: Path) -> None:
    for name in ("model.safetensors", "statistics.safetensors"):
        assert (whole / name).read_bytes() == (found / name).read_bytes()


def test_it_goes_on_after_an_interruption(whole: tuple[list[str], Path], tmp_path: Path) -> None:
    arguments, folder = whole
    interrupt_and_go_on(arguments, tmp_path / "out")
    assert_same(folder, tmp_path / "out")


def test_it_does_not_matter_where_samples_wait(whole: tuple[list[str], Path], tmp_path: Path) -> None:
    arguments, folder = whole
    assert main([*arguments, "--trainer.hidden_states=disk", f"--output={tmp_path / 'out'}"]) == 0
    assert_same(folder, tmp_path / "out")


def test_a_vision_tower_is_solved_too(tmp_path: Path) -> None:
    options = [*DENSE_TARGET, "--model.targets=[language, vision]", "--pruning.pool=MixedPool"]
    assert main([*GOLDEN_ARGUMENTS, *options, f"--output={tmp_path / 'out'}"]) == 0
    manifest = Manifest.read(tmp_path / "out")
    assert len(manifest["blocks"]) == 4  # two of them in the tower
    assert manifest["sparsity"]["achieved"] == pytest.approx(0.5, abs=0.01)


def test_visual_tokens_that_do_not_count_are_those_of_a_pool_without_them(tmp_path: Path) -> None:
    weighed = [
        f"--pruning.solver={SOLVERS}.VisualWeightSolver",
        f"--pruning.solver.start={SOLVERS}.SparseGPTSolver",
        "--pruning.solver.visual_weight=0",
    ]
    pools = "lvlm_prune.methods.pools"
    text = [f"--pruning.pool={pools}.TextOnlyPool", f"--pruning.solver={SOLVERS}.SparseGPTSolver"]
    for name, options in {"weighed": [f"--pruning.pool={pools}.MixedPool", *weighed], "text": text}.items():
        assert main([*GOLDEN_ARGUMENTS, *options, f"--output={tmp_path / name}"]) == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("weighed", "text")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*BY_SITE, "--pruning.calibrate_on=dense"], "--pruning.sequential True: needs --pruning.calibrate_on pruned"),
        ([*DENSE_TARGET, "--pruning.calibrate_on=dense"], "--pruning.solver DenseTargetSolver"),
        ([*DENSE_TARGET, "--pruning.solver.share=2"], "--pruning.solver.share 2: must lie between 0 and 1"),
        ([*BY_SITE, "--pruning.scorer=MagnitudeScorer"], "--pruning.sequential True"),
        (
            [
                f"--pruning.solver={SOLVERS}.VisualWeightSolver",
                "--pruning.scorer=MagnitudeScorer",
            ],
            "--pruning.solver.start MaskSolver: looks at no calibration token",
        ),
    ],
)
def test_what_contradicts_itself_is_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*GOLDEN_ARGUMENTS, *options, f"--output={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]
    assert not (tmp_path / "out").exists()


class Watching(SparseGPTSolver):
    """Notes what it is told of the Linears beside the one that it solves."""

    seen: dict[str, dict[str, bool]] = {}

    def solve(self, problem):
        if problem.block == 1:
            self.seen[problem.kind] = {
                name.rpartition(".")[2]: bool((weight == 0).any()) for name, weight in problem.siblings.items()
            }
        return super().solve(problem)


def test_a_solver_sees_the_others_of_its_site_as_they_are_by_then() -> None:
    model = tiny_model("llava")
    batches = [make_inputs("llava", model, [sample]) for sample in SAMPLES]
    prune(model, batches, BlockwisePruning(sparsity=0.5, pool=MixedPool(), solver=Watching()))
    assert Watching.seen["v_proj"] == {"q_proj": True, "k_proj": True}
    assert Watching.seen["q_proj"] == {"k_proj": False, "v_proj": False}
    assert Watching.seen["down_proj"] == {}


def test_sites_come_in_turn_where_the_solver_asks_for_it() -> None:
    """At once, each site of a block would make up for the same change."""
    assert BlockwisePruning(solver=DenseTargetSolver()).sequential
    assert BlockwisePruning(solver=VisualWeightSolver(DenseTargetSolver())).sequential
    assert not BlockwisePruning(solver=DenseTargetSolver(), sequential=False).sequential
    assert not BlockwisePruning(solver=VisualWeightSolver()).sequential


def test_what_the_manifest_says_of_the_forwards(whole: tuple[list[str], Path]) -> None:
    """Whole and partial ones count alike."""
    arguments, folder = whole
    manifest = Manifest.read(folder)
    samples, sites = manifest["calibration"]["num_samples"], 4
    *middle, last = [block["forwards"] for block in manifest["blocks"]]
    follows, by_site = DENSE_TARGET[0] in arguments, AT_ONCE not in arguments
    per_sample = (1 + sites * (1 + follows) + follows if by_site else 1 + follows) + 1
    assert set(middle) == {samples * per_sample}
    # Nothing goes on from the last block.
    assert last == samples * (per_sample - 1 - (follows and by_site))


def test_the_norms_on_record_are_those_that_were_used() -> None:
    """Site by site, `o_proj` is judged by what pruned queries, keys and values give."""
    torch.manual_seed(0)
    found = {}
    for sequential in (False, True):
        model = tiny_model("llava")
        batches = [make_inputs("llava", model, [sample]) for sample in SAMPLES]
        manifest = prune(model, batches, BlockwisePruning(sparsity=0.5, pool=MixedPool(), sequential=sequential))
        found[sequential] = {name: entry["error"] for name, entry in manifest["linears"].items() if ".0." in name}
    same = {name.rpartition(".")[2] for name, error in found[False].items() if found[True][name] == error}
    assert same == {"q_proj", "k_proj", "v_proj"}
