"""Pages on a telephone: what a browser makes of them at 390 pixels, where one is installed."""

import html
import json
import re
import shutil
import subprocess

import pytest

from lvlm_prune.report.page import Table, render_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_WIDTH = 390
_LOOKS = """<script>
function look() {
  const page = document.querySelector("iframe").contentDocument;
  const found = {page: page.documentElement.scrollWidth, tables: []};
  for (const one of page.querySelectorAll(".scroll")) found.tables.push([one.scrollWidth, one.clientWidth]);
  const told = document.createElement("pre");
  told.id = "found";
  told.textContent = JSON.stringify(found);
  document.body.append(told);
}
</script>"""


def comparison(settings: list[list[str]]) -> str:
    """A page with tables as wide as those of `recover` and of `compare`."""
    heads = ["task", "dense", "pruned", "recovered", "retained, pruned", "retained, recovered"]
    scores = Table(heads, [["reading_arithmetic", *["100.0%"] * 5], ["comparing", *["69.3%"] * 5]])
    common = Table(["setting", "atv", "das"], settings)
    values = {"warning": "", "folders": common, "quality": None, "settings": common, "means": common}
    return render_page("comparison.html.j2", "A page", **values, plates=[], scores=scores)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_no_table_of_scores_is_wider_than_a_telephone(tmp_path):
    (tmp_path / "page.html").write_text(comparison([["pruning.allocation", "UniformAllocation", "DASAllocation"]]))
    frame = f"<iframe src=page.html style='width:{_WIDTH}px;border:0' onload='look()'></iframe>"
    (tmp_path / "frame.html").write_text(f"<!doctype html><body>{_LOOKS}{frame}</body>")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    options += ["--disable-web-security", f"--user-data-dir={tmp_path / 'user'}", "--virtual-time-budget=5000"]
    command = [CHROMIUM, *options, "--dump-dom", f"file://{tmp_path / 'frame.html'}"]
    seen = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', seen)[1]))
    assert found["page"] <= _WIDTH
    assert len(found["tables"]) == 4
    assert all(needed <= there for needed, there in found["tables"]), found


def test_names_break_between_words_and_numbers_not_at_all():
    text = comparison([["data.num_samples", "UniformAllocation", "0.5"]])
    assert "Uniform<wbr>Allocation" in text
    assert "<td>0.5</td>" in text
