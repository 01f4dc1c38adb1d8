"""Pages are written beside what is there, and through no link."""

import pytest
from matplotlib.figure import Figure

from lvlm_prune.errors import InputError
from lvlm_prune.output.names import FIGURE_FOLDER
from lvlm_prune.report.page import PageFigure, read_from, show, write_page


def test_figures_are_written_through_no_link(tmp_path):
    """Tools that remove duplicates leave links; what they lead to is somebody else's."""
    folder, other = tmp_path / "out", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    (other / "retention.png").write_text("precious")
    (folder / FIGURE_FOLDER).symlink_to(other)
    page_figure = PageFigure("retention", Figure(), "")
    write_page(folder, "a page", [page_figure])
    assert [path.name for path in other.iterdir()] == ["retention.png"]
    (folder / FIGURE_FOLDER / "retention.png").unlink()
    (folder / FIGURE_FOLDER / "retention.png").symlink_to(other / "retention.png")
    write_page(folder, "a page", [page_figure])
    assert (other / "retention.png").read_text() == "precious"
    assert (folder / FIGURE_FOLDER / "retention.png").read_bytes() == page_figure.png


def test_numbers_of_an_earlier_run_that_are_none_are_one_line(tmp_path):
    """A run's own numbers that are none are an error of the program."""
    is_one_line = pytest.raises(InputError, match=r"no page can be made of its pruning.json")
    with is_one_line, read_from(tmp_path, "pruning.json", is_read=True):
        show({"blocks": [{}]}, "blocks", 0, "seconds", unit="seconds")
    with pytest.raises(KeyError), read_from(tmp_path, "pruning.json", is_read=False):
        show({"blocks": [{}]}, "blocks", 0, "seconds", unit="seconds")
