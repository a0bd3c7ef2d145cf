"""The working directory, which may be removed while a job runs in it."""

from pathlib import Path


def working_folder() -> Path | None:
    """The working directory; None where it is gone."""
    try:
        return Path.cwd()
    except OSError:
        return None
