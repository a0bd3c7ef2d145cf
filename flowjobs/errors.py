"""Every exception that flowjobs raises on purpose."""


class FlowjobsError(Exception):
    """An error the user can fix; the text says what was found, expected and what to do.

    A command prints it without a traceback, and exits with its `exit_code`.
    """

    exit_code = 2


class ConfigError(FlowjobsError):
    """A value that cannot be used."""


class RunMismatchError(ConfigError):
    """The run of this name was started with another config."""


class DataError(FlowjobsError):
    """A dataset that is missing, unreadable or not usable."""


class CheckpointError(FlowjobsError):
    """A checkpoint that cannot be used."""


class CheckpointWriteError(CheckpointError):
    """The state could not be written; the text has the path and the reason."""

    exit_code = 1


class CheckpointDamagedError(CheckpointError):
    """The file does not hold the bytes that were written."""


class CheckpointNotFiniteError(CheckpointError):
    """The state in it is NaN or infinite: training had diverged when it was saved."""


class CheckpointGoneError(CheckpointError):
    """A run that had steps has no checkpoint any more."""


class CheckpointMismatchError(CheckpointError):
    """A sound checkpoint, but of another model or of a newer version of flowjobs."""


class CheckpointUnloadableError(CheckpointMismatchError):
    """It holds more than tensors and plain values, which cannot be loaded without running code."""


class SamplingError(FlowjobsError):
    """A model's samples are not finite, or its ODE cannot be solved."""


class RunNotFoundError(FlowjobsError):
    """No run of that name in the study."""


class RunBusyError(FlowjobsError):
    """Another attempt trains the run now."""


class RunHolderUnknownError(RunBusyError):
    """Whether another attempt trains the run is not known, or it has not ended yet: ask later."""

    exit_code = 75


class LockHeldError(FlowjobsError):
    """Another process holds a file, and has not let go of it in time."""

    exit_code = 75


class TrackingError(FlowjobsError):
    """A run could not be mirrored to the W&B server."""

    exit_code = 1


class ServerError(TrackingError):
    """The W&B server cannot be reached, or fails, whatever is asked of it."""


class LoginError(TrackingError):
    """There is no key for the W&B server, or it refuses the one there is."""

    exit_code = 2


class SubmissionError(FlowjobsError):
    """The scheduler refused the job."""


class SubmissionUnknownError(SubmissionError):
    """Whether the scheduler has taken the job is unknown: ask later."""

    exit_code = 75


class TrainingDivergedError(FlowjobsError):
    """The loss is not a number any more."""

    exit_code = 1


class NoProgressError(FlowjobsError):
    """Several attempts in a row ended without a new step."""

    exit_code = 1


class RankFailedError(FlowjobsError):
    """Another rank failed, which is why this one cannot train on either.

    Args:
        reason: Which one, and why.
        kind: The reason in a word or two.
        exit_code: That rank's.
        traceback: That rank's; empty if it is not known, or if it is no bug.
    """

    def __init__(
        self, reason: str, kind: str = "lost connection", exit_code: int = 1, traceback: str = ""
    ) -> None:
        super().__init__(reason)
        self.kind = kind
        self.exit_code = exit_code
        self.traceback = traceback


class RunInterrupted(Exception):
    """Not an error: the run stopped before its end, and can be resumed.

    Args:
        reason: Why it stopped ("preempted (SIGUSR2)").
        step: Optimizer steps done, all of them saved; None if that is not known, or if it stopped
            for an error that may be retried.
        kind: The reason in a word or two ("preempted", "time limit", "cancelled").
    """

    def __init__(self, reason: str, step: int | None = None, kind: str = "preempted") -> None:
        super().__init__(reason if step is None else f"{reason}; saved at step {step}")
        self.reason = reason
        self.step = step
        self.kind = kind


class MeasuringInterrupted(RunInterrupted):
    """The run was told to leave after its last step, while its samples were measured."""


class RunTakenOverError(Exception):
    """Not an error: another attempt holds the run now; this one must write nothing more."""


class UserCodeExitError(Exception):
    """The user's code called exit(), whatever the code: a bug, with a traceback.

    Args:
        called: What that raised. The exit code of a process says how the run is, which is not for
            a model to say.
    """

    def __init__(self, called: SystemExit) -> None:
        super().__init__(f"exit({'' if called.code is None else repr(called.code)}) was called")
        self.__cause__ = called  # it has the line
