"""Standard output and standard error of a command, also where nobody reads them any more."""

import contextlib
import io
import os
import shutil
import sys
from collections.abc import Iterator, Set
from pathlib import Path
from typing import TextIO

from flowjobs.formatting import format_bytes


class Output(io.TextIOWrapper):
    """A stream that drops what cannot be written, so that a command that acts does its work.

    `submit … | head -1` must not submit half, whatever becomes of what it prints.
    """

    def __init__(self, number: int, encoding: str) -> None:
        # Errors are seen above the buffer: in a `write` of Python's below it, Ctrl-C could come
        # when the bytes are out and before the buffer knows, which then writes them again.
        binary = io.BufferedWriter(io.FileIO(number, "w", closefd=False))
        # Where the locale is C, or a file's name is no text, a print must not fail.
        super().__init__(binary, encoding, errors="replace", line_buffering=True)
        self._ends = False
        self._error: OSError | None = None

    def ends_with_its_reader(self) -> None:
        """From now on the program ends where nothing can be written: its command only looks."""
        self._ends = True

    def check(self) -> None:
        """Raise the error for which something was dropped, unless the reader has just gone."""
        if self._error and not isinstance(self._error, BrokenPipeError):
            raise self._error

    def write(self, text: str, /) -> int:
        """Write it, as far as that is possible."""
        try:
            return super().write(text)
        except OSError as error:
            self._to_nowhere(error)
            return len(text)

    def flush(self) -> None:
        """Write what is buffered, as far as that is possible."""
        try:
            super().flush()
        except OSError as error:
            self._to_nowhere(error)

    def _to_nowhere(self, error: OSError) -> None:
        error.filename = "standard output"
        with open(os.devnull, "wb") as nowhere:  # for the processes that it starts, too
            os.dup2(nowhere.fileno(), self.fileno())
        if self._ends:
            raise (SystemExit(0) if isinstance(error, BrokenPipeError) else error) from None
        self._error = error


@contextlib.contextmanager
def lasting_outputs() -> Iterator[None]:
    """Make stdout and stderr such streams while the block lasts, but for one that is in memory."""
    with contextlib.ExitStack() as stack:
        for stream, redirected in (
            (sys.stdout, contextlib.redirect_stdout),
            (sys.stderr, contextlib.redirect_stderr),
        ):
            # Python has none where it was started with one closed (>&-, some daemons).
            lasting = stream or stack.enter_context(open(os.devnull, "w"))
            with contextlib.suppress(io.UnsupportedOperation):
                lasting = Output(lasting.fileno(), lasting.encoding)
            stack.enter_context(redirected(lasting))
        yield


class NewLines(io.StringIO):
    """Prints each line as it comes, unless the refresh before printed it too.

    Attributes:
        lines: All of them.
    """

    def __init__(self, output: TextIO, before: Set[str]) -> None:
        super().__init__()
        self.lines: set[str] = set()
        self._output, self._before = output, before
        self._begun = ""

    def write(self, text: str) -> int:
        """Pass on the lines that are whole."""
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            if line not in self._before:
                print(line, file=self._output, flush=True)
        self.lines.update(lines)
        return len(text)


def disk_words(wanted: int, study: Path) -> str:
    """What checkpoints will take, and what is free where a study is or will be, in bytes."""
    there = next(folder for folder in (study, *study.parents) if folder.exists())
    free = format_bytes(shutil.disk_usage(there).free)
    return f"about {format_bytes(wanted)} of checkpoints; {free} are free"


def print_rows(**rows: str) -> None:
    """Print titles with their texts, one below the other."""
    for title, text in rows.items():
        print(f"{title:10} {text}", flush=True)
