"""The progress bar of a start: one line per rank that loads, one per replica that waits."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from runtime.controller.spec import DeploymentReport


class LoadProgress:
    """with-able; `show` takes each new report. Says nothing when the console is no terminal but for changes of state."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(), console=console
        )
        self._tasks: dict[str, TaskID] = {}
        self._said: set[str] = set()

    def __enter__(self) -> LoadProgress:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._console.is_terminal:
            self._bars.stop()

    def show(self, report: DeploymentReport) -> None:
        for replica in report.replicas:
            if self._console.is_terminal:
                self._set(replica.replica_id, f"replica {replica.replica_id}: {replica.state}", int(replica.state == "ready"), 1)
                for part in replica.progress:
                    self._set(
                        f"{replica.replica_id}/{part.rank}/{part.phase}", f"  rank {part.rank} {part.phase}", part.done, max(1, part.total)
                    )
            else:
                self._say(f"replica {replica.replica_id}: {replica.state}")
        if report.problem:
            self._say(report.problem)

    def _set(self, key: str, description: str, done: int, total: int) -> None:
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(description, total=total)
        self._bars.update(self._tasks[key], description=description, completed=done, total=total)

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._console.print(line, highlight=False)
