"""What lies beside the weights of a finished folder of `pack` or `unpack`, read again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from filecmp import cmp
from pathlib import Path

from lvlm_prune.checkpoints.checkpoint import CheckpointFolder
from lvlm_prune.errors import RunError
from lvlm_prune.output.names import EVALUATION_FILES, FIGURE_FOLDER, PACKING_RECORD, PAGE_NAME
from lvlm_prune.output.own_files import public_content
from lvlm_prune.output.private import RECORDS
from lvlm_prune.runs.pack.record import UNPACKING_RECORD

# Without what is private, other bytes.
_CLEANED = (*RECORDS, "config.yaml", "adapter_config.json")
# Drawn again, left out, or written by commands that came later.
_WRITTEN_ANEW = (PACKING_RECORD, UNPACKING_RECORD, PAGE_NAME, FIGURE_FOLDER, *EVALUATION_FILES)


def verify_beside(
    source: CheckpointFolder, folder: Path, made: Mapping[str, bytes], otherwise: Collection[str]
) -> None:
    """Hold every file beside the weights against what a run writes there.

    Args:
        source: What was packed or unpacked.
        folder: The finished folder.
        made: Name of each file that is another one than the source's -> its bytes.
        otherwise: Files that are verified in a way of their own.

    Raises:
        RunError: One is missing, or another one.
    """
    for file in source.files():
        written = folder / file
        if str(file) in (*source.shards, *otherwise) or file.parts[0] in _WRITTEN_ANEW:
            continue
        if not written.is_file():
            raise RunError(f"verification failed: {file} is missing in {folder}")
        if str(file) in made:
            same = written.read_bytes() == made[str(file)]
        else:
            same = cmp(source.path / file, written, shallow=False)
            stays = public_content(source.path / file) if file.name in _CLEANED else None
            same = same or (stays is not None and stays == public_content(written))
        if not same:
            raise RunError(
                f"verification failed: {file} in {folder} is not as it was written; put it back, or write elsewhere"
            )
