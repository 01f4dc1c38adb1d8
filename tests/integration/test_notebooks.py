"""The notebooks of docs/notebooks run from the first cell to the last, and show what they say."""

import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


def cells(notebook: Path, kind: str = "code") -> list[dict]:
    return [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def printed(cell: dict) -> str:
    return "".join("".join(output.get("text", [])) for output in cell["outputs"])


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_prints_what_it_shows(notebook, tmp_path, monkeypatch, capsys):
    """As many lines: numbers in them depend on the machine's rounding."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for cell in cells(notebook):
        exec(compile("".join(cell["source"]), str(notebook), "exec"), names)
        assert len(capsys.readouterr().out.splitlines()) == len(printed(cell).splitlines()), cell["source"]
        assert all(output["output_type"] == "stream" for output in cell["outputs"])


def test_both_notebooks_are_there_and_on_the_site():
    assert [path.stem for path in NOTEBOOKS] == ["quick_start", "write_your_own_criterion"]
    assert "notebooks/index.md" in (DOCS.parent / "mkdocs.yml").read_text()
    page = (DOCS / "notebooks" / "index.md").read_text()
    for path in NOTEBOOKS:
        assert f"({path.name})" in page
        for cell in cells(path):
            shown = "".join(cell["source"]).strip() + "\n"
            assert shown in page, "the page shows the notebook's own cells"
            assert printed(cell).strip() in page


def test_the_criterion_is_the_one_of_its_page():
    """Two copies of one class must not drift apart."""
    page = (DOCS / "write_your_own.md").read_text()
    (code,) = re.findall(r"```python\n# mine\.py\n(.*?)```", page, re.DOTALL)
    first, *_ = cells(NOTEBOOKS[1])
    assert "".join(first["source"]).strip() == code.strip()
