"""The modality probe: two pathways through each Linear, chosen by modality."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText

from lvlm_prune.blocks import modality_of_tokens
from lvlm_prune.blocks.routing import routed, tokens_of
from lvlm_prune.callbacks import ModalityProbe
from lvlm_prune.checkpoints.versions import cache_argument
from lvlm_prune.cli import main
from lvlm_prune.data import CalibrationDataModule, TensorSource
from lvlm_prune.errors import InputError, RunError
from lvlm_prune.evaluation import pathways
from lvlm_prune.module import LVLMModule
from lvlm_prune.output.manifest import Manifest
from lvlm_prune.report.probe import probe_page, summarise
from lvlm_prune.runs.probe.pathways import is_probed
from lvlm_prune.runs.probe.run import ProbeRun
from lvlm_prune.trainer import LVLMTrainer
from tests.conftest import ALL_SAMPLES, GOLDEN, GOLDEN_ARGUMENTS, MODEL
from tests.documented import undocumented
from tests.engines import ShareLeft
from tests.pages import Page, refuse_other_numbers

ARGUMENTS = [
    "probe",
    *(one for one in GOLDEN_ARGUMENTS if one.startswith(("--model", "--data"))),
    ALL_SAMPLES,
]


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def samples():
    source = TensorSource(str(GOLDEN / "calib.safetensors"))
    source.setup()
    return [source[index] for index in range(len(source))]


def probed(model):
    return {
        name: linear.weight.detach().clone()
        for name, linear in model.named_modules()
        if isinstance(linear, torch.nn.Linear) and ".layers." in name and is_probed(name)
    }


@pytest.mark.parametrize("pathway", ["text", "visual"])
@torch.no_grad()
def test_without_masks_the_probe_is_the_model_bit_for_bit(pathway, model, samples):
    plain = [model(**inputs).logits for inputs in samples]
    weights = probed(model)
    assert len(weights) == 12
    with routed(model, weights, pathway):
        assert all(torch.equal(model(**inputs).logits, logits) for inputs, logits in zip(samples, plain))
    assert all(torch.equal(model(**inputs).logits, logits) for inputs, logits in zip(samples, plain))


@torch.no_grad()
def test_only_tokens_of_the_pathway_see_the_other_weights(model, samples):
    """In the first block, before attention mixes tokens, keys change where the modality says so, and only there."""
    inputs = samples[0]
    visual = tokens_of("visual", modality_of_tokens(model.config, inputs["input_ids"]))[0]
    name = next(name for name in probed(model) if name.endswith("layers.0.self_attn.k_proj"))
    seen = []
    linear = model.get_submodule(name)

    def run():
        handle = linear.register_forward_hook(lambda module, arguments, output: seen.append(output[0]))
        model(**inputs)
        handle.remove()

    run()
    with routed(model, {name: torch.zeros_like(linear.weight)}, "visual"):
        run()
    plain, changed = seen
    assert torch.equal(plain[~visual], changed[~visual])
    assert (changed[visual] == (0 if linear.bias is None else linear.bias)).all()
    assert not torch.equal(plain[visual], changed[visual])


@pytest.mark.parametrize("pathway", ["text", "visual"])
@torch.no_grad()
def test_a_generated_token_takes_the_text_pathway(pathway, model, samples):
    inputs = samples[0]
    place = torch.full((3, 1, 1), inputs["input_ids"].shape[1])
    follows = {"input_ids": torch.tensor([[7]]), "position_ids": place}

    def next_logits():
        cache = cache_argument(model(**inputs, use_cache=True))
        with routed(model, {name: torch.zeros_like(weight) for name, weight in probed(model).items()}, pathway):
            return model(**follows, **cache).logits

    plain = model(**follows, **cache_argument(model(**inputs, use_cache=True))).logits
    assert torch.equal(next_logits(), plain) == (pathway == "visual")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A probe of the golden model: its folder, and the pruned weights of each cell."""
    folder, weights = tmp_path_factory.mktemp("probe") / "out", {}
    prune = ProbeRun._prune

    def keep(self, cell):
        prune(self, cell)
        weights[cell.pathway, cell.pool_name, cell.sparsity] = dict(cell.pruned)

    def score_nothing(self):
        self.scoring = SimpleNamespace(cell=lambda cell: None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProbeRun, "_prune", keep)
        patch.setattr(ProbeRun, "_score_dense", score_nothing)
        assert main([*ARGUMENTS, "--probing.map_tokens=40", "--probing.curve_samples=2", f"--output={folder}"]) == 0
    return folder, weights


@pytest.mark.parametrize("pathway", ["text", "visual"])
@torch.no_grad()
def test_streamed_block_by_block_it_prunes_what_the_whole_model_shows(pathway, run, model, samples):
    """Masks of the last block, from what the whole routed model feeds it."""
    weights = run[1][pathway, "visual", 0.6]
    name = next(name for name in weights if name.endswith("layers.1.self_attn.q_proj"))
    norms = torch.zeros(64, dtype=torch.float64)

    def add(module, arguments):
        norms.add_(arguments[0][0][visual].double().square().sum(0))

    handle = model.get_submodule(name).register_forward_pre_hook(add)
    with routed(model, weights, pathway):
        for inputs in samples:
            visual = tokens_of("visual", modality_of_tokens(model.config, inputs["input_ids"]))[0]
            model(**inputs)
    handle.remove()
    dense = model.get_submodule(name).weight
    order = (dense.abs() * norms.float().sqrt()).argsort(dim=1, stable=True)
    expected = torch.zeros_like(dense, dtype=torch.bool).scatter_(1, order[:, : int(64 * 0.6)], True)
    assert torch.equal(weights[name] == 0, expected)
    assert torch.equal(weights[name][~expected], dense[~expected])


def test_every_cell_of_the_grid_is_there(run):
    record = json.loads((run[0] / "probe.json").read_text())
    cells = {(cell["pathway"], cell["pool"], cell["sparsity"]) for cell in record["grid"]}
    assert cells == {(p, q, s) for p in ("text", "visual") for q in ("text", "visual", "mixed") for s in (0.5, 0.6)}
    # In the first block nothing is pruned before, so both pathways get the same masks from the same pool.
    first = next(name for name in record["linears"] if name.endswith("layers.0.mlp.down_proj"))
    assert torch.equal(run[1]["text", "mixed", 0.5][first], run[1]["visual", "mixed", 0.5][first])


def test_overlap_is_that_of_masks_made_from_one_modality_of_the_dense_model(run, model, samples):
    """First block: there the dense survey and the cells of the grid see the same inputs."""
    folder, weights = run
    record = json.loads((folder / "probe.json").read_text())
    assert len(record["linears"]) == 12
    for name, entry in record["linears"].items():
        assert set(entry["iou"]) == {"0.5", "0.6"}
        if entry["block"] == 0:
            one, other = (weights["text", pool, 0.6][name] == 0 for pool in ("text", "visual"))
            assert entry["iou"]["0.6"] == pytest.approx(((one & other).sum() / (one | other).sum()).item())


def test_the_page_shows_the_records_numbers(run):
    folder, _ = run
    record = json.loads((folder / "probe.json").read_text())
    page = Page((folder / "report.html").read_text())
    refuse_other_numbers(page, record | {"summary": json.loads(json.dumps(summarise(record)))})
    expected = ["mask-overlap-50", "mask-overlap-60", "token-map", "drift"]
    expected += ["diversity-text", "diversity-visual", "diversity-between", "contributions"]
    assert page.figures == expected
    assert {path.stem for path in (folder / "report").glob("*.png")} == set(expected)
    assert {len(places) for block in record["map"].values() for places in block.values()} <= {*range(30, 41)}
    curves = record["contributions"]["sets"]["TensorSource"]
    assert curves["samples"] == 2
    assert all(one >= other for one, other in zip(curves["received"], curves["received"][1:]))


def test_scores_stand_in_the_table(run, blank_figures):
    """The embedded model is scored; here the form alone is looked at."""
    record = json.loads((run[0] / "probe.json").read_text())
    for number, cell in enumerate(record["grid"]):
        cell["retention"] = {"average": number / 16, "groups": {}, "tasks": {}}
    record["dense"] = {"average": 0.5}
    page = Page(probe_page(record)[0])
    refuse_other_numbers(page, record | {"summary": json.loads(json.dumps(summarise(record)))})
    shown = {path for path, *_ in page.numbers if path.endswith("retention/average")}
    assert shown == {f"grid/{number}/retention/average" for number in range(12)}


def test_the_embedded_model_is_scored(tmp_path, capsys, blank_figures):
    arguments = ["--data.num_samples=4", "--probing.images=1", "--probing.texts=4", "--probing.sparsities=[0.5]"]
    arguments += ["--probing.pathways=[text]", "--probing.pools=[mixed]", "--probing.map_tokens=0"]
    assert main(["probe", *arguments, f"--output={tmp_path / 'out'}"]) == 0
    record = json.loads((tmp_path / "out" / "probe.json").read_text())
    (cell,) = record["grid"]
    assert cell["retention"]["average"] == pytest.approx(
        sum(cell["scores"]["tasks"][task] / score for task, score in record["dense"]["tasks"].items() if score)
        / sum(score > 0 for score in record["dense"]["tasks"].values())
    )
    table = (tmp_path / "out" / "probe.md").read_text()
    assert f"| text | 50% | {100 * cell['retention']['average']:.1f} |" in table
    assert table in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--probing.sparsities=[1.5]", "--probing.sparsities 1.5: must lie strictly between 0 and 1"),
        ("--probing.scorer=MagnitudeScorer", "--probing.scorer MagnitudeScorer: uses no calibration tokens"),
        ("--probing.map_tokens=-1", "--probing.map_tokens -1: must not be negative"),
    ],
)
def test_bad_options_are_one_line_and_nothing_is_written(option, message, tmp_path, capsys):
    assert main([*ARGUMENTS, option, f"--output={tmp_path / 'out'}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_occupied_folder_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert main([*ARGUMENTS, f"--output={tmp_path}"]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def scored_by_an_engine(folder: Path, resume: bool, questions: str = "") -> Manifest:
    """What a probe with one cell finds that an engine scores."""
    probe = ModalityProbe(["text"], ["text"], [0.5], map_tokens=0, curve_samples=0)
    trainer = LVLMTrainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    data = CalibrationDataModule(TensorSource(str(GOLDEN / "calib.safetensors")), num_samples=1)
    model = LVLMModule(str(MODEL), "float32")
    return ProbeRun(trainer, model, data, str(folder), resume, True, probe, ShareLeft(questions=questions))()


def test_a_probe_whose_questions_changed_does_not_go_on(tmp_path, blank_figures):
    """A reproduced table would compare scores of different questions."""
    questions, folder = tmp_path / "questions", tmp_path / "out"

    def run(text: str, resume: bool):
        questions.write_text(text)
        return scored_by_an_engine(folder, resume, str(questions))

    found = run("a", resume=False)
    assert run("a", resume=True)["grid"] == found["grid"]
    with pytest.raises(InputError, match=r"--engine ShareLeft: asks other questions now than in the run in"):
        run("b", resume=True)


@pytest.mark.parametrize("ended", ["killed", "disk"])
def test_a_probe_that_ended_while_an_engine_scored_goes_on(ended, tmp_path, monkeypatch, blank_figures):
    """What the engine was given is full of links to the input, and is removed."""
    score = ShareLeft.score

    class Killed(BaseException):
        """Nothing tidies up behind it."""

    def killed(self, folder, *arguments):
        if folder.name == "unfinished":
            raise Killed
        return score(self, folder, *arguments)

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    whole = scored_by_an_engine(tmp_path / "whole", resume=False)
    with monkeypatch.context() as patched:
        if ended == "killed":
            patched.setattr(ShareLeft, "score", killed)
        else:
            patched.setattr(pathways, "save_file", full)
        with pytest.raises(Killed if ended == "killed" else RunError) as error:
            scored_by_an_engine(tmp_path / "out", resume=False)
    if ended == "disk":
        assert "No space left on device" in str(error.value)
        assert "--resume true" in str(error.value)
    assert (tmp_path / "out" / "unfinished" / "config.json").is_symlink()
    found = scored_by_an_engine(tmp_path / "out", resume=True)
    assert found["grid"] == whole["grid"]
    assert not (tmp_path / "out" / "unfinished").exists()


def test_every_entry_of_its_record_is_documented(run):
    folder, _ = run
    assert not undocumented(folder / "probe.json")
