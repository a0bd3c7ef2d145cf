"""The training loop: from the newest checkpoint to the last step, or to a request to leave."""

import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from flowjobs.config import TrainingConfig
from flowjobs.data.batches import make_batches
from flowjobs.data.dataset import FlowDataset
from flowjobs.data.randomness import random_numbers_kept, seed_python_and_numpy, seed_step
from flowjobs.errors import (
    CheckpointError,
    CheckpointMismatchError,
    ConfigError,
    RunInterrupted,
    RunTakenOverError,
)
from flowjobs.flows.flow import flow_of
from flowjobs.flows.flow import is_built_in as is_built_in_flow
from flowjobs.flows.pairs import make_pairs, sample_path, sample_times
from flowjobs.models.build import is_built_in
from flowjobs.models.checks import (
    changed,
    check_gradient,
    check_leaves,
    check_new_model,
    check_parameters,
    check_restart,
    check_types_of_ranks,
    check_weights,
    kept_in_evaluation,
    values_of,
)
from flowjobs.models.flops import flops_of_batch, flops_per_sample, parameters_in
from flowjobs.models.velocity import Velocity, checked_velocity, frozen_in_evaluation, input_dtype
from flowjobs.runs.recorder import Recorder
from flowjobs.runs.run import Run
from flowjobs.training.checkpoint import (
    Payload,
    previous_of,
    read_checkpoint,
    read_newest_good,
    sweep_unfinished,
)
from flowjobs.training.compute import computing, computing_as_before
from flowjobs.training.cuda_graph import LONGEST_CALL_S, Graphed
from flowjobs.training.determinism import deterministic_algorithms, set_cublas_workspace
from flowjobs.training.inputs import inputs_of
from flowjobs.training.pinned import initial_weights_file, with_pinned_files
from flowjobs.training.ranks import Leave, Leaving, Ranks, single_process
from flowjobs.training.rows import Logged, Rows
from flowjobs.training.saving import CheckpointSaver
from flowjobs.training.seal import digest_of
from flowjobs.training.snapshot import Snapshot
from flowjobs.training.state import TrainState
from flowjobs.training.validation import Validation

logger = logging.getLogger(__name__)

LOG_EVERY_STEPS = 10


class TrainingResult(TypedDict):
    """What `Trainer.train` returns."""

    epochs_run: int
    final_epoch: int
    steps: int
    best_val_loss: float
    checkpoint_path: str
    time_s: float


class Trainer:
    """Trains one model of one run, which its caller holds.

    Args:
        model: Predicts a velocity: (x: (batch, dim), t: (batch,)) -> (batch, dim). Parts of it that
            are in evaluation mode and hold no weights to train stay so, as a frozen encoder; not
            where all of it is in evaluation mode, as after `flowjobs.load`.
        config: What to train and how.
        train_dataset: The training part.
        val_dataset: The validation part, of the same width.
        device: Where to compute ("cpu", "cuda:1").
        run: The run.
        resume_path: Resume from this checkpoint, of the same config, instead of the run's last.pt.
        recorder: Where rows and progress go.
        ranks: The processes that train together; by default this one alone.
        stop_reason: Asked after each step, on every rank; a text from any of them makes all save
            and leave after the same step.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig,
        train_dataset: FlowDataset,
        val_dataset: FlowDataset,
        device: torch.device | str,
        *,
        run: Run,
        resume_path: str | Path | None = None,
        recorder: Recorder | None = None,
        ranks: Ranks | None = None,
        stop_reason: Callable[[], str | None] = lambda: None,
    ) -> None:
        if config.deterministic:  # what is computed here, as FLOPs are counted, is on the GPU too
            set_cublas_workspace()
        device = torch.device(device)
        before = run.config().training if run.exists() else None
        config = self._config = with_pinned_files(config, run.study, before, data_are_given=True)
        self._device = device
        self._resume_path = Path(resume_path) if resume_path else None
        self._run = run
        self._recorder = recorder
        self._ranks = ranks or single_process(device)
        self._stop_reason = stop_reason
        self._leaving = Leaving(self._ranks)
        self._taken_over: RunTakenOverError | None = None
        self._writes_weights = False
        self._has_validated = False
        self._validates_quickly = False
        self._built_in = is_built_in(model) and is_built_in_flow(config)

        check_weights(model)
        self._stay_in_evaluation = frozen_in_evaluation(model)
        self._flow = flow_of(config)
        inputs = inputs_of(
            config,
            self._flow,
            run.study,
            (train_dataset, val_dataset),
            device,
            self._ranks,
            self._stop_reason,
            self._tell_prepared,
        )
        self._data = inputs.content
        rank, world_size = self._ranks.rank, self._ranks.world_size
        mean, std = inputs.mean, inputs.std
        batches = make_batches(inputs.train, config, rank, world_size, mean, std)
        self._pairs = make_pairs(batches, self._flow, inputs.sources.training, config, rank)
        self._validation = Validation(
            inputs.val, self._flow, inputs.sources.held_out, config, mean, std, self._ranks
        )
        self._steps_per_epoch = batches.steps_per_epoch
        self._rows = self._rows_to(None)
        model.to(device)
        self.state = TrainState(model, config, self._steps_per_epoch, inputs.stats, self._data)
        rows = min(config.batch_size, len(train_dataset)) // world_size
        self._batch_shape = (rows, *train_dataset.shape)
        self._flops_per_sample = flops_per_sample(model, train_dataset.shape)
        self._flops = flops_of_batch(model, rows, self._flops_per_sample)
        self._velocity = self._prepare(self.state.model)
        self._ema_velocity = self._as_velocity(self.state.ema.model)
        self._graphed_update: Graphed | None = None
        self._graphed_validation: Graphed | None = None
        self._was_captured = False

    def train(self) -> TrainingResult:
        """Train to the end, from the newest checkpoint if there is one.

        The default generators of torch, numpy and `random` are left as they were.

        Raises:
            RunInterrupted: `stop_reason` asked to leave; the state is saved.
            RunTakenOverError: Another attempt holds the run now; nothing was saved.
            TrainingDivergedError: The loss or the state is not a number any more.
            CheckpointError: The run cannot resume from what is on disk, or could not be resumed
                from what it would save.
            ConfigError: The model cannot be trained.
        """
        # A script may have moved it since, as to draw samples on a GPU.
        self.state.model.to(self._device)
        with (
            random_numbers_kept(self._device),
            deterministic_algorithms(self._config.deterministic),
            computing(self._ranks, self._flops) as self._compute,
            torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext(),
        ):
            return self._train(self._recorder)

    def _train(
        self, recorder: Recorder | None, model_class: str = "", code: str = ""
    ) -> TrainingResult:
        """Train, and record the model's class, if `--arch` does not name it, and code's digest."""
        run, started = self._run, time.monotonic()
        # Every rank trains, the first one writes.
        saver: CheckpointSaver | None = None
        # The first rank sets damaged files aside before the others look.
        with self._ranks.first_goes_first():
            if self._ranks.is_first:
                run.take_data(self._data)
                saver = self._make_saver(recorder)
            adopted = self._restore()
        self._prepare_graphs()  # of what was restored
        self._rows = self._rows_to(recorder)
        self.state.held = None
        if self.state.step == 0:
            check_new_model(self.state.model)
        compute = computing_as_before(self._compute, self.state.computed_with)
        self.state.computed_with = compute.to_dict()
        if adopted:
            self._adopt(saver)
        first_step, validates_first = self.state.step, self.state.unvalidated is not None
        if recorder:
            parameters = parameters_in(self.state.model)
            recorder.attempt.note_model(model_class, code, parameters, self._flops_per_sample)
            # A step that is not validated yet has no row, or its row comes again.
            recorder.start_at(
                first_step, self.state.extensions, rows_up_to=first_step - validates_first
            )
            self._tell_progress(recorder)
        try:
            reason = self._run_steps(saver, recorder)
            is_new = self.state.step > first_step or validates_first
            if saver and (is_new or not run.last.exists()):
                saver.save_and_wait(self.state.payload())
            if recorder:
                self._tell_progress(recorder)
        except BaseException as error:
            self._close_after(error, saver)
            raise
        finally:
            self._was_captured = self.captured
            self._graphed_update = self._graphed_validation = None  # they keep memory
        if saver:
            saver.close()
        if self._taken_over:
            raise self._taken_over
        if reason:
            raise RunInterrupted(reason, self.state.step)
        return self._result(time.monotonic() - started)

    def _rows_to(self, recorder: Recorder | None) -> Rows:
        says = self._ranks.is_first
        return Rows(self._config, self._steps_per_epoch, recorder, says=says)

    def _close_after(self, error: BaseException, saver: CheckpointSaver | None) -> None:
        try:
            if not isinstance(error, RunTakenOverError):
                with suppress(Exception):  # the error is what is told
                    self._rows.write_late()
        finally:
            if saver:
                saver.close_after_error()

    def _make_saver(self, recorder: Recorder | None) -> CheckpointSaver:
        run = self._run
        for path in (run.best, run.last):
            sweep_unfinished(path)
        every_s = self._config.checkpoint_every_s
        check = self.state.check_before_save
        if recorder is None:
            return CheckpointSaver(run.best, run.last, every_s=every_s, check=check)
        return CheckpointSaver(
            run.best,
            run.last,
            flush_rows=recorder.flush_rows,
            every_s=every_s,
            before_replace=recorder.attempt.check_held,
            check=check,
            saved=recorder.attempt.saved,
        )

    def _run_steps(self, saver: CheckpointSaver | None, recorder: Recorder | None) -> str | None:
        """Train until the run is finished (None), or until asked to leave (the reason)."""
        state = self.state
        state.model.train()  # a notebook may have looked at its samples
        for part in self._stay_in_evaluation:
            part.training = False
        first_step = state.step + 1
        while not state.finished:
            row = state.unvalidated
            if row is None:
                row = self._step()
                state.unvalidated = row if state.at_epoch_end else None

            if state.step == first_step or state.at_epoch_end:
                check_parameters(self._named, state.model)

            if state.step == 1 and not self._built_in:
                self._check_copies()

            if saver and state.step == 1:
                # Before GPU hours are spent, and before any row: what has steps on record has a
                # checkpoint, and one that a restart can resume from. Of a copy, as later ones are.
                saver.save_and_wait(Snapshot.of(state.payload()).payload, state.prove)

            if state.at_epoch_end:
                try:
                    row = row | self._end_epoch(saver)
                except RunInterrupted as interrupted:
                    # What was begun is thrown away, and done again when the run resumes.
                    state.ema.copy_buffers()
                    return interrupted.reason
                if recorder:
                    self._tell_progress(recorder)

            if row:
                is_last = state.finished
                self._rows.take(
                    state.step, row, late=self.captured and not is_last, is_last=is_last
                )

            if saver and saver.due(epoch_finished=state.at_epoch_end):
                self._rows.write_late()
                saver.save(state.payload())

            if not state.finished and (reason := self._agreed_to_leave(saver)):
                self._rows.write_late()
                return reason
        self._leaving.wait()
        return None

    def _check_copies(self) -> None:
        """After the first step: whether a restart and the moving average would be as meant."""
        state, device = self.state, self._device
        state.take_extra_state()
        if self._writes_weights:
            check_restart(state.model, state.ema.model, self._batch_shape, device)
        with random_numbers_kept(device), self._arithmetic():
            rows = min(2, self._batch_shape[0])  # a model that is to be compiled may need much
            shape = rows, *self._batch_shape[1:]
            x = torch.randn(shape, device=device, dtype=input_dtype(state.model))
            state.ema.check_copy(state.model, x, torch.rand(len(x), device=device, dtype=x.dtype))

    def _agreed_to_leave(self, saver: CheckpointSaver | None) -> str | None:
        """Why all ranks leave here, where each of them asks; None if they do not."""
        mine = None
        if lost := self._taken_over or (saver and saver.taken_over):
            mine = Leave(str(lost), taken_over=True)
        elif reason := self._stop_reason():
            mine = Leave(reason)
        leave = self._leaving.agreed(mine)
        if leave and leave.taken_over:
            raise RunTakenOverError(leave.reason)
        return leave.reason if leave else None

    def _step(self) -> dict[str, float]:
        """One optimizer step. Returns values to log; empty at most steps."""
        state = self.state
        self._seed()
        learning_rate = state.optimizer.param_groups[0]["lr"]
        inputs = [*self._pairs.at(state.step)]
        if (rates := state.rates()) is not None:
            inputs.append(rates)
        loss, grad_norm = (self._graphed_update or self._update)(*inputs)
        state.end_step()
        self._rows.write_late()

        if state.step % LOG_EVERY_STEPS:
            return {}
        logged = Logged(self._ranks.mean(loss), grad_norm, learning_rate)
        if self.captured and not state.at_epoch_end:
            self._rows.take(state.step, logged, late=True)
            return {}
        return self._rows.finite(state.step, logged.row())

    def _update(
        self, x_0: Tensor, x_1: Tensor, rates: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """From a pair to new weights and their average: the loss and the norm of its gradient.

        Args:
            x_0: The pair's.
            x_1: The pair's.
            rates: See `TrainState.rates`.
        """
        config, state = self._config, self.state
        t = sample_times(len(x_0), config, self._device)
        takes_noise = self._flow.takes_noise and config.sigma > 0
        noise = torch.randn_like(x_0) if takes_noise else None
        x_t, dx_t = sample_path(self._flow, (x_0, x_1), t, config.sigma, noise)

        is_first = state.step == 0 and not self._built_in
        before = values_of(state.model) if is_first else {}
        with self._arithmetic():
            velocity = self._velocity(x_t, t)
        if is_first:
            self._writes_weights = changed(state.model, before) is not None
            state.check_initial_weights()  # forward may have initialized them from this batch
            check_leaves(velocity, state.model)
        check_gradient(velocity, config.arch_label)
        loss = functional.mse_loss(velocity, dx_t)
        # Not the model's, whose order may be another at each start.
        weights = state.optimizer.param_groups[0]["params"]
        for parameter in weights:
            parameter.grad = None  # what zero_grad does, without its profiling hooks
        loss.backward()  # type: ignore[no-untyped-call]
        if is_first:  # each rank's forward may have initialized weights from its own rows
            self._ranks.take_from_first(of.data for of in state.model.parameters())
        grad_norm = nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
        state.update((grad_norm / config.grad_clip).clamp(min=1.0), rates)
        return loss.detach(), grad_norm

    def _seed(self) -> None:
        """Seed what is drawn from here on, by the number of steps that are done."""
        place = self._config.seed, self.state.step, self._ranks.rank
        seed_step(self._device, *place)
        if not self._built_in:
            seed_python_and_numpy(*place)

    def _end_epoch(self, saver: CheckpointSaver | None) -> dict[str, float]:
        """Validate and keep the best. Returns what to log.

        Raises:
            RunInterrupted: The ranks agreed to leave while they validated.
        """

        def check() -> None:
            if reason := self._agreed_to_leave(saver):
                raise RunInterrupted(reason)

        val_loss = self._validation_loss(check)
        # Before such a state could be saved.
        self._rows.finite(self.state.step, {"val/loss": val_loss})
        if self.state.note_val_loss(val_loss) and saver:
            if self.captured:
                self.state.hold_tensors()
            saver.keep_best(self.state.payload(), held=self.state.held is not None)
        return {"val/loss": val_loss, "val/best_loss": self.state.best_loss}

    def _validation_loss(self, check: Callable[[], None] = lambda: None) -> float:
        ema = self.state.ema
        if not self._built_in:  # it may draw also where it is not trained
            self._seed()
        self.state.take_extra_state()
        # Each rank has statistics of its own rows; the first one's are those that are saved.
        self._ranks.take_from_first(ema.statistics())
        # Once in a process: a restart's model may be as little initialized as the first one's.
        look = nullcontext() if self._has_validated else kept_in_evaluation(ema.model)
        # Where steps are not captured, buffers of the average may be new ones at each.
        may_replay = self._validates_quickly and (self.captured or not ema.copies_buffers)
        graphed = self._graphed_validation if may_replay else None
        began = time.monotonic()
        with look:
            (total,) = graphed() if graphed and not graphed.refused else self._validate(check)
        loss = self._validation.mean_of(total)
        # In a replay nobody asks whether to leave.
        self._validates_quickly = time.monotonic() - began < LONGEST_CALL_S
        self._has_validated = True
        return loss

    def _validate(self, check: Callable[[], None] = lambda: None) -> tuple[Tensor, ...]:
        with self._arithmetic():
            return (self._validation.total(self._ema_velocity, check),)

    def _restore(self) -> bool:
        """Take over the newest good checkpoint, or the one that was asked for.

        Returns:
            Whether the state is new to the run's folder and should be saved there.
        """
        run = self._run
        given = None if self._resume_path is None else self._read_given(self._resume_path)
        path, payload = self._newest()
        if given and (payload is None or payload["resumed_from"] != given["resumed_from"]):
            assert self._resume_path is not None
            path, payload = self._resume_path, given
            # Not at each restart: the run may have resumed from it before this was looked at.
            self._check_given(self.state.check_given, given, path)
        if payload is None:
            run.check_files()
            if weights := initial_weights_file(self._config):
                self.state.start_from_weights(read_checkpoint(weights), weights)
                logger.info("Starts from the weights of %s", weights)
            return False
        self.state.restore(payload, path)
        logger.info(
            "Resumed from epoch %d, step %d (%s)", self.state.epochs_finished, self.state.step, path
        )
        there = self._best_there()
        if payload is not given and there > self.state.best_loss:
            logger.warning(
                "%s is gone, of loss %.4f: %s",
                run.best,
                self.state.best_loss,
                "the next epoch's is the best, however much worse, and patience counts from there"
                if math.isinf(there)
                else f"the best is {there:.4f} now, of the one before it",
            )
        # Never remember a better best than the one that is there: it is what the run ends with.
        self.state.best_loss = max(self.state.best_loss, there)
        return payload is given

    def _newest(self) -> tuple[Path, Payload | None]:
        """The run's newest good checkpoint: last.pt, or where that is gone the best one."""
        run, check = self._run, self.state.check
        # Not to the GPU: beside the state that it goes into, it may have no room there.
        if payload := read_newest_good(run.last, check=check):
            return run.last, payload
        payload = read_newest_good(run.best, check=check)
        if payload:
            # As whole a state as any other; the steps after it are repeated with the same bits.
            logger.warning(
                "there is no last.pt: resuming from %s, of step %d; the run had trained %d steps",
                run.best,
                payload["step"],
                run.steps_trained(),
            )
        return run.best, payload

    def _read_given(self, path: Path) -> Payload:
        """The checkpoint that --resume names, if the run can resume from it."""
        payload = read_checkpoint(path)
        self._check_given(self.state.check, payload, path)
        payload["resumed_from"] = digest_of(path)
        return payload

    def _check_given(
        self, check: Callable[[Payload, Path], None], payload: Payload, path: Path
    ) -> None:
        try:
            check(payload, path)
        except CheckpointMismatchError as error:
            raise CheckpointMismatchError(
                f"--resume resumes a run, and {error}\nto start a run of its own from "
                f"these weights, with everything else new: --init-from {path}"
            ) from error

    def _best_there(self) -> float:
        """The loss of the best.pt on disk, which is put back where it is of lost work."""
        run = self._run
        best = read_newest_good(run.best, check=self.state.check)
        if best is None:
            return math.inf
        previous = previous_of(run.best)
        if self._ranks.is_first and not run.best.exists():
            previous.replace(run.best)  # no better one may come
        if best["best_loss"] < self.state.best_loss and previous.exists():
            # Killed between best.pt and last.pt. Steps that are repeated with other bits (another
            # GPU) may never be as good, and the run would report a loss that best.pt has not.
            with suppress(CheckpointError):
                before = read_checkpoint(previous)
                if before["best_loss"] == self.state.best_loss:
                    if self._ranks.is_first:
                        previous.replace(run.best)
                    return float(before["best_loss"])
        return float(best["best_loss"])

    def _adopt(self, saver: CheckpointSaver | None) -> None:
        """Make a state that came from another file the run's own, before the first step."""
        # An epoch that is not validated yet is validated as the steps begin.
        if math.isinf(self.state.best_loss) and self.state.unvalidated is None:
            # No best.pt here yet: as good as this state is the best so far.
            self.state.best_loss = self._validation_loss()
            if saver:
                saver.keep_best(self.state.payload())
        if saver:
            # On disk at once, so that a start without --resume resumes from here too.
            saver.save_and_wait(self.state.payload())

    def _prepare(self, model: nn.Module) -> Velocity:
        """The model as the steps call it, joined to the other ranks'."""
        self._named = dict(model.named_parameters(remove_duplicate=False))
        if self._ranks.world_size > 1:
            # DDP pairs them by their number.
            if not self._ranks.have_same(repr([*self._named])):
                raise ConfigError(
                    f"--arch {self._config.arch_label}: the ranks have its parameters in different "
                    "orders, as where the constructor makes them of a set: let it use a list "
                    "(sorted(…))"
                )
            check_types_of_ranks(model)
            # Looking for unused parameters also keeps DDP from regrouping the gradients after
            # the first step: a resumed run would sum them in another order than a whole one.
            model = DistributedDataParallel(model, find_unused_parameters=True)
        return self._as_velocity(model)

    def _prepare_graphs(self) -> None:
        """Let steps and validations become replays of CUDA graphs."""
        self._was_captured = False
        if not self._config.cuda_graph or self._device.type != "cuda":
            return
        if self._ranks.world_size > 1:
            logger.info("The steps are not captured in a CUDA graph: several ranks share them")
            return
        state, exact = self.state, self._config.deterministic
        calls = (state.model, self._flow)
        self._graphed_update = Graphed(
            "The steps are", self._update, calls, state.changing, exact=exact
        )
        if self._validation.is_kept:
            calls = (state.ema.model, self._flow)
            self._graphed_validation = Graphed(
                "Validation is", self._validate, calls, state.changing, exact=exact
            )

    @property
    def captured(self) -> bool:
        """Whether the steps are replays of a CUDA graph, or were as training ended."""
        if self._graphed_update is None:
            return self._was_captured
        return self._graphed_update.captured

    def _as_velocity(self, model: nn.Module) -> Velocity:
        """The model, compiled if asked, and checked at each call."""
        called: Velocity = torch.compile(model) if self._config.compile else model
        return checked_velocity(called, input_dtype(model), self._config.arch_label)

    def _arithmetic(self) -> AbstractContextManager[Any]:
        if self._config.precision == "bf16":
            return torch.autocast(self._device.type, torch.bfloat16)
        return nullcontext()

    def _tell_prepared(self) -> None:
        if self._recorder:
            with suppress(OSError):  # as for the progress
                self._recorder.attempt.note_pairs_written()

    def _tell_progress(self, recorder: Recorder) -> None:
        state = self.state
        best = state.best_loss if math.isfinite(state.best_loss) else None
        try:
            attempt = recorder.attempt
            attempt.progress(state.step, state.total_steps, state.epochs_finished, best)
        except OSError as error:
            # A full disk, say. What counts is the checkpoint, which says so and is tried again.
            logger.debug("the progress could not be written: %s", error)
        except RunTakenOverError as error:
            self._taken_over = error  # all ranks leave for it at the next boundary

    def _result(self, time_s: float) -> TrainingResult:
        state = self.state
        return TrainingResult(
            epochs_run=state.epochs_finished,
            final_epoch=state.epochs_finished - 1,
            steps=state.step,
            best_val_loss=state.best_loss,
            checkpoint_path=str(self._run.best),
            time_s=time_s,
        )
