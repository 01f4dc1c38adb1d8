"""Whether a finished folder's card is the one that was written: it is made once more from the records and compared.

Evaluations change a card rightly, so that no digest of it would do. One that is missing is written again; one that its
user changed stays as it is, and that is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

from lvlm_prune.errors import shortened
from lvlm_prune.output.manifest import Manifest, replace_durably
from lvlm_prune.output.names import MODEL_CARD, PACKING_RECORD, PRUNING_RECORD, RECOVERY_RECORD
from lvlm_prune.output.private import private_folder
from lvlm_prune.report.card import (
    DENSE_CARD,
    Records,
    adapter_card_of,
    card_of,
    maker_of,
    packing_of,
    read_card,
    records_in,
    refresh_card,
    write_card,
)
from lvlm_prune.report.card_metadata import split_card

# What a run writes into the head of every card.
_OWN_METADATA = ("tags", "library_name", "base_model", "base_model_relation")
_LONGEST_LINE = 60
CARD_CAME_BACK = f"{MODEL_CARD} was missing; it is written again"


def verify_card(folder: Path, earlier: str, is_dense: bool) -> str:
    """Hold the card of a finished folder, and that of its adapter, against what a run writes.

    Args:
        folder: The folder, whose records are complete.
        earlier: Text of the card of the model that it was made from.
        is_dense: Whether that card is kept whole, as the card of the model that was pruned is.

    Returns:
        What there is to say of it: that it was missing, and is there again; where it is another one; else nothing.
    """
    adapter, records = folder / "adapter", records_in(folder)
    record, packing = maker_of(records), packing_of(records)
    if not _is_of_this_version(records):  # other versions have other words for the same
        return ""
    if missing := not (folder / MODEL_CARD).is_file():
        write_card(folder, earlier if is_dense else None, record, packing, earlier)
    text = read_card(folder)
    written = card_of(folder, record=record, packing=packing)
    if DENSE_CARD in text and text != written and text in _known_cards(folder, records):
        write_card(folder, record=record, packing=packing)
        text = written
    said = [CARD_CAME_BACK] if missing else []
    problem = _difference_of_earlier(text, earlier, is_dense) or _difference(text, written)
    said += [_said_of(MODEL_CARD, problem)] if problem else []
    if adapter.is_dir() and (recovery := records.get(RECOVERY_RECORD)) is not None:
        problem = _difference(read_card(adapter), adapter_card_of(Manifest(recovery)))
        said += [_said_of(f"adapter/{MODEL_CARD}", problem)] if problem else []
    return "\n".join(said)


def verify_card_given_back(folder: Path, expected: str) -> str:
    """The same of a card that was written as a whole.

    Args:
        folder: The folder.
        expected: Its text.
    """
    if not (folder / MODEL_CARD).is_file():
        replace_durably(folder / MODEL_CARD, expected.encode(errors="surrogateescape"))
        return CARD_CAME_BACK
    problem = _difference(read_card(folder), expected)
    return _said_of(MODEL_CARD, problem) if problem else ""


def _said_of(card: str, problem: str) -> str:
    return f"{card} is not the card that was written ({problem}); it stays as it is, and is not verified"


def is_edited(folder: Path) -> bool:
    """Whether its user changed what a run says in a card: it would be lost if the card were made once more.

    What stands in its head, and below the line of the dense model's card, is kept in any case.
    """
    text, records = read_card(folder), records_in(folder)
    if DENSE_CARD not in text or not all(records.values()) or not _is_of_this_version(records):
        return False
    return text not in _known_cards(folder, records)


@contextmanager
def card_follows(folder: Path) -> Iterator[None]:
    """Within, a folder's records may change, or lose what is private; afterwards its card says what they do.

    One that its user changed stays, unless what a run says in it is something else now.
    """
    before = card_of(folder) if is_edited(folder) else None
    yield
    if before is None or card_of(folder) != before:
        refresh_card(folder)


def _known_cards(folder: Path, records: Records) -> Iterator[str]:
    """The card as it is to be, and as it was before the folder was scored, or what is private was taken out of it.

    The likeliest first: each takes its time.
    """

    def with_private(record: Mapping[str, Any] | None) -> dict[str, Any] | None:
        return None if record is None else {name: value for name, value in record.items() if name != "private_data"}

    record, packing = maker_of(records), packing_of(records)
    yield card_of(folder, record=record, packing=packing)
    yield card_of(folder, record=record, packing=packing, is_scored=False)
    beside, packing = records_in(private_folder(folder)), with_private(records.get(PACKING_RECORD)) or packing
    own, whole = (each.get(RECOVERY_RECORD) or each.get(PRUNING_RECORD) for each in (records, beside))
    for one in (record, with_private(own) or record, whole or record):
        for is_scored in (True, False):
            yield card_of(folder, record=one, packing=packing, is_scored=is_scored)


def _is_of_this_version(records: Records) -> bool:
    from lvlm_prune import __version__

    told = (one.get("versions", {}).get("lvlm_prune") for one in records.values() if one is not None)
    return all(version == __version__ for version in told)


def _difference(found: str, expected: str) -> str:
    """Where two texts differ first, for people; empty where they are the same."""
    pairs = zip_longest(found.splitlines(), expected.splitlines())
    different = ((number, one, other) for number, (one, other) in enumerate(pairs, 1) if one != other)
    number, one, other = next(different, (0, "", ""))
    if not number:
        return ""
    what = f"is `{shortened(one.strip(), _LONGEST_LINE)}`" if one is not None else "is missing"
    written = f", was `{shortened(other.strip(), _LONGEST_LINE)}`" if one is not None and other is not None else ""
    return f"line {number} {what}{written}"


def _difference_of_earlier(text: str, earlier: str, is_dense: bool) -> str:
    """The same of what is taken from the card of the earlier model, which a card that is made again keeps as it is."""
    metadata, body = split_card(text)
    kept, expected = split_card(earlier)
    if not is_dense and DENSE_CARD in expected:
        expected = expected.split(DENSE_CARD, 1)[1]
    for name in sorted({*metadata, *kept} - {*_OWN_METADATA, "new_version"}):
        if metadata.get(name) != kept.get(name):
            return f"its head has another `{shortened(name, _LONGEST_LINE)}`"
    if DENSE_CARD not in body:
        return f"it has no line {DENSE_CARD}"
    problem = _difference(body.split(DENSE_CARD, 1)[1].strip(), expected.strip())
    return f"below {DENSE_CARD} {problem}" if problem else ""
