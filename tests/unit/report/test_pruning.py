"""The page of a pruning run shows the manifest's numbers, and needs nothing from outside."""

import json
import re
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lvlm_prune.cli import main
from lvlm_prune.output.manifest import Manifest
from lvlm_prune.output.units import readable_size
from lvlm_prune.report.pruning import pruning_page, summarise
from tests.conftest import GOLDEN_ARGUMENTS
from tests.pages import Page, refuse_other_numbers

FIGURES = ["saliency", "pool", "scores", "reconstruction-error", "seconds", "tokens"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "out"
    arguments = [*GOLDEN_ARGUMENTS, "--report=true", "--evaluate=true"]
    arguments += ["--pruning.record=true", "--pruning.sparsity=0.6", "--publishable=false"]
    assert main([*arguments, f"--output={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def manifest(folder):
    return json.loads((folder / "pruning.json").read_text())


def test_every_number_is_the_manifests(folder, manifest):
    page = Page((folder / "report.html").read_text())
    refuse_other_numbers(page, manifest | {"summary": summarise(manifest)})
    assert len(page.numbers) > 14 * 5
    for name, entry in manifest["linears"].items():
        shown = {path.rpartition("/")[2]: value for path, value, _, _ in page.numbers if f"linears/{name}/" in path}
        assert shown["achieved"] == entry["achieved"]
        assert shown["error"] == entry["error"]


def test_kinds_are_in_one_order_also_where_first_blocks_stayed_dense(manifest):
    """A block's matrix that stayed dense has no error, and under several patterns the page counts them."""
    linears = {name: dict(entry) for name, entry in manifest["linears"].items()}
    for name, entry in linears.items():
        if "_proj" in name and "self_attn" in name and entry["block"] == 0:
            entry.pop("error")
            entry["target"] = 0.0
    changed = manifest | {"linears": linears, "pattern": "2:4,1:4"}
    summary = summarise(changed)
    assert list(summary["error"]) == list(summary["sparsity"])
    assert summary["patterns"] == {"2:4": 10, "dense": 4}


def test_sums_and_means_are_those_of_the_manifest(manifest):
    summary = summarise(manifest)
    for kind, blocks in summary["sparsity"].items():
        for block, value in blocks.items():
            (entry,) = [e for n, e in manifest["linears"].items() if n.endswith(kind) and e["block"] == block]
            assert value == entry["achieved"]
            assert summary["error"][kind][block] == entry["error"]
    for block in manifest["blocks"]:
        assert summary["visual_tokens"][block["index"]] == pytest.approx(np.mean(block["visual_tokens"]))
        # All text tokens calibrate, and of each sample the visual tokens that were selected.
        assert block["pool"] == {
            "text": manifest["calibration"]["tokens"]["text"],
            "image": sum(block["visual_tokens"]),
        }
    errors = sorted((entry["error"] for entry in manifest["linears"].values()), reverse=True)
    assert [manifest["linears"][name]["error"] for name in summary["worst"]] == errors[:10]
    assert sum(summary["seconds"].values()) == pytest.approx(manifest["work_seconds"])


def test_tokens_drawn_are_those_recorded(folder, manifest):
    recorded = load_file(folder / "statistics.safetensors")
    sample = manifest["picture"]["sample"]
    for block in manifest["blocks"]:
        selected = recorded[f"example.{block['index']}"].nonzero().flatten()
        assert selected.tolist() == recorded[f"sel.{block['index']}.{sample}"].tolist()


def test_the_caption_says_whether_any_token_that_is_drawn_counts(folder, manifest, tmp_path, blank_figures):
    """Tokens of tiles at high resolution, which are not drawn, may be the only ones that count."""
    rows, columns = manifest["picture"]["grid"]
    (tmp_path / "report").mkdir()
    shutil.copy(folder / "report" / "calibration-image.png", tmp_path / "report")
    none, every = torch.zeros(rows * columns, dtype=torch.uint8), torch.full((rows * columns,), 255, dtype=torch.uint8)
    some = none.clone()
    some[0] = 255
    for drawn, of_tiles, said in (
        (none, every, "None of these visual tokens"),
        (some, none, "that calibrate a block; all others are faded"),
        (every, every, "All visual tokens"),
    ):
        shares = {f"example.{block['index']}": torch.cat([drawn, of_tiles]) for block in manifest["blocks"]}
        save_file(shares, tmp_path / "statistics.safetensors")
        text, _ = pruning_page(Manifest(manifest), tmp_path)
        (caption,) = re.findall(r"<figcaption>([^<]*calibration sample.*?)</figcaption>", text, re.DOTALL)
        assert said in caption
        assert "its tiles at high resolution" in caption


def test_the_page_is_self_contained_and_has_all_figures(folder):
    text = (folder / "report.html").read_text()
    assert not re.search(r"""\b(?:src|href)=["'](?!#|data:)""", text)
    assert "@import" not in text
    assert "<script" not in text
    assert "viewport" in text
    assert Page(text).figures == FIGURES
    for name in FIGURES:
        # A figure that is one colour shows nothing.
        assert np.asarray(Image.open(folder / "report" / f"{name}.png").convert("L")).std() > 10


def test_sparsity_is_drawn_where_it_differs_and_said_where_it_does_not(folder, manifest, blank_figures):
    assert "is about equally sparse in every block" in (folder / "report.html").read_text()
    other = json.loads(json.dumps(manifest))
    for entry in other["linears"].values():
        entry["achieved"] -= 0.1 * entry["block"]
    text, figures = pruning_page(Manifest(other))
    assert "about equally sparse" not in text
    assert Page(text).figures[0] == "sparsity"
    assert "sparsity" in figures


def test_the_title_is_the_name_of_the_model_and_all_sections_can_be_reached(manifest, blank_figures):
    other = manifest | {"model": manifest["model"] | {"path": "/home/somebody/models/my-llava"}}
    text, _ = pruning_page(Manifest(other))
    assert f"<title>my-llava: {manifest['method']['init_args']['name']}</title>" in text
    sections, links = re.findall('<h2 id="(.*?)">', text), re.findall('<a href="#(.*?)">', text)
    assert len(sections) == len(set(sections)) > 3
    assert links == sections
    assert text.count("<h2") == len(sections)


def test_console_manifest_and_page_say_the_same_numbers(tmp_path, capsys):
    out = tmp_path / "out"
    started = time.perf_counter()
    assert main([*GOLDEN_ARGUMENTS, "--report=true", f"--output={out}"]) == 0
    took = time.perf_counter() - started
    manifest = json.loads((out / "pruning.json").read_text())
    said = capsys.readouterr().out
    facts = {path: text for path, _, _, text in Page((out / "report.html").read_text()).numbers}
    weights = sum(path.stat().st_size for path in out.glob("model*.safetensors"))
    assert manifest["size_bytes"] == weights
    assert f"(weights {readable_size(weights)})" in said
    assert facts["size_bytes"] == readable_size(weights)
    assert f"· {manifest['seconds']:.0f} s\n" in said
    assert facts["seconds"] == f"{manifest['seconds']:.1f} s"
    assert manifest["work_seconds"] < manifest["seconds"]
    assert 0.6 * took < manifest["seconds"] < took, "imports and page are part of what a user waits for"
    assert facts["peak_memory_bytes"] == readable_size(manifest["peak_memory_bytes"])
    assert facts["memory/measured/host"] == readable_size(manifest["memory"]["measured"]["host"])
    assert "peak memory, without mapped files" in (out / "report.html").read_text()
    assert manifest["peak_memory_bytes"] >= max(block["peak_memory_bytes"] for block in manifest["blocks"])


def test_retention_is_drawn_for_each_task_that_the_dense_model_can_do(manifest, blank_figures):
    tasks = {"colour": 0.9, "count": 0.5, "maths": 0.0}
    scores = {"tasks": tasks, "average": 0.5}
    retention = {"tasks": {"colour": 0.95, "count": 1.2}, "average": 1.0}
    scored = manifest | {"evaluation": {"dense": scores, "pruned": scores, "retention": retention}}
    text, figures = pruning_page(Manifest(scored))
    (axes,) = figures["retention"].drawing.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["colour", "count"]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([95, 120])
    assert axes.get_xlim()[1] > 120
    assert "retention" in Page(text).figures


def test_names_cannot_inject_markup(manifest):
    hostile = json.loads(json.dumps(manifest))
    hostile["model"]["path"] = "<script>alert(1)</script>"
    hostile["warnings"] = ["<b>singular</b> Gram matrix"]
    hostile["linears"]["<img src=x>.q_proj"] = next(iter(manifest["linears"].values()))
    text, _ = pruning_page(Manifest(hostile))
    assert "<script>" not in text
    assert "<img" not in text
    assert "&lt;b&gt;singular" in text


def test_a_run_without_activations_has_a_page_too(tmp_path, blank_figures):
    arguments = [*GOLDEN_ARGUMENTS, "--report=true", "--pruning.scorer=MagnitudeScorer"]
    assert main([*arguments, f"--output={tmp_path / 'out'}"]) == 0
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert page.figures == ["scores", "seconds"]
    assert "uses no activations" in page.text


def test_a_model_of_many_experts_has_one_row_per_matrix_and_block(manifest, blank_figures):
    entry = next(iter(manifest["linears"].values()))
    many = json.loads(json.dumps(manifest))
    names = [
        f"model.layers.0.mlp.experts.{number}.{leaf}" for number in range(256) for leaf in ("up_proj", "down_proj")
    ]
    for number, name in enumerate(names):
        many["linears"][name] = entry | {"error": number / 1000, "target": 0.5, "achieved": 0.25}
    many["linears"][names[0]] |= {"note": "too few calibration tokens were sent to this expert", "target": 0.0}
    text, _ = pruning_page(Manifest(many))
    page = Page(text)
    refuse_other_numbers(page, many | {"summary": summarise(many)})
    shown = {path.split("/")[1] for path, *_ in page.numbers if path.startswith("linears/")}
    assert shown == {*manifest["linears"], *names[-10:]}, "of the experts only the worst ones are named"
    group = summarise(many)["experts"]["model.layers.0.mlp.experts.*.up_proj"]
    assert (group["experts"], group["achieved"], group["largest_error"]) == (256, 0.25, 0.51)
    assert group["target"] == pytest.approx(0.5 * 255 / 256)


def test_text_comes_first_on_every_page_so_that_its_colour_stays(manifest):
    tower = {**manifest["blocks"][0], "pool": {"image": 4.0}}
    changed = {**manifest, "blocks": [tower, *manifest["blocks"][1:]]}
    assert list(summarise(changed)["pool"]) == ["text", "image"]
