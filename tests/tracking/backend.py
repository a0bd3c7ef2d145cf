"""A W&B server on this machine that the real client talks to. Standard library only.

It keeps what a run's page would show and what came in to get there, and it can go away, answer
late, refuse and fail. What it answers is what wandb 0.31 asks for; other questions get nothing.
"""

import base64
import contextlib
import json
import re
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "local-" + "0123456789abcdef" * 2 + "01234567"
ENTITY = "someone"

Row = dict[str, Any]


@dataclass(frozen=True)
class RunOnServer:
    """A run as its page would show it, and what the server was sent.

    Attributes:
        state: "running", "preempting", "preempted", "finished" or "failed".
        exit_code: Of the last session that ended; None while one runs.
        config: Without wandb's own part.
        summary: Without wandb's own keys.
        history: The rows, each with its `_step`, in order.
        received: Every row that came in, also those that the server dropped; a chunk that was
            sent again because no answer came counts once.
        dropped: Rows at or below a step that was there already.
        files: Uploaded files by name.
        sessions: How many sessions began.
    """

    id: str
    project: str
    entity: str
    group: str | None
    name: str
    state: str
    exit_code: int | None
    preempting: bool
    tags: list[str]
    notes: str
    config: dict[str, Any]
    summary: dict[str, Any]
    history: list[Row]
    received: list[Row]
    dropped: list[Row]
    files: dict[str, bytes]
    sessions: int

    @property
    def rows(self) -> list[Row]:
        """The history in the form of `metrics.jsonl`: `step`, and none of wandb's own keys."""
        return [
            {"step": row["_step"], **{k: v for k, v in row.items() if not k.startswith("_")}}
            for row in self.history
        ]


@dataclass
class _Stored:
    id: str
    project: str
    entity: str
    group: str | None = None
    name: str = ""
    state: str = "running"
    exit_code: int | None = None
    preempting: bool = False
    tags: list[str] = field(default_factory=list)
    notes: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    received: list[Row] = field(default_factory=list)
    dropped: list[Row] = field(default_factory=list)
    seen: set[tuple[int, str]] = field(default_factory=set)
    events: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    sessions: int = 0

    def add_history(self, offset: int, lines: Sequence[str]) -> None:
        for index, line in enumerate(lines, offset):
            if (index, line) in self.seen:
                continue  # sent again, since the answer did not come in time
            self.seen.add((index, line))
            row = json.loads(line)
            self.received.append(row)
            if self.lines and row["_step"] <= json.loads(self.lines[-1])["_step"]:
                self.dropped.append(row)
            else:
                self.lines.append(line)


class Backend:
    """The server, and what a test does to it.

    Attributes:
        delay_s: How long every answer takes.
        fail_with: A status code that every request is answered with, or None.
        failed: How many requests were answered so.
        refuse_with: A status code and a text that every start of a session is answered with.
        refuse_only: The id of the one run that it is for; None for all.
        files_at: Where the client is sent with its files.
        entity: Whose account the key is of.
        requests: The names of the GraphQL operations, "file_stream" and "PUT name", in order.
    """

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.fail_with: int | None = None
        self.failed = 0
        self.refuse_with: tuple[int, str] | None = None
        self.refuse_only: str | None = None
        self.entity = ENTITY
        self.requests: list[str] = []
        self._runs: dict[str, _Stored] = {}
        self._resuming: set[str] = set()
        self._deleted: dict[str, _Stored] = {}
        self._lock = threading.RLock()
        self._open: set[socket.socket] = set()
        self._answer_now = threading.Event()
        self._server: ThreadingHTTPServer | None = None
        self._port = 0
        self.come_back()
        self.files_at = self.url

    @property
    def url(self) -> str:
        """What WANDB_BASE_URL has to be."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables that make the real client talk to this server."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}

    def run(self, run_id: str) -> RunOnServer:
        """A run as it is now; KeyError if the server has never heard of it."""
        with self._lock:
            stored = self._runs[run_id]
            return RunOnServer(
                id=stored.id,
                project=stored.project,
                entity=stored.entity,
                group=stored.group,
                name=stored.name,
                state=stored.state,
                exit_code=stored.exit_code,
                preempting=stored.preempting,
                tags=list(stored.tags),
                notes=stored.notes,
                config={k: v["value"] for k, v in stored.config.items() if k != "_wandb"},
                summary={k: v for k, v in stored.summary.items() if not k.startswith("_")},
                history=[json.loads(line) for line in stored.lines],
                received=list(stored.received),
                dropped=list(stored.dropped),
                files=dict(stored.files),
                sessions=stored.sessions,
            )

    def runs(self) -> list[str]:
        """The ids of all runs."""
        with self._lock:
            return list(self._runs)

    def edit(self, run_id: str, **fields: Any) -> None:
        """What a person does in the web page, to `tags`, `notes`, `name` or `group`."""
        with self._lock:
            vars(self._runs[run_id]).update(fields)

    def delete(self, run_id: str) -> None:
        """What a person does in the web page: its id is refused from then on."""
        with self._lock:
            self._deleted[run_id] = self._runs.pop(run_id)

    def undelete(self, run_id: str) -> None:
        """What a person does there within seven days."""
        with self._lock:
            self._runs[run_id] = self._deleted.pop(run_id)

    def go_down(self) -> None:
        """Stop listening and cut every connection: from now on they are refused."""
        server, self._server = self._server, None
        if server is None:
            return
        self._answer_now.set()
        server.shutdown()
        server.server_close()
        with self._lock:
            for connection in self._open:
                _cut(connection)
            self._open.clear()

    def come_back(self) -> None:
        """Listen again, at the same address and with all that there was."""
        self._answer_now.clear()
        self._server = _Server(("127.0.0.1", self._port), self._handler())
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        backend = self

        class Handler(_Handler):
            def setup(self) -> None:
                super().setup()
                with backend._lock:
                    backend._open.add(self.connection)

            def finish(self) -> None:
                with backend._lock:
                    backend._open.discard(self.connection)
                super().finish()

            def handle_request(self, body: bytes) -> tuple[int, Any]:
                return backend._answer(self.command, self.path, dict(self.headers), body)

        return Handler

    def _answer(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[int, Any]:
        self._answer_now.wait(self.delay_s)
        if path.startswith("/sdk/otel"):
            return 200, {}  # the client's reports on itself
        if self.fail_with is not None:
            self.failed += 1
            return self.fail_with, {"errors": [{"message": "the server fails as it was told to"}]}
        if method == "PUT":  # a signed address needs no key
            return self._put(path, body)
        if headers.get("Authorization") != _basic(KEY):
            return 401, {"errors": [{"message": "user is not logged in"}]}
        asked = json.loads(body)
        if found := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", path):
            self.requests.append("file_stream")
            return self._file_stream(found.group(1), asked)
        operation = _operation(asked["query"])
        self.requests.append(operation)
        variables = asked.get("variables") or {}
        if operation == "UpsertBucket" and (refused := self._refused(variables)):
            code, said = refused
            return code, {"errors": [{"message": said}]}
        return 200, {"data": self._graphql(operation, variables)}

    def _refused(self, asked: Mapping[str, Any]) -> tuple[int, str] | None:
        run_id = asked["name"] or asked["id"]
        if run_id in self._deleted:
            where = f"{asked.get('entity') or ENTITY}/{asked['project']}/{run_id}"
            return 409, f"run {where} was previously created and deleted; try a new run name"
        return self.refuse_with if self.refuse_only in (None, run_id) else None

    def _graphql(self, operation: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        with self._lock:
            match operation:
                case "Viewer" | "GetDefaultEntity":
                    who = {"entity": self.entity, "username": self.entity}
                    viewer = {"id": "U", **who, "flags": "{}"}
                    return {"viewer": {**viewer, "email": "", "teams": {"edges": []}}}
                case "ServerFeaturesQuery":
                    return {"serverInfo": {"features": []}}
                case "RunResumeStatus":
                    return {"model": self._resume_status(asked)}
                case "Run" | "RunHistoryKeys":  # of wandb.Api
                    return {"project": {"run": self._shown_by_api(asked)}}
                case "UpsertBucket":
                    return {"upsertBucket": self._upsert(asked)}
                case "CreateRunFiles":
                    files = [
                        {"name": name, "uploadUrl": f"{self.files_at}/put/{asked['run']}/{name}"}
                        for name in asked["files"]
                    ]
                    answer = {"runID": asked["run"], "uploadHeaders": [], "files": files}
                    return {"createRunFiles": answer}
        return {}

    def _resume_status(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        project = _project(asked["project"], asked.get("entity"))
        stored = self._runs.get(asked["name"])
        if stored is None:
            return {**project, "bucket": None}
        self._resuming.add(stored.id)
        own = stored.config.get("_wandb", {}).get("value", {})
        bucket = {
            "id": stored.id,
            "name": stored.id,
            "displayName": stored.name,
            "summaryMetrics": json.dumps(stored.summary),
            "logLineCount": 0,
            "historyLineCount": len(stored.lines),
            "eventsLineCount": len(stored.events),
            "historyTail": json.dumps(stored.lines[-1:]),
            "eventsTail": json.dumps(stored.events[-1:]),
            "config": json.dumps(stored.config),
            "tags": stored.tags,
            "notes": stored.notes,
            "wandbConfig": json.dumps({"t": own.get("t", 1)}),
        }
        return {**project, "bucket": bucket}

    def _shown_by_api(self, asked: Mapping[str, Any]) -> dict[str, Any] | None:
        stored = self._runs.get(asked["name"])
        if stored is None or stored.entity != asked["entity"]:
            return None
        last = json.loads(stored.lines[-1])["_step"] if stored.lines else -1
        return {
            "id": stored.id,
            "projectId": "1",
            "name": stored.id,
            "displayName": stored.name,
            "state": stored.state,
            "tags": stored.tags,
            "notes": stored.notes,
            "config": json.dumps(stored.config),
            "summaryMetrics": json.dumps(stored.summary),
            "historyLineCount": len(stored.lines),
            "historyKeys": {"lastStep": last},
        }

    def _upsert(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        run_id = asked["name"] or asked["id"]
        inserted = run_id not in self._runs
        entity = asked.get("entity") or self.entity
        stored = self._runs.setdefault(run_id, _Stored(run_id, asked["project"], entity))
        if inserted or run_id in self._resuming:  # else a session says more of itself
            self._resuming.discard(run_id)
            stored.sessions += 1
            stored.state, stored.exit_code, stored.preempting = "running", None, False
        stored.group = asked.get("groupName") or stored.group
        stored.name = asked.get("displayName") or stored.name
        if asked.get("tags") is not None:
            stored.tags = list(asked["tags"])
        if asked.get("notes") is not None:
            stored.notes = asked["notes"]
        if asked.get("config"):
            stored.config |= json.loads(asked["config"])
        if asked.get("summaryMetrics"):
            stored.summary = json.loads(asked["summaryMetrics"])
        bucket = {
            "id": run_id,
            "name": run_id,
            "displayName": stored.name,
            "description": None,
            "config": json.dumps(stored.config),
            "sweepName": None,
            "historyLineCount": len(stored.lines),
            "project": _project(stored.project, stored.entity),
        }
        return {"bucket": bucket, "inserted": inserted}

    def _file_stream(self, run_id: str, sent: Mapping[str, Any]) -> tuple[int, Any]:
        with self._lock:
            stored = self._runs.get(run_id)
            if stored is None:
                return 404, {"error": f"no run {run_id}"}
            for name, chunk in sent.get("files", {}).items():
                match name:
                    case "wandb-history.jsonl":
                        stored.add_history(chunk["offset"], chunk["content"])
                    case "wandb-events.jsonl":
                        stored.events[chunk["offset"] :] = chunk["content"]
                    case "wandb-summary.json":
                        stored.summary = json.loads(chunk["content"][-1])
            if sent.get("preempting"):
                stored.preempting, stored.state = True, "preempting"
            if sent.get("complete"):
                stored.exit_code = sent["exitcode"]
                stored.state = _end_state(stored.exit_code, stored.preempting)
        return 200, {}

    def _put(self, path: str, body: bytes) -> tuple[int, Any]:
        _, _, run_id, name = path.split("/", 3)
        self.requests.append(f"PUT {name}")
        with self._lock:
            self._runs[run_id].files[name] = body
        return 200, {}


class _Server(ThreadingHTTPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed, or a connection that a test has cut."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing of each request."""

    def handle_request(self, body: bytes) -> tuple[int, Any]:
        raise NotImplementedError

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        code, answer = self.handle_request(body)
        content = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = _handle


def _operation(query: str) -> str:
    found = re.search(r"(?:query|mutation)\s+(\w+)", query)
    return found.group(1) if found else ""


def _project(name: str, entity: str | None) -> dict[str, Any]:
    return {"id": "P", "name": name, "entity": {"id": "E", "name": entity or ENTITY}}


def _basic(key: str) -> str:
    return "Basic " + base64.b64encode(f"api:{key}".encode()).decode()


def _end_state(exit_code: int, preempting: bool) -> str:
    if exit_code == 0:
        return "finished"
    return "preempted" if preempting else "failed"


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed by the other side already
        connection.shutdown(socket.SHUT_RDWR)
