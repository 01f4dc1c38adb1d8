"""A choice of samples that is the same everywhere."""

import hashlib


def choose(count: int, total: int, seed: int) -> list[int]:
    """`count` of the numbers 0 ... `total` - 1, ascending; all of them in order if `count` equals `total`.

    A Fisher-Yates shuffle whose k-th random number is SHA-256 of `"{seed}/{k}"`, broken off after `count` steps: the
    same on every machine and version of Python, and with one seed a smaller choice is part of a larger one.

    Example:
        >>> choose(3, 100, seed=0)
        [2, 16, 84]
        >>> choose(3, 3, seed=0)
        [0, 1, 2]
    """
    moved: dict[int, int] = {}
    chosen = []
    for step in range(count):
        drawn = step + int.from_bytes(hashlib.sha256(f"{seed}/{step}".encode()).digest(), "big") % (total - step)
        chosen.append(moved.get(drawn, drawn))
        moved[drawn] = moved.get(step, step)
    return sorted(chosen)
