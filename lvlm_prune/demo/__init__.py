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


def is_embedded(folder: Path) -> bool:
    """Whether a checkpoint folder is the embedded model's, or was made from it: it has the embedded tokenizer."""
    name = "tokenizer.json"
    return (folder / name).is_file() and (folder / name).read_bytes() == (CHECKPOINT / name).read_bytes()


__all__ = ["CHECKPOINT", "is_embedded"]
