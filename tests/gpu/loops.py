"""Training loops that say how fast they are on a GPU, each when it is asked.

`python -m tests.gpu.loops LOOP CONFIG STUDY` trains without an end. It prints "ready" when it is
warm, and then for each line of its input, a number of seconds, trains for so long and prints how
fast it was, as JSON. In between it waits, and the GPU is another's. So several are there at once
and are timed one after the other; what a start takes, a capture among it, is not timed.

Not in turns of a second, as on a CPU (`tests.bench.ratios`): a GPU works on when a process is
stopped, and is the same at each second.
"""

import copy
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO
from unittest import mock

import torch
from torch import nn

from flowjobs.config import RunConfig, TrackingConfig, TrainingConfig, WandbMode
from flowjobs.data.dataset import load_datasets
from flowjobs.models.build import build_model
from flowjobs.runs.recorder import recording
from flowjobs.runs.run import Run
from flowjobs.runs.status import JobInfo
from flowjobs.tracking.tracker import tracked
from flowjobs.training import saving
from flowjobs.training.saving import CheckpointSaver
from flowjobs.training.trainer import Trainer
from tests.bench.loops import (
    DECAY,
    DEVICE,
    Watch,
    dataloader_loop,
    flow_loss,
    lightning_loop,
    normalized_rows,
    tuned_loop,
)

WARM_UP_S, WARM_UP_STEPS = 2.0, 150
# Until the GPU's clock is up again, after it has waited.
LEAD_IN_S = 0.2
# Of a second part, in which our trainer's steps are timed without the validations between them.
ALONE_S = 0.4
# Steps that a loop may be ahead of the GPU: of slow ones, hundreds would take seconds to end.
AHEAD = 16


class MeasuredError(Exception):
    """Nothing more is asked for: the loop is left."""


def now() -> float:
    """The time at which the GPU has done all that it was asked for."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Turns(Watch):
    """Counts the steps of a loop while it is timed, and waits where it is not.

    Args:
        rows: Of a step.
        steps_per_epoch: Where given, `at` is called instead of `stepped`, and the steps between
            two validations are timed as well.
        answers: Where they go.

    Attributes:
        waited_s: How long it has waited so far.
    """

    def __init__(self, rows: int, answers: TextIO, steps_per_epoch: int | None = None) -> None:
        self._rows, self._answers = rows, answers
        self._steps_per_epoch = steps_per_epoch
        self.waited_s = 0.0
        self._steps = 0
        self._turns = self._taken()
        self._until = 0.0
        self._earlier = torch.cuda.Event() if DEVICE.type == "cuda" else None
        self._since: float | None = None
        self._alone, self._alone_s, self._alone_steps = False, 0.0, 0

    def stepped(self) -> None:
        """After each step."""
        self._steps += 1
        if self._earlier is not None and self._steps % AHEAD == 0:
            self._earlier.synchronize()
            self._earlier.record()
        if time.perf_counter() >= self._until:
            self._until = next(self._turns)

    def at(self, step: int) -> None:
        """After each step of our trainer, and again while it validates."""
        assert self._steps_per_epoch is not None
        if step != self._steps:
            self.stepped()
        place = step % self._steps_per_epoch
        if self._alone and place == 0:
            self._since = now()
        elif self._alone and place == self._steps_per_epoch - 1 and self._since is not None:
            self._alone_s += now() - self._since
            self._alone_steps += place
            self._since = None

    def _taken(self) -> Iterator[float]:
        """Yields until when to train."""
        yield time.perf_counter() + WARM_UP_S
        while self._steps < max(WARM_UP_STEPS, 2 * (self._steps_per_epoch or 0) + 1):
            yield 0.0
        now()
        self._answer("ready")
        while seconds := self._asked():
            yield time.perf_counter() + LEAD_IN_S
            began, before = now(), self._steps
            yield began + float(seconds)
            samples = (self._steps - before) * self._rows
            answer: dict[str, float | None]
            answer = {"samples_per_s": samples / (now() - began), "alone": None}
            if self._steps_per_epoch:
                self._alone, self._alone_s, self._alone_steps, self._since = True, 0.0, 0, None
                yield time.perf_counter() + ALONE_S
                self._alone = False
                if self._alone_steps:
                    answer["alone"] = self._alone_steps * self._rows / self._alone_s
            self._answer(json.dumps(answer))
        raise MeasuredError

    def _asked(self) -> str:
        began = time.monotonic()
        line = sys.stdin.readline()
        self.waited_s += time.monotonic() - began
        return line

    def _answer(self, line: str) -> None:
        print(line, file=self._answers, flush=True)


def trainer_loop(
    config: TrainingConfig,
    study: Path,
    answers: TextIO,
    *,
    wandb: WandbMode = "disabled",
    saves: bool = True,
) -> None:
    """Our trainer with all that it does: record, progress, validation, checkpoints."""
    run = Run(study, "bench")
    for folder in (run.folder, run.checkpoints):
        shutil.rmtree(folder, ignore_errors=True)  # or it would resume
    run.create(RunConfig(config, tracking=TrackingConfig(wandb_mode=wandb)))
    train, val = load_datasets(config.dataset, study)
    turns = Turns(config.batch_size, answers, len(train) // config.batch_size)
    model = build_model(config, train.shape)

    def stop_reason() -> None:
        turns.at(trainer.state.step)

    # When it waits for its turn no time passes for what is saved every so often.
    clock = {**vars(time), "monotonic": lambda: time.monotonic() - turns.waited_s}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(saving, "time", SimpleNamespace(**clock)))
        if not saves:
            for method, result in (("due", False), ("keep_best", None), ("save_and_wait", None)):
                patched = mock.patch.object(CheckpointSaver, method, _returning(result))
                stack.enter_context(patched)
        recorder = stack.enter_context(recording(run, JobInfo.in_foreground(), track=tracked))
        given = {"run": run, "recorder": recorder, "stop_reason": stop_reason}
        trainer = Trainer(model, config, train, val, DEVICE, **given)
        try:
            trainer.train()
        except MeasuredError:
            print(json.dumps({"captured": trainer.captured}), file=answers, flush=True)
            os._exit(0)  # its end is not measured


def _returning(result: object) -> Callable[..., object]:
    return lambda *given, **named: result


def torchcfm_loop(config: TrainingConfig, study: Path, device: torch.device, watch: Watch) -> None:
    """torchcfm's, as its examples have it, but for the rows: they are on the device already."""
    from torchcfm import conditional_flow_matching as cfm

    kinds = {
        "icfm": cfm.ConditionalFlowMatcher,
        "otcfm": cfm.ExactOptimalTransportConditionalFlowMatcher,
    }
    matcher = kinds[config.flow](sigma=config.sigma)
    train, _ = normalized_rows(config, study, device)
    model = build_model(config, train.shape[1]).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
    while True:
        optimizer.zero_grad()
        x_1 = train[torch.randint(len(train), (config.batch_size,), device=device)]
        x_0 = torch.randn_like(x_1)
        t, x_t, u_t = matcher.sample_location_and_conditional_flow(x_0, x_1)
        loss = torch.mean((model(x_t, t) - u_t) ** 2)
        loss.backward()
        optimizer.step()
        watch.stepped()


def replay_loop(config: TrainingConfig, study: Path, device: torch.device, watch: Watch) -> None:
    """The limit: a whole step as one CUDA graph by hand, of the same rows, replayed alone."""
    train, _ = normalized_rows(config, study, device)
    rows = train[: config.batch_size].clone()
    model = build_model(config, train.shape[1]).to(device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    weights, averaged = list(model.parameters()), list(ema.parameters())
    rate = torch.tensor(config.lr, device=device)
    optimizer = torch.optim.AdamW(weights, lr=rate, fused=True, capturable=True)

    def step() -> None:
        loss = flow_loss(model, rows)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, config.grad_clip)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averaged, weights, 1 - DECAY)

    # https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(5):
            optimizer.zero_grad(set_to_none=True)
            step()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)  # so that the gradients are in the graph's memory
    with torch.cuda.graph(graph):
        step()
    before = weights[0].detach().clone()
    graph.replay()
    assert not torch.equal(weights[0], before), "the graph does not train"
    while True:
        graph.replay()
        watch.stepped()


OTHERS = {
    loop.__name__: loop
    for loop in (torchcfm_loop, replay_loop, tuned_loop, dataloader_loop, lightning_loop)
}


def main(loop: str, config: TrainingConfig, study: Path) -> None:
    """Train without an end."""
    # Lightning writes its progress to the standard output.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        logging.basicConfig(level=logging.INFO, stream=sys.stderr)
        match loop:
            case "trainer_loop":
                trainer_loop(config, study, answers)
            case "tracked_loop":
                trainer_loop(config, study, answers, wandb="offline")
            case "unsaved_loop":
                trainer_loop(config, study, answers, saves=False)
            case _:
                try:
                    OTHERS[loop](config, study, DEVICE, Turns(config.batch_size, answers))
                except MeasuredError:
                    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], TrainingConfig(**json.loads(sys.argv[2])), Path(sys.argv[3]))
