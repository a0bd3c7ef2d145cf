"""What extending a run does is said before it is done."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flowjobs.config import RunConfig, TrainingConfig
from flowjobs.errors import ConfigError
from flowjobs.runs.attempt import Attempt
from flowjobs.runs.extending import explain_extension, extension_of
from flowjobs.runs.run import Run
from flowjobs.runs.status import JobInfo, RunStatus

SHORT = TrainingConfig(epochs=10, patience=5, warmup_steps=0)


NO_ROWS = Path("metrics.jsonl")


def status(epoch: int, state: str = "finished") -> RunStatus:
    return RunStatus(state, step=epoch * 20, total_steps=200, epoch=epoch, epochs=10, patience=5)  # type: ignore[arg-type]


def test_the_jump_of_the_learning_rate_is_said() -> None:
    said = explain_extension("a", SHORT, TrainingConfig(epochs=20, patience=5), status(10), NO_ROWS)
    assert "from 10 to 20 epochs: at step 200 the learning rate goes from 0 back up to 0.0" in said
    # Half way, with the run still training.
    said = explain_extension(
        "a", SHORT, TrainingConfig(epochs=20, warmup_steps=0), status(5, "preempted"), NO_ROWS
    )
    assert "at step 100 the learning rate goes from 0.0005 back up to 0.000854, since" in said
    assert "raises the patience of a from 5 to 50" in said
    assert explain_extension("a", SHORT, SHORT, status(10), NO_ROWS) == ""


def test_epochs_alone_do_not_extend_what_stopped_early(study: Path) -> None:
    longer = TrainingConfig(epochs=90, patience=5, warmup_steps=0)
    with pytest.raises(ConfigError, match=r"a ran out of patience, .* 6 of 10: .*--patience too"):
        explain_extension("a", SHORT, longer, status(6), NO_ROWS)
    patient = TrainingConfig(epochs=90, patience=9, warmup_steps=0)
    assert "extends a from 10 to 90" in explain_extension("a", SHORT, patient, status(6), NO_ROWS)
    run = Run(study, "a")
    run.create(RunConfig(SHORT))
    run.last.touch()
    status(6).write(run.status_file)
    with pytest.raises(ConfigError, match="ran out of patience"):
        run.create(RunConfig(longer))
    assert run.config().training == SHORT
    assert run.finished()


@pytest.mark.parametrize("state", ["finished", "failed"])  # that, killed before it said so
@pytest.mark.parametrize("last_better", [4, 5])
def test_patience_may_run_out_in_the_last_epoch(study: Path, state: str, last_better: int) -> None:
    run = Run(study, "a")
    run.create(RunConfig(SHORT))
    run.last.touch()
    status(10, state).write(run.status_file)
    # As good as the best is no better.
    losses = [9.0 - epoch for epoch in range(last_better)] + [2.0] * (10 - last_better)
    best = [min(losses[: epoch + 1]) for epoch in range(10)]
    rows = [
        {"step": 20 * (epoch + 1), "val/loss": loss, "val/best_loss": best[epoch]}
        for epoch, loss in enumerate(losses)
    ]
    run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    longer = TrainingConfig(epochs=20, patience=5, warmup_steps=0)
    if last_better == 5:  # four epochs since, of five
        assert "extends a from 10 to 20" in run.create(RunConfig(longer))
        return
    with pytest.raises(ConfigError, match=r"a ran out of patience, .* 10 of 10: .*--patience too"):
        run.create(RunConfig(longer))
    assert "raises the patience" in run.create(RunConfig(replace(longer, patience=6)))


def test_patience_alone_does_not_unfinish_a_run_of_all_its_epochs(study: Path) -> None:
    run = Run(study, "a")
    run.create(RunConfig(SHORT))
    run.last.touch()
    status(10).write(run.status_file)
    run.create(RunConfig(TrainingConfig(epochs=10, patience=50, warmup_steps=0)))
    assert run.finished()


def test_extensions_are_kept_in_the_status_from_the_start_of_an_attempt(study: Path) -> None:
    assert extension_of(SHORT.to_dict(), SHORT, 7) is None
    assert extension_of({"lr": 1}, SHORT, 7) is None  # a checkpoint that does not say
    run = Run(study, "a")
    run.create(RunConfig(SHORT))
    run.last.touch()
    status(5, "preempted").write(run.status_file)
    run.create(RunConfig(TrainingConfig(epochs=20, patience=6, warmup_steps=0)))
    with Attempt(run, JobInfo.in_foreground()) as attempt:
        found = run.status()
        noted = {"step": 100, "epochs": [10, 20], "patience": [5, 6]}
        assert found.extensions == [noted]
        attempt.start_at(90, [{**noted, "step": 90}])  # what the checkpoint says
    found = run.status()
    assert found.extensions == [{**noted, "step": 90}]
