"""Figures of runs, with matplotlib: plain data in, a `matplotlib.figure.Figure` out."""

from lvlm_prune.report.figures.style import house_style, inline_svg, legend_above, new_figure, save_png

__all__ = ["house_style", "inline_svg", "legend_above", "new_figure", "save_png"]
