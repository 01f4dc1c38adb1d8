"""The embedded model: a small vision-language model, the generated world it was trained on, and the code that made it.

Importing this package imports neither torch nor transformers.

Example:
    >>> (CHECKPOINT / "config.json").name
    'config.json'
"""

from pathlib import Path

#: Folder of the embedded checkpoint, in the ordinary Hugging Face layout.
CHECKPOINT: Path = Path(__file__).parent / "checkpoint"

__all__ = ["CHECKPOINT"]
