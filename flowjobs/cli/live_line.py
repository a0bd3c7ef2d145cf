"""The line that says how far a run is: redrawn in a terminal, now and then a new one elsewhere."""

import contextlib
import sys
import time
from datetime import timedelta

from rich.progress import BarColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from flowjobs.cli.table import live_console
from flowjobs.runs.metrics import Row
from flowjobs.runs.progress import state_in_words
from flowjobs.runs.status import RunStatus

PLAIN_EVERY_S = 30.0
ERASE_BELOW = "\x1b[J"


class PlainLines:
    """Prints a line where none is redrawn: when there is a new state, else now and then."""

    def __init__(self, *, stderr: bool = False) -> None:
        self._stderr = stderr
        self._said, self._said_at = "", 0.0

    def say(self, state: str, words: str) -> None:
        """Print words, if the state is new or the last ones are some time ago."""
        if state != self._said or time.monotonic() - self._said_at > PLAIN_EVERY_S:
            self._said, self._said_at = state, time.monotonic()
            print(words, file=sys.stderr if self._stderr else sys.stdout, flush=True)


class CutColumn(TextColumn):
    """Text that gives way where the terminal is narrow, without breaking into more rows."""

    def render(self, task: Task) -> Text:
        """See rich."""
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


class LiveLine:
    """Draws one line for as long as the block lasts: the bar, the epoch, the time left, the losses.

    One row at any width: the losses give way first, then the bar.
    """

    def __init__(self) -> None:
        console = live_console()
        self._drawn = console.is_terminal and not console.is_dumb_terminal
        one_row = Column(no_wrap=True, overflow="ellipsis")
        self._progress = Progress(
            TextColumn("{task.description}", table_column=one_row, markup=False),
            BarColumn(bar_width=None, table_column=Column(max_width=20)),
            TextColumn("{task.fields[epoch]}", table_column=one_row, markup=False),
            TimeRemainingColumn(table_column=one_row),
            CutColumn("{task.fields[losses]}", table_column=Column(), markup=False),
            console=console,
            auto_refresh=False,
            disable=not self._drawn,
        )
        self._bar = self._progress.add_task("", total=None, epoch="", losses="")
        self._attempts = 0
        self._plain = PlainLines()

    def __enter__(self) -> "LiveLine":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def say(self, words: str) -> None:
        """Show that nothing is to be measured yet, and why."""
        self._progress.update(self._bar, description=words)
        self._redraw(words, words)

    def show(self, status: RunStatus, latest: Row) -> None:
        """Show how far the run is."""
        if len(status.attempts) > self._attempts:
            # What attempts before have done says nothing of the speed of this one.
            self._attempts = len(status.attempts)
            self._progress.reset(self._bar, completed=status.step)
        state = state_in_words(status)
        self._progress.update(
            self._bar,
            description=state,
            total=status.total_steps,
            completed=status.step,
            epoch=f"epoch {status.epoch}/{status.epochs}",
            losses=_losses(status, latest),
        )
        task = self._progress.tasks[0]
        parts = [state, task.fields["epoch"]]
        if task.time_remaining:
            parts.append(f"{timedelta(seconds=int(task.time_remaining))} left")
        self._redraw(state, ", ".join([*parts, task.fields["losses"]]).rstrip(", "))

    def _redraw(self, state: str, plain: str) -> None:
        if self._drawn:
            # The cursor waits at the line's begin: a terminal that is made narrower breaks the
            # line into rows below it, which would stay.
            terminal = self._progress.console.file
            terminal.write("\r" + ERASE_BELOW)
            self._progress.refresh()
            terminal.write("\r")
            terminal.flush()
        else:
            self._plain.say(state, plain)


class StatusLine:
    """Draws words on standard error for as long as the block lasts; elsewhere prints them.

    Args:
        words: Drawn at first; not printed.
    """

    def __init__(self, words: str = "") -> None:
        console = live_console(stderr=True)
        self._drawn = console.is_terminal and not console.is_dumb_terminal
        self._status = console.status(Text(words))
        self._plain = PlainLines(stderr=True)

    def __enter__(self) -> "StatusLine":
        if self._drawn:
            self._status.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._status.stop()

    def say(self, state: str, words: str) -> None:
        """Show words; where none are redrawn, as soon as the state that they tell of is new."""
        if self._drawn:
            self._status.update(Text(words))
        else:
            with contextlib.suppress(OSError):  # no reader is no reason to end what it tells of
                self._plain.say(state, words)


def _losses(status: RunStatus, latest: Row) -> str:
    losses = {
        "val/loss": latest.get("val/loss"),
        "best": status.best_val_loss,
        "train/loss": latest.get("train/loss"),
    }
    return "  ".join(f"{key} {loss:.4f}" for key, loss in losses.items() if loss is not None)
