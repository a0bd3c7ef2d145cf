"""Ctrl-C, and other signals that end a command, while a job is handed over."""

import signal
import threading

import pytest

from flowjobs.jobs.submit import told_to_end_waits


def test_ctrl_c_waits_whichever_thread_it_reaches() -> None:
    done = threading.Event()
    # A thread that does not block it, as that of a spinner.
    other = threading.Thread(target=done.wait)
    other.start()
    assert other.ident is not None
    noted = []

    def hand_over(thread: int) -> None:
        with told_to_end_waits(), told_to_end_waits():
            signal.pthread_kill(thread, signal.SIGINT)
            done.wait(0.2)
            noted.append("the job")

    with pytest.raises(KeyboardInterrupt):
        hand_over(other.ident)
    done.set()
    assert noted == ["the job"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
