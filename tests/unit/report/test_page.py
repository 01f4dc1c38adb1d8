"""Pages are written beside what is there, and through no link."""

from matplotlib.figure import Figure

from lvlm_prune.output.names import FIGURE_FOLDER
from lvlm_prune.report.page import PageFigure, write_page


def test_figures_are_written_through_no_link(tmp_path):
    """Tools that remove duplicates leave links; what they lead to is somebody else's."""
    folder, other = tmp_path / "out", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    (other / "retention.png").write_text("precious")
    (folder / FIGURE_FOLDER).symlink_to(other)
    plate = PageFigure("retention", Figure(), "")
    write_page(folder, "a page", [plate])
    assert [path.name for path in other.iterdir()] == ["retention.png"]
    (folder / FIGURE_FOLDER / "retention.png").unlink()
    (folder / FIGURE_FOLDER / "retention.png").symlink_to(other / "retention.png")
    write_page(folder, "a page", [plate])
    assert (other / "retention.png").read_text() == "precious"
    assert (folder / FIGURE_FOLDER / "retention.png").read_bytes() == plate.png
