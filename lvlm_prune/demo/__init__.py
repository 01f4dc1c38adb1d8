"""The embedded model: a small vision-language model, the generated world it was trained on, and the code that made it.

Importing this package imports neither torch nor transformers.

Example:
    >>> (CHECKPOINT / "config.json").name
    'config.json'
"""

from pathlib import Path

#: Folder of the embedded checkpoint, in the ordinary Hugging Face layout.
# Where the files themselves are: some installations put links to them beside the modules.
CHECKPOINT: Path = (Path(__file__).parent / "checkpoint" / "config.json").resolve().parent

DEMO = "demo"
OUTLIERS = "demo-outliers"
#: Names of the embedded model: as it was trained, and rescaled to the outlier channels of real weights.
NAMES = (DEMO, OUTLIERS)


def checkpoint(name: str) -> Path:
    """Folder of the embedded model by its name.

    Args:
        name: One of `NAMES`. What `demo-outliers` stands for is made on first use, in the cache of Hugging Face
            (`HF_HOME`); it takes 9 MB.

    Raises:
        OSError: It cannot be written there.
    """
    if name == DEMO:
        return CHECKPOINT
    from huggingface_hub import constants

    from lvlm_prune.demo.outliers import cached

    return cached(CHECKPOINT, Path(constants.HF_HOME) / "lvlm-prune")


def is_embedded(folder: Path) -> bool:
    """Whether a checkpoint folder is the embedded model's, or was made from it: it has the embedded tokenizer."""
    name = "tokenizer.json"
    return (folder / name).is_file() and (folder / name).read_bytes() == (CHECKPOINT / name).read_bytes()


__all__ = ["CHECKPOINT", "DEMO", "NAMES", "OUTLIERS", "checkpoint", "is_embedded"]
