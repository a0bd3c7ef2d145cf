"""A run's folder: every path in it, its config, and who may change them."""

import contextlib
import functools
import glob
import logging
import os
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flowjobs.config import (
    BUILT_IN_ARCHS,
    DATA_FIELDS,
    NOT_IN_SIGNATURE,
    PINNED,
    PLACE_FIELDS,
    RunConfig,
    SlurmConfig,
    TrainingConfig,
    config_to_dict,
    fault_of_text,
    run_config_from_dict,
    signature_differences,
    signature_of,
)
from flowjobs.errors import (
    CheckpointGoneError,
    ConfigError,
    DataError,
    RunMismatchError,
    RunNotFoundError,
    SubmissionUnknownError,
)
from flowjobs.field_values import flag
from flowjobs.from_json import from_json
from flowjobs.nearest import meant
from flowjobs.runs.data_file import DataContent
from flowjobs.runs.datasets import content_of_data, differences, same_file
from flowjobs.runs.extending import explain_extension
from flowjobs.runs.file_lock import locked
from flowjobs.runs.files import read_json, replaced_whole, write_json
from flowjobs.runs.metrics import METRICS_FILE, best_step, latest_values
from flowjobs.runs.run_id import (
    NOTHING,
    Inherited,
    give_identity,
    inherited,
    read_identity,
    settled_identity,
)
from flowjobs.runs.status import AttemptRecord, RunStatus, now, read_status
from flowjobs.runs.submittable import SUBMIT_LOCK, Submission, Submittable

logger = logging.getLogger(__name__)

CONFIG_WAIT_S = 60.0
SUBMIT_AGAIN = "submit the run again with the options that it had"
# What a folder is called that is being removed, before its name.
REMOVED = ".removed-"


@dataclass(frozen=True)
class Run(Submittable):
    """One run of a study. Holds two names; everything else is on disk."""

    @functools.cached_property  # asked for twenty times in a submission
    def folder(self) -> Path:
        """`STUDY/runs/NAME`."""
        return self.study / "runs" / self.name

    @property
    def config_file(self) -> Path:
        """What the run was asked to do."""
        return self.folder / "config.json"

    @property
    def status_file(self) -> Path:
        """What it is doing."""
        return self.folder / "status.json"

    @property
    def metrics_file(self) -> Path:
        """A row a logged step."""
        return self.folder / METRICS_FILE

    @property
    def data_file(self) -> Path:
        """What its data are, by content; from its first attempt on."""
        return self.folder / "data.json"

    @property
    def code_file(self) -> Path:
        """Which code it keeps; see `runs.code`."""
        return self.folder / "code.json"

    @property
    def code_diff_file(self) -> Path:
        """What git's commit lacked when that was taken."""
        return self.folder / "code.diff"

    @property
    def tracking_file(self) -> Path:
        """The newest session in W&B; see `tracking.record`."""
        return self.folder / "tracking.json"

    @property
    def wandb_folder(self) -> Path:
        """W&B's own files, and beside them what W&B has of the run: the files below."""
        return self.folder / "wandb"

    @property
    def wandb_page_file(self) -> Path:
        """The address of its page in W&B, once a server has been told of it."""
        return self.wandb_folder / "page.txt"

    @property
    def on_record_file(self) -> Path:
        """What W&B, or the folders that are for it, have; see `tracking.record`."""
        return self.wandb_folder / "on_record.json"

    @property
    def row_times_file(self) -> Path:
        """When each row was written, which `metrics.jsonl`, the same in all runs, cannot say."""
        return self.wandb_folder / "times.jsonl"

    @property
    def surroundings_file(self) -> Path:
        """With what code and where the newest attempt trained; see `runs.surroundings`."""
        return self.wandb_folder / "surroundings.json"

    @property
    def mirror_log(self) -> Path:
        """What the processes that mirror the run, and wandb, have to say."""
        return self.wandb_folder / "mirror.log"

    def rank_file(self, start: str, rank: int) -> Path:
        """How a rank of a job failed; see `runs.rank_failures`."""
        return self.logs / f"{start}-rank{rank}.json"

    def rank_files(self, start: str) -> list[Path]:
        """Those files that are there."""
        return sorted(self.logs.glob(f"{start}-rank*.json"))

    @property
    def cancel_file(self) -> Path:
        """There while the run is cancelled."""
        return self.folder / "cancelled.json"

    @property
    def samples_picture(self) -> Path:
        """Samples of the best checkpoint, drawn when the run finishes."""
        return self.folder / "samples.png"

    @property
    def evaluation_file(self) -> Path:
        """The measures of the samples; see `evaluation.evaluate`."""
        return self.folder / "evaluation.json"

    def is_outdated(self, evaluation: Mapping[str, Any]) -> bool:
        """Whether an evaluation is of weights that the run had before it was trained on."""
        step = evaluation.get("step")
        if step is None:
            return False
        best = best_step(self.metrics_file)
        return best is not None and best != step

    @property
    def checkpoints(self) -> Path:
        """The folder of the weights, which may be a link to scratch."""
        return self.study / "checkpoints" / self.name

    @property
    def best(self) -> Path:
        """The checkpoint of the best validation loss."""
        return self.checkpoints / "best.pt"

    @property
    def last(self) -> Path:
        """The checkpoint that a start resumes from."""
        return self.checkpoints / "last.pt"

    def exists(self) -> bool:
        """Whether a run of this name was ever created."""
        return self.config_file.exists()

    def config(self) -> RunConfig:
        """The config on disk.

        Raises:
            RunNotFoundError: There is no such run; the text names those that are called nearly so.
            ConfigError: The file does not hold a config.
        """
        found = self.read_config_file()
        try:
            return run_config_from_dict(found)
        except ConfigError as error:
            raise ConfigError(f"{self.config_file}: {error}") from error

    def asked(self) -> SlurmConfig:
        """See `Submittable`; raises as `config` does."""
        return self.config().slurm

    def starts_of(self, job_id: str) -> int:
        """See `Submittable`: its attempts that have ended."""
        # That of this start may be open already, by the first of its ranks.
        ended = [attempt for attempt in self.status().attempts if attempt.ended is not None]
        return sum(attempt.job.job_id == job_id for attempt in ended)

    def submissions(self) -> list[Submission]:
        """See `Submittable`; a copy leaves out the original's jobs, which are not its to cancel."""
        entries = super().submissions()
        return entries[inherited(self.folder).jobs :] if entries else entries

    def is_anothers(self, attempt: AttemptRecord) -> bool:
        """Whether an attempt is that of the run that this one is a copy of."""
        return attempt.number <= inherited(self.folder).attempts

    def tracking_id(self) -> str:
        """The id of the run in W&B, the same for all its attempts. Writes nothing.

        Raises:
            ConfigError: It has none: no attempt could be tracked.
        """
        identity = read_identity(self.folder)
        if identity is None:
            raise ConfigError(f"{self.folder / 'run.json'} is missing: submit {self.name} again")
        return identity.id

    def ensure_tracking_id(self) -> str:
        """The id in W&B; a run that is a copy of another, or has none, gets a new one first.

        Raises:
            ConfigError: `run.json` is damaged.
        """
        with self._config_lock():
            identity = settled_identity(self.folder, self._there)
            return (identity or give_identity(self.folder)).id

    def renew_tracking_id(self) -> None:
        """Be another run in W&B from now on."""
        with self._config_lock():
            identity = read_identity(self.folder)
            give_identity(self.folder, inherited=identity.inherited if identity else NOTHING)

    def _there(self) -> Inherited:
        """All jobs and attempts in the run's folder, whosever they are."""
        return Inherited(len(super().submissions()), len(self.status().attempts))

    def status(self) -> RunStatus:
        """The status on disk; before the first attempt, that of a new run."""
        return read_status(self.status_file)

    def steps_trained(self) -> int:
        """The most steps that the run's record knows of, whether or not they were saved."""
        steps = [attempt.last_step or 0 for attempt in self.status().attempts]
        return max(int(latest_values(self.metrics_file).get("step", 0)), *steps, 0)

    def saved_files(self) -> list[Path]:
        """The checkpoints that there are and that a start may resume from, the newest first."""
        names = ("last.pt", "last.previous.pt", "best.pt", "best.previous.pt")
        return [path for name in names if os.path.lexists(path := self.checkpoints / name)]

    def started(self) -> bool:
        """Whether there is work of the run that another config would make worthless."""
        return self.steps_trained() > 0 or bool(self.saved_files())

    def finished(self, asked: TrainingConfig | None = None) -> bool:
        """Whether the run has done all that `asked`, by default its config, asks for."""
        status = self.status()
        if status.state != "finished":
            return False
        asked = asked or self.config().training
        return has_done(status, asked.epochs, asked.patience)

    def check_files(self, asked: TrainingConfig | None = None) -> None:
        """Raise if a checkpoint that the run needs is gone.

        Args:
            asked: How long the run is to be; default: as its config says.

        Raises:
            CheckpointGoneError: It is finished without a best.pt, or it had steps and nothing of
                them is left to resume from.
        """
        left = [file.name for file in self.saved_files()]
        there = f"of its checkpoints only {', '.join(left)} is" if left else "no checkpoint is"
        removal = shlex.join(["rm", "-r", str(self.folder), str(self.checkpoints)])
        moved = None if left else self._moved_by_rm()
        if moved and (self.finished(asked) or self.steps_trained() > 0):
            back = shlex.join(["mv", "-T", str(moved), str(self.checkpoints)])
            raise CheckpointGoneError(
                f"a `flowjobs rm {self.name}` was interrupted, and its checkpoints are in {moved}: "
                f"repeat it, or move them back: {back}"
            )
        if self.finished(asked):
            if not self.best.exists():
                raise CheckpointGoneError(
                    f"{self.name} is finished, but {self.best} is gone; {there} there. Restore it "
                    f"(of a backup), or remove the run to train it again: {removal}"
                )
        elif not left and (steps := self.steps_trained()) > 0:
            raise CheckpointGoneError(
                f"{self.name} has trained {steps} steps, and of its checkpoints in "
                f"{self.checkpoints} none is left: neither last.pt nor best.pt, nor the ones "
                "before them. It does not start again from nothing by itself: restore last.pt or "
                "best.pt there (of a backup, or one that was set aside), or remove the run to "
                f"begin anew: {removal}"
            )

    def check_model(self, asked: TrainingConfig) -> None:
        """Raise a RunMismatchError if it was trained in Python with another model than `--arch`."""
        model = self.status().model
        # One of the user's own may be its script's, under another name.
        if model and self.started() and asked.arch_path in BUILT_IN_ARCHS:
            raise RunMismatchError(
                f"{self.name} was trained in Python with {model}, and a job would build --arch "
                f"{asked.arch}: train it on in Python, FlowTrainer(…, name={self.name!r}), or give "
                "the run of a job another --name"
            )

    def _moved_by_rm(self) -> Path | None:
        """Its checkpoints, where a removal was killed between them and the record."""
        mark = f"{REMOVED}{self.name}-"
        found = self.checkpoints.parent.glob(f"{glob.escape(mark)}*")
        # One that was killed later has moved the record too.
        left = [path for path in found if not self.folder.with_name(path.name).exists()]
        return next((path for path in left if "-" not in path.name.removeprefix(mark)), None)

    def cancel_requested(self) -> bool:
        """Whether the user has cancelled the run and not submitted it since."""
        try:
            # Opened, not looked at: NFS remembers for a while whether a file is there.
            self.cancel_file.open("rb").close()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def cancelled_at(self) -> float | None:
        """When the run was cancelled, in seconds of the epoch; None if it is not."""
        if not self.cancel_requested():
            return None
        return self.cancel_file.stat().st_mtime

    def request_cancel(self) -> None:
        """Note that the run must not be restarted by itself."""
        write_json(self.cancel_file, {"time": now()})

    def clear_cancel(self) -> None:
        """Remove the cancel mark: the run was submitted again."""
        self.cancel_file.unlink(missing_ok=True)

    def create(
        self,
        config: RunConfig,
        *,
        in_use: bool = False,
        flush: bool = True,
        data_are_given: bool = False,
    ) -> str:
        """Make the run's folder and config, or check that it is the same run.

        What does not change the result (the partition, the time limit, the W&B mode) is taken
        over from `config`; so is a larger number of epochs. A run that has not trained a step
        takes over all of it: a mistyped flag does not take the name for good.

        Args:
            config: What is asked for.
            in_use: Whether a job of the run waits or runs, so that its config must stay.
            flush: Wait for the disk; whoever makes many runs does that once, with `flush_files`.
            data_are_given: See `merge`.

        Returns:
            Notes to print, or "": that the run is extended, say.

        Raises:
            RunMismatchError: A run of this name has another signature.
            ConfigError: The folder cannot be made, or not be called so.
        """
        check_run_name(self.name)
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            check_links(Path(error.filename))
            text = f"--study {self.study}: {error.strerror}: {error.filename}"
            raise ConfigError(text) from error
        # Ranks and sweeps create the same run at once.
        with self._config_lock():
            merged, note = self.merge(config, in_use=in_use, data_are_given=data_are_given)
            if not settled_identity(self.folder, self._there):
                give_identity(self.folder, flush=flush)
            content = config_to_dict(merged)
            about = {"name": self.name, "signature": signature_of(content["training"])}
            write_json(self.config_file, {**about, **content}, flush=flush)
        return note

    def before_submission(self) -> "Before":
        """What a submission changes, to be put back if it is refused."""
        folders = [folder for folder in (self.checkpoints, self.folder) if _is_new(folder)]
        own = (self.config_file, self.cancel_file, self.code_file, self.code_diff_file)
        files = {file: _bytes_of(file) for file in own} if self.folder not in folders else {}
        return Before(self, folders, files, len(self.submissions()))

    def merge(
        self, asked: RunConfig, *, in_use: bool = False, data_are_given: bool = False
    ) -> tuple[RunConfig, str]:
        """What `create` would write, and notes to print. Writes nothing.

        Args:
            asked: What is asked for.
            in_use: Whether a job of the run waits or runs.
            data_are_given: The run's data are not those that the config names: whoever has them
                compares them with what was noted (`take_data`).

        Raises:
            RunMismatchError: A run of this name has another signature.
        """
        if not self.exists():
            return asked, ""
        found = self.config()
        settled = in_use or self.started()
        same = {
            name: there
            for name, there in vars(found.training).items()
            # Equal is not alike: 0 and 0.0, of which the signature differs.
            if (settled and there == getattr(asked.training, name))
            or (name in DATA_FIELDS and same_file(there, getattr(asked.training, name)))
        }
        asked = replace(asked, training=replace(asked.training, **same))
        moved = {
            name: here
            for name in DATA_FIELDS
            if (here := getattr(asked.training, name)) != getattr(found.training, name)
        }
        other = found.training.signature != asked.training.signature
        as_long = all(
            getattr(asked.training, key) == getattr(found.training, key)
            for key in ("epochs", "patience")
        )
        if not settled and (other or moved or not as_long):
            return asked, f"{self.name} had not trained a step; it takes over this config"
        if other:
            raise RunMismatchError(self._differences(found, asked))
        notes = []
        if moved and not data_are_given:
            self._check_same_content(found.training, asked.training, moved)
            notes += [f"the {name} of {self.name} is at {here} now" for name, here in moved.items()]
        elif not (data_are_given or self.finished(asked.training)) and (
            data := content_of_data(asked.training, self.study)
        ):
            self.check_data(data)
        length = replace(
            asked.training,
            epochs=max(found.training.epochs, asked.training.epochs),
            patience=max(found.training.patience, asked.training.patience),
        )
        if note := explain_extension(
            self.name, found.training, length, self.status(), self.metrics_file
        ):
            notes.append(note)
        for key, own in (("epochs", length.epochs), ("patience", length.patience)):
            fewer = getattr(asked.training, key)
            if fewer < own:
                notes.append(f"{self.name} keeps its {key} of {own} (--{key} {fewer} is fewer)")
        tracking = asked.tracking
        if settled:
            kept = {key: getattr(found.tracking, key) for key in PLACE_FIELDS}
            asked_for = {key: getattr(tracking, key) for key in PLACE_FIELDS}
            # Where none is noted, and none has it yet, it is the one of whoever submits it.
            if not (kept["wandb_base_url"] or self.wandb_page_file.exists()):
                kept["wandb_base_url"] = tracking.wandb_base_url
            if any(value not in (None, kept[key]) for key, value in asked_for.items()):
                notes.append(f"{self.name} stays in W&B's {found.tracking.place}")
            tracking = replace(tracking, **kept)
        return replace(asked, training=length, tracking=tracking), "\n".join(notes)

    def check_data(self, now: Mapping[str, DataContent | None]) -> None:
        """Raise unless the data are those that the run has been trained on, as far as is known.

        Args:
            now: The content of each part; None where it is not known.

        Raises:
            DataError: They have changed; the text says how.
        """
        if self.started() and (changed := differences(self.data(), now)):
            raise DataError(
                "\n".join(
                    [
                        f"the data of {self.name} are not those that it has been trained on:",
                        *changed,
                        "restore them, or give the run on these data another --name",
                    ]
                )
            )

    def take_data(self, now: Mapping[str, DataContent]) -> None:
        """Note what the run's data are, at its first attempt; the run must be held.

        Raises:
            DataError: It has been trained on others.
        """
        self.check_data(now)
        if not (self.data() and self.started()):
            parts = {part: asdict(content) for part, content in now.items()}
            self.folder.mkdir(
                parents=True, exist_ok=True
            )  # a trainer may be given a run of its own
            write_json(self.data_file, parts)

    def data(self) -> dict[str, DataContent]:
        """What was noted of the data; of a run that was made before they were, nothing."""
        try:
            found = read_json(self.data_file)
            return {part: from_json(DataContent, content) for part, content in found.items()}
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise ConfigError(
                f"{self.data_file} does not hold what it should: {error}; remove it, and the "
                "data are taken as they are"
            ) from error

    def _check_same_content(
        self, found: TrainingConfig, asked: TrainingConfig, moved: Mapping[str, str]
    ) -> None:
        noted, now = self.data(), content_of_data(asked, self.study)
        changed = differences(noted, now)
        unknown = not noted or None in now.values()
        if changed or unknown:
            text = [f"a run named {self.name} exists on another {' and '.join(moved)}:"]
            text += [
                f"  {flag(name)}: {getattr(found, name)} there, {here} asked for"
                for name, here in moved.items()
            ]
            text += changed
            if unknown and not changed:
                text += ["  whether it holds the same rows cannot be told"]
            text += [f"give this one a name of its own, as --name {self.name}-2"]
            raise RunMismatchError("\n".join(text))

    def _config_lock(self) -> contextlib.AbstractContextManager[None]:
        return locked(
            self.folder / ".config.lock", CONFIG_WAIT_S, f"to write the config of {self.name}"
        )

    def _differences(self, found: RunConfig, asked: RunConfig) -> str:
        old, new = found.training.to_dict(), asked.training.to_dict()
        changed = [key for key in new if new[key] != old[key] and key not in NOT_IN_SIGNATURE]
        lines = signature_differences(old, new)
        plain = [
            # Only the last part of a path: a name cannot hold all of it.
            f"{key}{str(new[key]).rpartition('/')[2].partition(PINNED)[0]}"
            for key in changed
            if not isinstance(new[key], dict)
        ]
        plain += [
            f"{key}{value}"
            for key, value in new["arch_args"].items()
            if old["arch_args"].get(key) != value
        ]
        suffix = "-".join(re.sub(r"[^A-Za-z0-9.]+", "", part) for part in plain) or "2"
        return "\n".join(
            [
                f"a run named {self.name} exists with another config:",
                *lines,
                f"give this one a name of its own (--name {self.name}-{suffix}), "
                "or ask for the values there to resume that run",
            ]
        )

    def read_config_file(self) -> dict[str, Any]:
        """What config.json holds, its fields unchecked.

        Raises:
            RunNotFoundError: There is no such run.
            ConfigError: The file is lost, or holds no JSON object.
        """
        try:
            return read_json(self.config_file)
        except FileNotFoundError:
            check_links(self.folder)
            if self.status_file.exists():
                raise ConfigError(
                    f"{self.config_file} is missing: restore it, or {SUBMIT_AGAIN}"
                ) from None
            names = meant(self.name, run_names(self.study), "runs")
            raise RunNotFoundError(f"no run {self.name} in {self.study}: {names}") from None
        except ValueError as error:
            raise ConfigError(
                f"{self.config_file} holds no JSON object ({error}): restore it, or delete it and "
                f"{SUBMIT_AGAIN}"
            ) from error


def has_done(status: RunStatus, epochs: int, patience: int) -> bool:
    """Whether a run of this status has done all that it is asked for."""
    if status.state != "finished":
        return False
    if status.epoch >= epochs:
        return True
    return (status.epochs or 0) >= epochs and (status.patience or 0) >= patience


@dataclass(frozen=True)
class Before:
    """A run as it was before a submission.

    Attributes:
        run: The run.
        folders: Those of it that there were not.
        files: The content of those that a submission changes; None of one that there was not.
        jobs: How many had been submitted.
    """

    run: Run
    folders: Sequence[Path]
    files: Mapping[Path, bytes | None]
    jobs: int

    def put_back(self) -> None:
        """Make it so again, unless a job has been submitted meanwhile.

        Raises nothing where the disk is full, say: why the submission failed is what the user
        must hear. Each file is then whole, as it was or as it was submitted.
        """
        try:
            if len(self.run.submissions()) != self.jobs:
                return
            for folder in self.folders:
                shutil.rmtree(folder, ignore_errors=True)
            for file, content in self.files.items():
                if content is None:
                    file.unlink(missing_ok=True)
                elif content != _bytes_of(file):
                    with replaced_whole(file) as written:
                        written.write(content)
        except OSError as error:
            logger.warning("%s is not put back as it was: %s", self.run.name, error)


@contextlib.contextmanager
def undone_if_refused(runs: Iterable[Run]) -> Iterator[None]:
    """Leave runs as they were before the block if that fails before a job of them is submitted."""
    before = [run.before_submission() for run in runs]
    try:
        yield
    except SubmissionUnknownError:
        raise  # a job of theirs may start
    except BaseException:
        for each in before:
            each.put_back()
        raise


def _is_new(folder: Path) -> bool:
    """Whether there is no folder, or nothing in it but the lock of whoever submits."""
    try:
        names = os.listdir(folder)
        return bool(names) and all(name.startswith(SUBMIT_LOCK) for name in names)
    except FileNotFoundError:
        return True
    except OSError:
        return False  # as far as is known


def _bytes_of(file: Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None


def run_names(study: Path) -> list[str]:
    """The names of the runs in a study, sorted; also of those whose config.json is lost, and of
    folders in which nobody can look now (another's, a file server that is away): they may be runs.
    """
    return [name for name in folder_names(study / "runs") if may_be_run(study / "runs" / name)]


def folder_names(runs: Path) -> list[str]:
    """What is in the folder of a study's runs, sorted, run or not.

    What begins with a dot is being removed.

    Raises:
        ConfigError: It is behind a link that leads nowhere now, so that it is unknown.
    """
    try:
        return sorted(entry.name for entry in os.scandir(runs) if not entry.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        check_links(runs)
        return []


def leads_nowhere(path: Path) -> bool:
    """Whether a path is a link to what is not there: on a scratch that was purged, say."""
    return os.path.islink(path) and not os.path.exists(path)


def check_links(path: Path) -> None:
    """Raise a ConfigError that names the link if a path is one that leads nowhere, or behind it."""
    for link in (path, *path.parents):
        if leads_nowhere(link):
            there = os.path.realpath(link)
            raise ConfigError(
                f"{link} is a link to {there}, which is not there: if it was removed, make it anew "
                f"(mkdir -p {shlex.quote(there)}); if it is not mounted here, go to where it is"
            )


def check_is_file(option: str, path: Path) -> None:
    """Raise a ConfigError for a folder, and for a pipe: reading it may wait for ever, and writing
    would replace it."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"{option} {path}: found no file, expected the path of one")


def may_be_run(folder: Path) -> bool:
    """Whether a folder is a run's, or cannot be looked into now."""
    for name in ("config.json", "status.json"):
        try:
            os.stat(f"{folder}/{name}")
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            pass
        return True
    return leads_nowhere(folder)


def absolute(path: Path) -> Path:
    """The path from the root, without `~` and `..`; links keep their names.

    Raises:
        ConfigError: It cannot be used, in batch scripts least of all.
    """
    try:
        path = path.expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError(f"{path}: {error} give the path from the root") from error
    # Also where the working directory is called so: a job would fail there, hours later.
    if fault := fault_of_text(str(path)):
        raise ConfigError(f"{str(path)!r}: found {fault}, expected a path without")
    return path.resolve() if ".." in path.parts else path


def default_study() -> Path:
    """`$FLOWJOBS_STUDY`, else `study` in the working directory; not made absolute."""
    return Path(os.environ.get("FLOWJOBS_STUDY") or "study")


def check_run_name(name: str) -> None:
    """Raise a ConfigError unless `name` can be a folder, a job name and a W&B name."""
    # In Python it may be anything.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name if isinstance(name, str) else ""):
        raise ConfigError(
            f"--name: found {name!r}, expected at most 100 letters, digits, '.', '_' or '-', "
            "beginning with a letter or digit"
        )
