"""Reading in threads: what the coming steps need, and whatever a dead file system may never give.

Threads, not processes: what they read needs no way back, through shared memory or a pipe, that
could be full; none can be killed or stopped alone; an error of theirs is raised as it is.
"""

import errno
import logging
import math
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any, Generic, TypeVar

from flowjobs.errors import DataError

logger = logging.getLogger(__name__)

# A file system that is away for longer than the first is spoken of (and again after four times as
# long), than the second not waited for.
SAY_AFTER_S = 10.0
WAIT_S = 600.0
# A read that is under way when the training ends.
END_S = 2.0

T = TypeVar("T")
_Asked = tuple[Callable[[], T], "Future[T]"]


class _OfThread(threading.local):
    """What a thread knows of itself."""

    # Whether whoever waits for what it reads does so no longer than a limit.
    has_limit = False


_of_thread = _OfThread()
# Where each idle thread of `read_in_time` is asked. A forked process has none.
_idle: "list[queue.SimpleQueue[_Asked[Any] | None]]" = []
os.register_at_fork(after_in_child=_idle.clear)


class ReadAhead(Generic[T]):
    """Results of reads in the order in which they were asked for, each begun before it is needed.

    Args:
        reads: One read after the other, without an end.
        n_threads: How many read at once; 0: each row is read when it is needed.
        name: Name of what is read, for the texts.
        wait_s: How long one is waited for; None: to its end, where it is computed and comes to one.
    """

    def __init__(
        self,
        reads: Iterator[Callable[[], T]],
        n_threads: int,
        name: str,
        wait_s: float | None = WAIT_S,
    ) -> None:
        self._reads = reads
        self._name = name
        self._wait_s = wait_s
        self._asked: queue.SimpleQueue[_Asked[T] | None] = queue.SimpleQueue()
        self._coming: deque[Future[T]] = deque()
        threads = [_thread(self._asked, has_limit=wait_s is not None) for _ in range(n_threads)]
        for thread in threads:
            thread.start()
        self._n_ahead = 2 * n_threads
        # One that comes back from a read while the interpreter is being torn down could abort it.
        weakref.finalize(self, _end, self._asked, threads)

    def next(self) -> T:
        """What the next read gives.

        Raises:
            DataError: It does not come to an end.
        """
        if not self._n_ahead:
            return next(self._reads)()
        while len(self._coming) < self._n_ahead:
            future: Future[T] = Future()
            self._asked.put((next(self._reads), future))
            self._coming.append(future)
        return self._wait_for(self._coming.popleft())

    def _wait_for(self, future: "Future[T]") -> T:
        return _rows_of(future, self._wait_s, self._name)


def read_in_time(read: Callable[[], T], name: str) -> T:
    """What a read gives that may never end: of another thread, waited for no longer than WAIT_S.

    In a thread that is itself waited for with a limit, it is called there. The hand-over takes 30
    to 200 µs.

    Args:
        read: Calls nothing of torch, whose C++ could abort a process that ends meanwhile.
        name: Name of what is read, for the texts.

    Raises:
        DataError: It does not come to an end.
    """
    if _of_thread.has_limit:
        return read()
    try:
        asked = _idle.pop()
    except IndexError:
        asked = queue.SimpleQueue()
        _thread(asked, has_limit=True).start()
    future: Future[T] = Future()
    asked.put((read, future))
    try:
        return _rows_of(future, WAIT_S, name)
    finally:
        if future.done():
            _idle.append(asked)
        else:
            asked.put(None)  # if the read comes back, its thread ends


class HangsError(TimeoutError):
    """What a thread was asked for has not come in time."""


def result_of(future: "Future[T]", wait_s: float | None, words: str) -> T:
    """Wait for what a thread was asked for, and say so after a while.

    Args:
        future: What it was asked for.
        wait_s: How long to wait; None: to its end.
        words: What it has not done yet, to be read before "for 10 s".

    Raises:
        HangsError: It has not come to its end; of number ETIMEDOUT.
    """
    limit_s = math.inf if wait_s is None else wait_s
    waited_s, until_s = 0.0, min(SAY_AFTER_S, limit_s)
    while not wait([future], until_s - waited_s).done:
        waited_s = until_s
        if waited_s == limit_s:
            raise HangsError(errno.ETIMEDOUT, f"{words} for {waited_s:g} s")
        logger.warning("%s for %g s; waiting", words, waited_s)
        until_s = min(4 * waited_s, limit_s)
    return future.result()


def _rows_of(future: "Future[T]", wait_s: float | None, name: str) -> T:
    try:
        return result_of(future, wait_s, f"{name} has given no rows")
    except HangsError as error:
        raise DataError(f"{error.strerror}: does its file system answer?") from error


def _thread(asked: "queue.SimpleQueue[_Asked[T] | None]", *, has_limit: bool) -> threading.Thread:
    # A daemon: one that hangs in a dead file system must not keep the process from its end.
    return threading.Thread(target=_serve, args=(asked, has_limit), name="reader", daemon=True)


def _serve(asked: "queue.SimpleQueue[_Asked[T] | None]", has_limit: bool) -> None:
    _of_thread.has_limit = has_limit
    while (item := asked.get()) is not None:
        read, future = item
        try:
            future.set_result(read())
        except BaseException as error:  # whoever waits for the result raises it
            future.set_exception(error)
        del item, read, future  # or the rows would be held until the next ones are asked for


def _end(asked: "queue.SimpleQueue[_Asked[T] | None]", threads: list[threading.Thread]) -> None:
    while not asked.empty():  # what is not begun need not be
        try:
            asked.get_nowait()
        except queue.Empty:
            break
    for _ in threads:
        asked.put(None)
    for thread in threads:
        thread.join(END_S)
