"""lvlm-prune: make large vision-language models sparse after training, block by block."""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout `callbacks/` lies beside the package; an installation maps it to `lvlm_prune.callbacks`.
if (Path(__file__).parents[1] / "callbacks" / "__init__.py").is_file():
    __path__.append(str(Path(__file__).parents[1]))
