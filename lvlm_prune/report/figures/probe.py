"""Figures of the modality probe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from lvlm_prune.report.figures.style import SERIES, WIDTH, house_style, new_figure


@house_style()
def token_map(blocks: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> Figure:
    """Block inputs in two dimensions by modality (arXiv 2603.16001, Fig. 1a), one panel per block.

    Args:
        blocks: Block -> modality -> places, two numbers each.
    """
    figure = Figure(figsize=(WIDTH, WIDTH / max(len(blocks), 2) + 0.6), layout="constrained")
    handles = {}
    for axes, (block, places) in zip(figure.subplots(1, len(blocks), squeeze=False)[0], blocks.items()):
        for number, (name, points) in enumerate(places.items()):
            x, y = np.asarray(points).T
            handles[f"{name} tokens"] = axes.scatter(
                x, y, s=5, color=SERIES[number], marker="o^sD"[number % 4], linewidth=0, alpha=0.75
            )
        axes.set_title(f"block {block}")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(False)
        for side in axes.spines.values():
            side.set_visible(True)
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=2, markerscale=2)
    return figure


@house_style()
def contribution_curves(sets: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Contribution of tokens in the order of their rank, one line per data set (MLLM-Pruner, Fig. 3).

    Args:
        sets: Name of a data set -> `received` and `singular` -> contribution, between 0 and 1, at evenly spaced ranks.
    """
    figure, panels = new_figure(height=2.7, columns=2)
    for axes, (key, title) in zip(panels, (("received", "by attention"), ("singular", "by singular vectors"))):
        for name, curves in sets.items():
            axes.plot(np.linspace(0, 100, len(curves[key])), curves[key], label=name, marker="")
        axes.set_title(title)
        axes.set_xlabel("rank of the token (%)")
        axes.set_ylim(0, 1.02)
    panels[0].set_ylabel("contribution (0 to 1)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2)
    return figure
