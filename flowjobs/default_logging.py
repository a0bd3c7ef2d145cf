"""Progress on stderr where nobody has set up logging, as in a notebook."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def default_logging() -> Iterator[None]:
    """Show progress, as long as the block lasts, unless a level is set for `flowjobs` itself.

    Many a notebook has handlers and shows warnings alone: without a wish of its user, and a trainer
    that says nothing for an hour seems to hang.
    """
    ours = logging.getLogger("flowjobs")
    level = ours.level
    if level > logging.INFO:
        yield
        return
    others = min((handler.level for handler in _handlers_of(ours)), default=None)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    if others is not None:  # what they show is not said twice
        handler.addFilter(lambda record: record.levelno < others)
    ours.addHandler(handler)
    if not ours.isEnabledFor(logging.INFO):
        ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(level)


def _handlers_of(logger: logging.Logger) -> Iterator[logging.Handler]:
    """Those that get what is logged there, by way of its parents too."""
    above: logging.Logger | None = logger
    while above:
        yield from above.handlers
        above = above.parent if above.propagate else None
