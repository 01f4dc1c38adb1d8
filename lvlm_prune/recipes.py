"""The files of `configs`, which lie beside the package in a checkout and inside it where it is installed."""

from __future__ import annotations

from pathlib import Path

from lvlm_prune.errors import InputError

_BESIDE, _INSIDE = Path(__file__).parents[1] / "configs", Path(__file__).parent / "configs"

CONFIGS = _BESIDE if (_BESIDE / "prune").is_dir() else _INSIDE
"""The folder."""


def recipe_file(name: str) -> Path:
    """The file of a recipe in `configs/prune`.

    Args:
        name: Its name without the suffix.

    Raises:
        InputError: There is no such recipe.

    Example:
        >>> recipe_file("atv").name
        'atv.yaml'
    """
    file = CONFIGS / "prune" / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in file.parent.glob("*.yaml")))
        raise InputError("recipe", name, f"no such recipe; there are {known}")
    return file
