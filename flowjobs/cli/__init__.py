"""The command line: one file a command. The only place that prints, and that exits."""

from flowjobs.cli.main import main

__all__ = ["main"]
