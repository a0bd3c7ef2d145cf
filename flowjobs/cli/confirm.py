"""Asks for a yes at the terminal before what cannot be undone, or is much."""

import sys

from flowjobs.errors import ConfigError


def confirmed(question: str, if_nobody: str) -> bool:
    """Whether the user says yes; Ctrl-D is a no.

    Args:
        question: A yes-or-no question.
        if_nobody: The error where nobody can be asked, as in a script.

    Raises:
        ConfigError: Standard input is no terminal.
    """
    if not sys.stdin.isatty():
        raise ConfigError(if_nobody)
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False
