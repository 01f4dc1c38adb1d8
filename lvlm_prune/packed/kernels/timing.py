"""How long products take on this machine, measured where a choice depends on it."""

import time
from collections.abc import Callable, Sequence

ROUNDS = 7
"""How often each product is timed; the fastest counts, so that other programs on the machine do not."""

SECONDS = 2e-4
"""Time of one round, at least: shorter ones are lost in the clock."""


def fastest_times(products: Sequence[Callable[[], object]]) -> list[float]:
    """Seconds that each product takes at its fastest; they take turns."""
    repeats = [_repeats(product) for product in products]
    fastest = [float("inf")] * len(products)
    for _ in range(ROUNDS):
        for index, (product, times) in enumerate(zip(products, repeats)):
            fastest[index] = min(fastest[index], _seconds(product, times) / times)
    return fastest


def _repeats(product: Callable[[], object]) -> int:
    product()
    return max(1, round(SECONDS / max(_seconds(product, 1), 1e-7)))


def _seconds(product: Callable[[], object], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        product()
    return time.perf_counter() - begin
