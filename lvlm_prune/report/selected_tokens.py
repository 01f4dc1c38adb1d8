"""The picture of one calibration sample, and which of its visual tokens calibrate a block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image
from safetensors import safe_open

from lvlm_prune.output.names import EXAMPLE, FIGURE_FOLDER, PICTURE_FIGURE, PICTURE_NAME, STATISTICS_NAME
from lvlm_prune.output.private import public_folder
from lvlm_prune.report.block_names import block_names
from lvlm_prune.report.figures.blocks import tokens_on_picture
from lvlm_prune.report.page import PageFigure, show

_SOME_TOKENS = "Visual tokens of calibration sample {} that calibrate a block; all others are faded.{}"
_NO_TOKENS = "None of these visual tokens of calibration sample {} calibrates a block: all are faded.{}"
_ALL_TOKENS = "All visual tokens of calibration sample {} calibrate every block.{}"
_TILE = " Drawn is the whole image at low resolution; its tiles at high resolution have tokens of their own."


def _example_weights(run: dict[str, Any], folder: Path | None) -> dict[int, list[float]]:
    """Block -> how much each visual token of the picture counts there, between 0 and 1."""
    # A page in the private part of a folder has the picture; what was counted lies in the folder itself.
    places = [] if folder is None else [folder, public_folder(folder)]
    path = next((place / STATISTICS_NAME for place in places if (place / STATISTICS_NAME).is_file()), None)
    if path is None:
        return {}
    with safe_open(path, framework="pt") as recorded:
        known = set(recorded.keys())
        names = {block["index"]: f"{EXAMPLE}.{block['index']}" for block in run["blocks"]}
        return {block: (recorded.get_tensor(name) / 255).tolist() for block, name in names.items() if name in known}


def picture_figure(run: dict[str, Any], folder: Path | None) -> PageFigure | None:
    """The picture of one calibration sample, and which of its visual tokens count in which block; None without one.

    Args:
        run: The manifest.
        folder: The folder that the run wrote, or its private part.
    """
    path = None if folder is None else folder / FIGURE_FOLDER / PICTURE_NAME
    if path is None or not path.is_file() or not run.get("picture"):
        return None
    rows, columns = run["picture"]["grid"]
    packed = _example_weights(run, folder)
    on_grid = {block: weights[: rows * columns] for block, weights in packed.items()}
    if not on_grid or any(len(weights) != rows * columns for weights in on_grid.values()):
        return None
    everything = all(weight == 1 for weights in packed.values() for weight in weights)
    nothing = not any(weight for weights in on_grid.values() for weight in weights)
    text = _ALL_TOKENS if everything else _NO_TOKENS if nothing else _SOME_TOKENS
    caption = Markup(text).format(
        show(run, "picture", "sample", unit="count"),
        _TILE if any(len(weights) > rows * columns for weights in packed.values()) else "",
    )
    if everything or nothing:
        on_grid = dict([next(iter(on_grid.items()))])  # all others are the same
    with Image.open(path) as picture:
        drawing = tokens_on_picture(picture, (rows, columns), on_grid, block_names(run))
    return PageFigure(PICTURE_FIGURE, drawing, caption)
