"""Pages on a telephone: what a browser makes of them at 390 pixels, where one is installed."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

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


def look_at(folder: Path, script: str) -> Any:
    """What a script finds out about `page.html` in a frame as wide as a telephone."""
    frame = f"<iframe src=page.html style='width:{_WIDTH}px;border:0' onload='look()'></iframe>"
    (folder / "frame.html").write_text(f"<!doctype html><body>{script}{frame}</body>")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    options += ["--disable-web-security", f"--user-data-dir={folder / 'user'}", "--virtual-time-budget=5000"]
    command = [CHROMIUM, *options, "--dump-dom", f"file://{folder / 'frame.html'}"]
    seen = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    return json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', seen)[1]))


def comparison(settings: list[list[str]]) -> str:
    """A page with tables as wide as those of `recover` and of `compare`."""
    heads = ["task", "dense", "pruned", "recovered", "retained, pruned", "retained, recovered"]
    scores = Table(heads, [["reading_arithmetic", *["100.0%"] * 5], ["comparing", *["69.3%"] * 5]])
    common = Table(["setting", "atv", "das"], settings)
    values = {"warning": "", "notes": [], "folders": common, "quality": None, "settings": common, "means": common}
    return render_page("comparison.html.j2", "A page", **values, page_figures=[], scores=scores)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_no_table_of_scores_is_wider_than_a_telephone(tmp_path):
    (tmp_path / "page.html").write_text(comparison([["pruning.allocation", "UniformAllocation", "DASAllocation"]]))
    found = look_at(tmp_path, _LOOKS)
    assert found["page"] <= _WIDTH
    assert len(found["tables"]) == 4
    assert all(needed <= there for needed, there in found["tables"]), found


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_no_value_of_a_narrow_table_breaks_within_a_word(tmp_path):
    """Four folders beside each other: where they do not fit, the table scrolls."""
    words = ["AsymmetricPool", "0.0003235", "ALPSSolver", "distillation.temperature", "llava-next", "74c621918c…"]
    values = {"warning": "", "notes": [], "quality": None, "page_figures": [], "scores": None}
    folders = Table(["folder"], [])
    settings = Table(["setting", *"abcd"], [["data.num_samples", *[word] * 4] for word in words])
    means = Table(["folders", "overlap"], [])
    page = render_page("comparison.html.j2", "A page", **values, folders=folders, settings=settings, means=means)
    (tmp_path / "page.html").write_text(page)
    script = """<script>
function look() {
  const page = document.querySelector("iframe").contentDocument, broken = [];
  for (const cell of page.querySelectorAll("td")) for (const text of cell.childNodes) {
    if (text.nodeType != 3) continue;
    for (const word of text.textContent.matchAll(/[\\p{L}\\p{N}._…]+/gu)) {
      const range = page.createRange();
      range.setStart(text, word.index); range.setEnd(text, word.index + word[0].length);
      if (range.getClientRects().length > 1) broken.push(word[0]);
    }
  }
  const told = document.createElement("pre");
  told.id = "found"; told.textContent = JSON.stringify([page.documentElement.scrollWidth, broken]);
  document.body.append(told);
}
</script>"""
    width, broken = look_at(tmp_path, script)
    assert width <= _WIDTH
    assert broken == []


def test_names_break_between_words_and_numbers_not_at_all():
    text = comparison([["data.num_samples", "UniformAllocation", "0.5"]])
    assert "Uniform<wbr>Allocation" in text
    assert "<td>0.5</td>" in text
