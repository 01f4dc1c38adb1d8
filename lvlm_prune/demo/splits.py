"""Splits that are disjoint by construction, and random numbers that are a function of a name.

Every item of the generated world has a *key*: the layout of a scene, the operands of a sum, the letters to be sorted,
a fact together with its wording. The hash of the key says which split the item belongs to, so an item of one split
cannot turn up in another one, whatever seeds and indices are used.

    share of the keys:   |------------ train 80 % ------------|-val 5 %-|-cal 5 %-|--- test 10 % ---|
"""

import hashlib
from random import Random
from typing import Literal, get_args

Split = Literal["train", "validation", "calibration", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

_UPPER_PERCENT: dict[Split, int] = {"train": 80, "validation": 85, "calibration": 90, "test": 100}


def stable_hash(key: str) -> int:
    """Non-negative 64-bit integer that depends on ``key`` alone (not on the process, unlike ``hash``).

    Example:
        >>> stable_hash("3 + 4") % 100
        76
    """
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def split_of(key: str) -> Split:
    """The one split that an item with this key may appear in.

    Example:
        >>> split_of("3 + 4")
        'train'
    """
    percent = stable_hash(key) % 100
    return next(split for split, upper in _UPPER_PERCENT.items() if percent < upper)


def random_for(purpose: str, split: Split, seed: int, index: int) -> Random:
    """Random numbers that are a function of the arguments.

    Raises:
        ValueError: `split` is not one of :data:`SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, got {split!r}")
    return Random(f"{purpose}/{split}/{seed}/{index}")
