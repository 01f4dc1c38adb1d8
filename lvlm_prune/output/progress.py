"""How far a run is: a bar on a terminal, a line a minute in a file.

A bar draws itself again and again in one line; in a log that is thousands of lines, or nothing at all for hours. So
where standard error is no terminal a line is printed once a minute of the command, whatever it does one after the
other, with what is done and what is left:

    Scoring model: 412 of 1300 questions (32%) after 2 min, about 4 min left
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import ClassVar

from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lvlm_prune.clock import command_began

#: Seconds between two lines where there is no terminal.
SECONDS_BETWEEN_LINES = 60.0

# In fewer seconds than that nothing can be said of what is left: the first of many takes longest.
_SECONDS_TO_JUDGE_BY = 5.0


class Progress:
    """Progress of something that has an end; a context that closes itself.

    Args:
        title: What is going on, first on the line.
        total: How much there is to do, in any unit.
        unit: Name of what is counted, in the plural; empty where amounts mean nothing to a reader.
        initial: How much an earlier run has done.
        shown: False is silent: another process shows it, or nobody wants it.
        leave: The bar stays on the terminal when it is closed.

    Example:
        >>> with Progress("Scoring", 1300, "questions", shown=False) as progress:
        ...     progress.update(128)
        ...     progress.line(seconds=60.0)
        'Scoring: 128 of 1300 questions (10%) after 1 min, about 9 min left'
    """

    _last_line: ClassVar[float] = float("-inf")

    def __init__(
        self, title: str, total: float, unit: str = "", *, initial: float = 0, shown: bool = True, leave: bool = False
    ) -> None:
        self.title, self.total, self.unit, self.initial = title, total, unit, initial
        self.done, self._text = initial, ""
        self._begun = time.perf_counter()
        self._command_began = command_began()
        counts = f"{{n_fmt}}/{{total_fmt}} {unit} · " if unit else "{desc}"
        self._bar: Tqdm | None = None
        self._lines = shown and not sys.stderr.isatty()
        if shown and not self._lines:
            self._bar = Tqdm(
                total=total,
                initial=initial,
                bar_format=f"{title} {{bar:24}} {counts}{{elapsed}} · {{remaining}} left",
                leave=leave,
            )

    def update(self, amount: float = 1) -> None:
        """Count so many more units as done."""
        self.done += amount
        if self._bar is not None:
            self._bar.update(amount)
        now = time.perf_counter()
        if self._lines and now - max(self._command_began, Progress._last_line) >= SECONDS_BETWEEN_LINES:
            Progress._last_line = now
            print(self.line(now - self._begun), file=sys.stderr, flush=True)

    def advance_to(self, amount: float) -> None:
        """Set how many units are done in all."""
        self.update(amount - self.done)

    def describe(self, text: str) -> None:
        """What is being worked on, shown with the next update."""
        self._text = text
        if self._bar is not None:
            self._bar.set_description_str(f"{text} · ", refresh=False)

    def line(self, seconds: float) -> str:
        """What is printed so many seconds after the beginning."""
        share = self.done / max(self.total, 1e-9)
        counts = f"{self.done:.0f} of {self.total:.0f} {self.unit} ({share:.0%})" if self.unit else f"{share:.0%}"
        text = f"{self.title}: {counts}{f' · {self._text}' if self._text else ''} after {readable_time(seconds)}"
        if self.done <= self.initial or seconds < _SECONDS_TO_JUDGE_BY:
            return text
        left = seconds * (self.total - self.done) / (self.done - self.initial)
        return f"{text}, about {readable_time(left)} left"

    def close(self, leave: bool | None = None) -> None:
        """Nothing more is shown; `leave` decides whether the bar stays, other than was said at first."""
        self._lines = False
        if self._bar is not None:
            if leave is not None:
                self._bar.leave = leave
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def readable_time(seconds: float) -> str:
    """A time in the coarsest unit that says enough.

    Example:
        >>> readable_time(40), readable_time(200), readable_time(9000)
        ('40 s', '3 min', '2.5 h')
    """
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds < 59.5 else "1 min"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"
