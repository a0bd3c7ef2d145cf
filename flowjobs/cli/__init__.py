"""The command line: one file a command. The only place that prints, and that exits."""

try:
    from flowjobs.cli.main import main
except KeyboardInterrupt:  # Ctrl-C while this loads, which takes a moment
    raise SystemExit(130) from None

__all__ = ["main"]
