"""The trainer as a notebook uses it: it opens its run itself, and W&B mirrors it."""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import nn

from flowjobs.config import RunConfig, TrackingConfig, TrainingConfig, WandbMode
from flowjobs.data.dataset import FlowDataset
from flowjobs.default_logging import default_logging
from flowjobs.errors import (
    CheckpointDamagedError,
    CheckpointMismatchError,
    CheckpointNotFiniteError,
    ConfigError,
    RunBusyError,
    RunMismatchError,
)
from flowjobs.models.build import class_unnamed
from flowjobs.models.code_digest import code_digest, differ
from flowjobs.runs.hint import hint
from flowjobs.runs.lock import lock_holder
from flowjobs.runs.newest_job import job_to_come
from flowjobs.runs.recorder import Recorder, recording
from flowjobs.runs.run import Run, absolute, check_run_name, default_study
from flowjobs.runs.status import JobInfo
from flowjobs.tracking.mode import entity_here, mode_of_settings, mode_of_variable, variables
from flowjobs.tracking.tracker import tracked
from flowjobs.training.checkpoint import read_checkpoint
from flowjobs.training.trained import note_weights, run_of_weights, usable_device
from flowjobs.training.trainer import Trainer, TrainingResult

logger = logging.getLogger(__name__)


class FlowTrainer(Trainer):
    """A `Trainer` that opens the run called `name` itself.

    With the lock, the record and the W&B run that a job's has. It says how far it is through the
    `flowjobs` logger, on stderr where no handler shows it; a level of that logger's own counts.

    Args:
        model: See `Trainer`, as for what is not named here.
        device: Where to compute; "auto" is the GPU where there is one.
        name: Name of the run; by default `config.run_name`.
        wandb_project: Project in W&B.
        wandb_entity: User or team in W&B; by default your own.

    Raises:
        ConfigError: The device cannot be used here, or there can be no run of this name. From
            `train`: the model cannot be trained, W&B would refuse the entity or the group, or a
            new run was given a model that another one has trained.
        RunBusyError: From `train`: another process trains this run, or a job of it waits that has
            not trained yet.
        RunMismatchError: From `train`: the run of this name is of another config, model or data,
            or of other code of the model; its record was not touched.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig,
        train_dataset: FlowDataset,
        val_dataset: FlowDataset,
        device: torch.device | str,
        *,
        name: str | None = None,
        wandb_project: str = TrackingConfig.wandb_project,
        wandb_entity: str | None = None,
        resume_path: str | Path | None = None,
        stop_reason: Callable[[], str | None] = lambda: None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model: found {_kind_of(model)}, expected an nn.Module")
        if not isinstance(config, TrainingConfig):
            raise ConfigError(f"config: found {_kind_of(config)}, expected a TrainingConfig")
        # Once: a notebook may change its working directory before it trains.
        run = Run(absolute(default_study()), name or config.run_name)
        check_run_name(run.name)
        self._asked_tracking = TrackingConfig(wandb_project, wandb_entity)
        super().__init__(
            model,
            config,
            train_dataset,
            val_dataset,
            usable_device(device),
            run=run,
            resume_path=resume_path,
            stop_reason=stop_reason,
        )

    def _train(
        self, recorder: Recorder | None, model_class: str = "", code: str = ""
    ) -> TrainingResult:
        with default_logging():
            model = self.state.model
            digest = code_digest(model)
            self._create_run(digest)
            with recording(self._run, JobInfo.in_foreground(), track=tracked) as own:
                if self._run.cancel_requested():  # since it was cleared, and before it was held
                    raise KeyboardInterrupt
                try:
                    given = class_unnamed(model, self._config)
                    return super()._train(own, given, digest)
                finally:
                    if self.state.step:
                        with suppress(RuntimeError):  # of a GPU, which the error that is told says
                            note_weights(model, self._run)

    def _create_run(self, code: str) -> None:
        """Make the run if it is not there, or check that it is the same one, with this code."""
        run, tracking = self._run, self._tracking()
        asked = RunConfig(self._config, tracking=tracking)
        if run.exists():
            found = run.config()
            # Nothing here asks for another mode, and what was kept out of W&B stays out.
            if tracking.wandb_mode == "auto" and found.tracking.wandb_mode == "disabled":
                tracking = replace(tracking, wandb_mode="disabled")
                logger.info("%s stays out of W&B; WANDB_MODE=online brings it in", run.name)
            # A notebook does not change what the command line asked of the cluster.
            asked = replace(asked, slurm=found.slurm, tracking=tracking, restarts=found.restarts)
            if not run.started() and (job := job_to_come(run)):
                cancel = hint("cancel", run.name, study=run.study)
                raise RunBusyError(
                    f"{run.name} in {run.study} was submitted as {job}, which has not trained yet: "
                    "give this one a name of its own, FlowTrainer(…, name=…), or cancel that one "
                    f"first: {cancel}"
                )
            if difference := self._difference_to(found, code):
                raise RunMismatchError(
                    f"a run named {run.name} exists in {run.study}, and {difference}: give this "
                    "one a name of its own, FlowTrainer(…, name=…)"
                )
        self._check_model_is_new()
        tracking.check_asked(self._config.group)
        in_use = lock_holder(run.folder) is not None
        if note := run.create(asked, in_use=in_use, data_are_given=True):
            logger.info("%s", note)
        if not in_use:  # else the process that was told to stop has not ended yet
            run.clear_cancel()

    def _check_model_is_new(self) -> None:
        """Raise a ConfigError if a new run would start from the weights of another one."""
        run = self._run
        resumes = run.last.exists() or run.best.exists() or self._resume_path
        if resumes or self._config.init_from:
            return
        if other := run_of_weights(self.state.model):
            start = ""
            if other.best.exists():
                start = f", or give TrainingConfig(…, init_from={str(other.best)!r})"
            raise ConfigError(
                f"the model has the weights of the run {other.name}, expected a new one for "
                f"{run.name}: build one for each run{start}"
            )

    def _tracking(self) -> TrackingConfig:
        """As it was asked for; else as W&B's own variables and settings here have it."""
        asked = self._asked_tracking
        mode = mode_of_variable() or mode_of_settings()[0] or asked.wandb_mode
        return replace(
            asked,
            wandb_entity=asked.wandb_entity or entity_here(),
            wandb_base_url=variables().get("WANDB_BASE_URL"),
            wandb_mode=cast(WandbMode, mode),
        )

    def _difference_to(self, found: RunConfig, code: str) -> str | None:
        """How the run on disk differs from this trainer's, checked before it is opened."""
        run = self._run
        if run.started() and found.training.epochs > self._config.epochs:
            return f"has {found.training.epochs} epochs, not {self._config.epochs}"
        is_edited = not self._resume_path and differ(run.status().model_code, code)
        for path in (run.last, run.best):
            try:
                if path.exists():
                    self.state.check(read_checkpoint(path), path)
                    if is_edited:
                        return (
                            f"{path} was trained with other code of "
                            f"{type(self.state.model).__qualname__} than there is now "
                            f"(resume_path={str(path)!r} trains on from it)"
                        )
            except (CheckpointDamagedError, CheckpointNotFiniteError):
                continue  # it is set aside when the run is opened
            except CheckpointMismatchError as error:
                return str(error)
        return None


def _kind_of(given: object) -> str:
    if isinstance(given, type):
        return f"the class {given.__name__}"
    return f"a value of type {type(given).__name__}"
