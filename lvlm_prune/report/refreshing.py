"""Writing a page once more, when there is something new to say of what it is about."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from lvlm_prune.errors import InputError
from lvlm_prune.output.manifest import Manifest, read_run
from lvlm_prune.output.names import PAGE_NAME, PRUNING_RECORD, RECOVERY_RECORD


def refresh_page(folder: Path, same_numbers: bool = False) -> bool:
    """Write the report that lies in a folder once more, now that there is something new to say.

    Args:
        folder: Where page and record are.
        same_numbers: Whether no number is new, so that the figures are those that are drawn already.

    Returns:
        Whether there is one, and a record beside it of which it can be made.
    """
    if not (folder / PAGE_NAME).is_file():
        return False
    # Matplotlib takes its time to load.
    from lvlm_prune.report.page import drawn_again, read_from, write_page
    from lvlm_prune.report.pruning import pruning_page
    from lvlm_prune.report.recovery import recovery_page

    pages: dict[str, Callable[[Manifest, Path], Any]] = {RECOVERY_RECORD: recovery_page, PRUNING_RECORD: pruning_page}
    for name, page in pages.items():
        if (folder / name).is_file():
            record = Manifest(read_run(folder / name) or {})
            if record.get("status") == "complete":
                with suppress(InputError), drawn_again(folder) if same_numbers else nullcontext():
                    with read_from(folder, name, is_read=True):
                        made = page(record, folder)
                    write_page(folder, *made)
                    return True
            return False
    return False
