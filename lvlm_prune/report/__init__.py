"""Pages about runs: self-contained HTML with figures, made from the records of the runs alone."""

from lvlm_prune.report.page import FIGURE_FOLDER, PAGE_NAME, Plate, Table, render_page, show, write_page

__all__ = ["FIGURE_FOLDER", "PAGE_NAME", "Plate", "Table", "render_page", "show", "write_page"]
