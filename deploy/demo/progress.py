"""How far training is, and what of it a person sees."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Training ends at num_steps where given (repeatable), else when the time or the tokens are used up, whichever is first."""

    num_steps: int | None
    seconds: float
    tokens: float

    def progress(self, step: int, elapsed_s: float, num_tokens: int) -> float:
        """0 at the start, 1 or more at the end. Learning rate and sequence lengths follow it, so a run on the clock is annealed in time."""
        if self.num_steps is not None:
            return step / self.num_steps
        return max(elapsed_s / self.seconds, num_tokens / self.tokens)


class Stopwatch:
    """Seconds since start() or the last one; time inside `with paused()` is not counted."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.start()

    def start(self) -> None:
        self._started_s = self._clock()

    def elapsed_s(self) -> float:
        return self._clock() - self._started_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        before_s = self._clock()
        try:
            yield
        finally:
            self._started_s += self._clock() - before_s


Report = Callable[[float, str], None]


@contextmanager
def reporter(name: str) -> Iterator[Report]:
    """Yields report(progress, text): one line at each call, above a bar on a terminal where rich is installed."""
    if not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        yield lambda progress, text: print(f"{name} {min(progress, 1.0):6.1%}  {text}", flush=True)
        return
    from rich.progress import Progress

    with Progress() as bar:  # the lines stay above it
        task = bar.add_task(name, total=1.0)

        def report(progress: float, text: str) -> None:
            bar.console.print(f"{name}  {text}", markup=False, highlight=False)
            bar.update(task, completed=min(progress, 1.0))

        yield report
