"""Standard output and standard error of a command, also where nobody reads them any more."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any


class Output(io.TextIOWrapper):
    """One that is written to without a reader, or without room: a command that acts does its work.

    `submit … | head -1` must not submit half, whatever becomes of what it prints.
    """

    def __init__(self, number: int, encoding: str) -> None:
        self._file = _File(number, "w", closefd=False)
        # Where the locale is C, or a file's name is no text, a print must not fail.
        super().__init__(
            io.BufferedWriter(self._file), encoding, errors="replace", line_buffering=True
        )

    def ends_with_its_reader(self) -> None:
        """From now on the program ends where nothing can be written: it only looks."""
        self._file.ends = True

    def check(self) -> None:
        """Raise what something could not be written for, unless that its reader has gone."""
        if self._file.error and not isinstance(self._file.error, BrokenPipeError):
            raise self._file.error


class _File(io.FileIO):
    ends = False
    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = "standard output"
            with open(os.devnull, "wb") as nowhere:  # for the processes that it starts, too
                os.dup2(nowhere.fileno(), self.fileno())
            if self.ends:
                raise (SystemExit(0) if isinstance(error, BrokenPipeError) else error) from None
            self.error = error
            return memoryview(data).nbytes


@contextlib.contextmanager
def lasting_outputs() -> Iterator[None]:
    """Have both outputs be such, but for one that is in memory."""
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
