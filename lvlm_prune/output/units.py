"""Numbers as people read them; the same number is the same text on screen, card and page."""

from typing import Any

from lvlm_prune.errors import whole


def readable_percent(share: float) -> str:
    """A share of weights in percent, of which two decimals count.

    Example:
        >>> readable_percent(0.6), readable_percent(0.625), readable_percent(0.59908)
        ('60%', '62.5%', '59.91%')
    """
    return f"{100 * share:.2f}".rstrip("0").rstrip(".") + "%"


def plain_number(value: Any) -> Any:
    """A whole number without a decimal point, also within lists and mappings; other values as they are.

    Example:
        >>> plain_number([1.0, 0.5, {"alpha": 2.0}, True])
        [1, 0.5, {'alpha': 2}, True]
    """
    if isinstance(value, dict):
        return {name: plain_number(item) for name, item in value.items()}
    if isinstance(value, list):
        return [plain_number(item) for item in value]
    return whole(value)


def readable_size(count: float) -> str:
    """A number of bytes in the unit in which it is a small number.

    Example:
        >>> readable_size(81_000), readable_size(1_234_567), readable_size(65e9)
        ('81.0 kB', '1.2 MB', '65.0 GB')
    """
    for size, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1000:.1f} kB"
