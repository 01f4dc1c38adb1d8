"""The report shows the manifest's numbers and needs nothing from outside."""

import json
import re

import pytest

from lvlm_prune.callbacks.report import render_report
from lvlm_prune.cli import main
from lvlm_prune.manifest import Manifest
from tests.conftest import GOLDEN_ARGUMENTS


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "out"
    assert main([*GOLDEN_ARGUMENTS, "--pruning.sparsity=0.6", f"--output={folder}"]) == 0
    return json.loads((folder / "pruning.json").read_text()), (folder / "report.html").read_text()


def test_numbers_are_those_of_the_manifest(run):
    manifest, page = run
    assert f"{100 * manifest['sparsity']['achieved']:.1f}% sparse" in page
    for name, entry in manifest["linears"].items():
        row = next(row for row in re.findall(r"<tr>.*?</tr>", page, flags=re.DOTALL) if f">{name}<" in row)
        assert f"{entry['achieved']:.4f}" in row
    for block in manifest["blocks"]:
        assert f"{block['mean_drift']:.4f}" in page
        assert f"{sum(block['visual_tokens']) / 8:.1f}" in page
    assert f"{manifest['verified']['untouched_tensors']} other tensors" in page


def test_the_page_is_self_contained(run):
    _, page = run
    assert not re.search(r"""(?:src|href)=["'](?!#)""", page)
    assert "@import" not in page
    assert "viewport" in page


def test_names_cannot_inject_markup(run):
    manifest, _ = run
    manifest["model"]["path"] = "<script>alert(1)</script>"
    assert "<script>" not in render_report(Manifest(manifest))
