"""lvlm-prune: make large vision-language models sparse after training, block by block."""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout `callbacks/` lies beside the package; an installation maps it to `lvlm_prune.callbacks`.
if (Path(__file__).parents[1] / "callbacks" / "__init__.py").is_file():
    __path__.append(str(Path(__file__).parents[1]))


def __getattr__(name: str):
    """`lvlm_prune.prune` without paying for torch where only the version is wanted."""
    if name == "prune":
        from lvlm_prune.api import prune

        return prune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
