"""Runs `wandb sync` in a process that does not outlive the one that started it.

`python -m flowjobs.tracking.upload FOLDER`, with a pipe as its standard input: when the pipe is
closed, also by a SIGKILL of whoever holds the other end, the upload ends at once. wandb's own
service is gone within a tenth of a second of that.
"""

import os
import sys
import threading


def main(folder: str) -> None:
    """Upload the session in `folder`; wandb says how it goes on standard output."""
    threading.Thread(target=_end_with_standard_input, daemon=True).start()
    from wandb.cli.cli import sync

    sync([folder])


def _end_with_standard_input() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
