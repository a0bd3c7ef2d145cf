"""What W&B refuses for good, apart from what passes: what it says, and what can be done about it.

wandb itself tries again what may pass (a network, a server that fails or is busy) and says so in
what it raises; what is left is an answer. Of those only the ones that are known count as refusals:
whatever else is said may pass. Loads no wandb.
"""

import json
import re
from dataclasses import asdict, dataclass

from flowjobs.runs.files import write_json
from flowjobs.runs.run import Run
from flowjobs.tracking.session import Session, read_session

# The server's own words, as wandb passes them on. It takes such an id never again; an answer of
# this kind (409) is one that wandb tries again all the same.
DELETED = "previously created and deleted"
RETRIED = re.compile("while retrying|timed? ?out|no answer", re.IGNORECASE)
LOGIN = re.compile(
    r"error 401|not logged in|unauthori[sz]ed|unauthenticated|api.key|bad key", re.IGNORECASE
)
PLACE = re.compile(
    "error 40[34]|permission|forbidden|access denied|not found|does not exist", re.IGNORECASE
)


@dataclass(frozen=True)
class Refusal:
    """Why W&B does not take a run.

    Attributes:
        text: What it said, and what can be done.
        for_ever: Whether no other try of the same run can help.
    """

    text: str
    for_ever: bool = False


def refusal_of(said: str, run: Run) -> Refusal | None:
    """The refusal in what wandb or its server said; None if that may pass."""
    said = " ".join(said.split())
    if DELETED in said:
        return Refusal(
            "it was deleted in W&B, which never takes its id again: "
            f"`flowjobs sync {run.name} --as-new` uploads it as a new run there",
            for_ever=True,
        )
    if RETRIED.search(said):
        return None
    if LOGIN.search(said):
        return Refusal(
            f"W&B refuses the login here ({said}): run `wandb login --relogin` or mend "
            f"WANDB_API_KEY, then `flowjobs sync {run.name}`"
        )
    if PLACE.search(said):
        tracking = run.config().tracking
        place = "/".join(filter(None, [tracking.wandb_entity, tracking.wandb_project]))
        return Refusal(
            f"W&B refuses it ({said}): see whether you may write to {place} there, or name "
            f"another place in {run.config_file}, then `flowjobs sync {run.name}`"
        )
    return None


def note_refusal(run: Run, session: Session, refusal: Refusal) -> None:
    """Keep in the run's folder what W&B said to a session."""
    # Not in tracking.json, which another process writes.
    write_json(run.refusal_file, {"token": session.token, **asdict(refusal)}, flush=False)


def current_refusal(run: Run) -> Refusal | None:
    """What keeps W&B from taking the run now; None if nothing is known to. Writes nothing."""
    session = read_session(run)
    if session is None or session.closed:
        return None
    try:
        found = json.loads(run.refusal_file.read_text())
        if found["token"] == session.token:  # each session is a new try
            return Refusal(found["text"], found["for_ever"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None
