"""lvlm-prune: make large vision-language models sparse after training, block by block."""

from pathlib import Path

from lvlm_prune.moved import point_to_new_places
from lvlm_prune.packed.registration import register

__version__ = "0.2.0"

# In a checkout `callbacks/` lies beside the package; an installation maps it to `lvlm_prune.callbacks`.
if (Path(__file__).parents[1] / "callbacks" / "__init__.py").is_file():
    __path__.append(str(Path(__file__).parents[1]))

# What was written for version 0.1 is told where modules are now.
point_to_new_places()

# `from_pretrained` reads packed checkpoints from now on.
register()


def __getattr__(name: str):
    """The Python API, without paying for torch where only the version is wanted."""
    if name in ("load_pruning", "prune"):
        from lvlm_prune import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
