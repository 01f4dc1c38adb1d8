"""Numbers of bytes as people read them."""


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
