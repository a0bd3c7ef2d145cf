"""What the W&B server has of a run, asked with the client's own queries. Loads no wandb itself."""

import base64
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flowjobs.errors import LoginError, ServerError, TrackingError
from flowjobs.tracking.mode import api_key

ANSWER_WITHIN_S = 20.0
# How long an answer that may pass (500, 429, a cut connection) is asked for again.
PATIENCE_S = 30.0
REFUSED = (401, 403)
# To what an older server does not know.
UNKNOWN_QUESTION = (400, 404, 422)

# The client's RunResumeStatus, and `state` from its fragment of a run.
RUN_QUERY = """query FlowjobsRun($project: String, $entity: String, $name: String!) {
  model(name: $project, entityName: $entity) {
    entity { name }
    bucket(name: $name, missingOk: true) {
      state tags notes historyLineCount historyTail eventsTail
    }
  }
}"""

# The client's RewindRun, of `wandb.init(resume_from=…)`. It goes on from the step of the summary
# where that is higher than the history's, so the summary goes first; each session says it whole.
REWIND_MUTATION = """mutation FlowjobsRewind($entity: String!, $project: String, $name: String!,
    $summary: JSONString, $step: Float!) {
  upsertBucket(input: {entityName: $entity, modelName: $project, name: $name,
      summaryMetrics: $summary}) {
    bucket { id }
  }
  rewindRun(input: {entityName: $entity, projectName: $project, runName: $name,
      metricName: "_step", metricValue: $step}) {
    rewoundRun { id }
  }
}"""


@dataclass(frozen=True)
class RunOnServer:
    """A run as the server has it.

    Attributes:
        rows: Rows of its history.
        last_step: The newest row's step; -1 without rows.
        last_event_s: Time of the newest system metrics, in seconds of the epoch; 0 without.
        state: "running", "finished", "failed", "preempted", …; "" if there is no such run.
        entity: Whose it is.
    """

    rows: int = 0
    last_step: int = -1
    last_event_s: float = 0.0
    state: str = ""
    tags: tuple[str, ...] = ()
    notes: str = ""
    entity: str = ""


@dataclass(frozen=True)
class RunAddress:
    """Where a run is on a server; without an entity, the key's own."""

    entity: str | None
    project: str
    run_id: str

    @property
    def variables(self) -> dict[str, Any]:
        """For a query."""
        return {"entity": self.entity, "project": self.project, "name": self.run_id}


@dataclass(frozen=True)
class Server:
    """A W&B server and the key for it."""

    url: str
    key: str

    @classmethod
    def of_this_login(cls, url: str) -> "Server":
        """The server at `url`, with the key that wandb would use.

        Raises:
            LoginError: There is no key.
        """
        key = api_key(url)
        if not key:
            raise LoginError(
                f"no login for W&B at {url}: run `wandb login` once on this machine, or set "
                "WANDB_API_KEY (and WANDB_BASE_URL for a server of your own)"
            )
        return cls(url.rstrip("/"), key)

    def run(self, address: RunAddress, *, patience_s: float = PATIENCE_S) -> RunOnServer:
        """What is there of a run.

        Raises:
            LoginError: The server refuses the key.
            ServerError: It cannot be reached, or fails for longer than `patience_s`.
            TrackingError: It does not answer this question.
        """
        model = self._ask(RUN_QUERY, address.variables, patience_s).get("model") or {}
        found = model.get("bucket")
        if not found:
            return RunOnServer()
        return RunOnServer(
            rows=int(found["historyLineCount"] or 0),
            last_step=int(_last_of(found["historyTail"], "_step", -1)),
            last_event_s=float(_last_of(found["eventsTail"], "_timestamp", 0.0)),
            state=found["state"] or "",
            tags=tuple(found["tags"] or ()),
            notes=found["notes"] or "",
            entity=model["entity"]["name"],
        )

    def rewind(self, address: RunAddress, step: int) -> None:
        """Make the server forget the rows of a run past a step.

        Raises:
            LoginError: The server refuses the key.
            ServerError: It fails or does not answer.
            TrackingError: It cannot.
        """
        moment = {"summary": "{}", "step": float(step)}
        try:
            self._ask_once(REWIND_MUTATION, {**address.variables, **moment})
        except _MayPassError as error:
            kind = TrackingError if error.code in UNKNOWN_QUESTION else ServerError
            raise kind(f"{self.url}: {error}") from error

    def _ask(self, query: str, variables: Mapping[str, Any], patience_s: float) -> dict[str, Any]:
        give_up_at, pause_s = time.monotonic() + patience_s, 0.5
        while True:
            try:
                return self._ask_once(query, variables)
            except _MayPassError as error:
                if time.monotonic() + pause_s > give_up_at:
                    raise ServerError(f"{self.url}: {error}; try again later") from error
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 5.0)

    def _ask_once(self, query: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        login = base64.b64encode(f"api:{self.key}".encode()).decode()
        request = urllib.request.Request(
            f"{self.url}/graphql",
            json.dumps({"query": query, "variables": variables}).encode(),
            {"Content-Type": "application/json", "Authorization": f"Basic {login}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_WITHIN_S) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                if error.code in REFUSED:
                    raise LoginError(
                        f"{self.url} refuses the login here ({error.code}): run `wandb login "
                        "--relogin`, or mend WANDB_API_KEY"
                    ) from error
                said = f"answers {error.code} {error.reason}"
                raise _MayPassError(said, error.code) from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise _MayPassError("does not answer") from error
            raise ServerError(
                f"cannot reach {self.url} ({error.reason}): sync from a node with internet"
            ) from error
        except (OSError, ValueError) as error:
            raise _MayPassError(f"{type(error).__name__}: {error}") from error
        if answer.get("errors"):
            raise TrackingError(f"{self.url}: {answer['errors'][0].get('message')}")
        return dict(answer.get("data") or {})


class _MayPassError(Exception):
    """Asking again may help."""

    def __init__(self, said: str, code: int | None = None) -> None:
        super().__init__(said)
        self.code = code


def _last_of(tail: str | None, key: str, default: float) -> Any:
    """The value of `key` in the newest of the rows, which are JSON in JSON."""
    rows = [json.loads(row) for row in json.loads(tail or "[]")]
    return max((row.get(key, default) for row in rows), default=default)
