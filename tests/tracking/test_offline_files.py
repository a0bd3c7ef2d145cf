"""W&B's offline files, checked against its own reader."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import wandb

from flowjobs.tracking.offline_files import (
    BLOCK_BYTES,
    append_preempted,
    is_closed,
    is_header_only,
    last_step_on_record,
    read_records,
    record_of,
    session_files,
    write_records,
)
from tests.tracking.leet import inspect, records


def history(step: int, filling: int = 0) -> Any:
    record = record_of()
    record.history.step.num = step
    for key, value in (("_step", str(step)), ("text", json.dumps("x" * filling))):
        record.history.item.add(nested_key=[key], value_json=value)
    return record


def run_record(run_id: str = "abc") -> Any:
    record = record_of()
    record.run.run_id = run_id
    record.run.tags.append("mine")
    record.run.notes = "as it was"
    return record


def session_file(run_folder: Path, started: str = "20260101_000000") -> Path:
    folder = run_folder / "wandb" / f"offline-run-{started}-abc"
    folder.mkdir(parents=True)
    return folder / "run-abc.wandb"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A session of the real client that was killed: no exit record."""
    run = wandb.init(
        project="p",
        id="abc",
        dir=tmp_path,
        mode="offline",
        config={"lr": 1},
        tags=["mine"],
        notes="as it was",
        settings=wandb.Settings(console="off", silent=True),
    )
    run.define_metric("val/loss", summary="min")
    for step in range(300):
        run.log({"val/loss": 1 / (step + 1), "epoch": step // 10}, step=step, commit=True)
    run.finish()
    # Without, one time in twenty the last block is not on disk yet when finish returns.
    wandb.teardown()
    (path,) = session_files(tmp_path)
    records = list(read_records(path))
    assert records.pop().WhichOneof("record_type") == "exit"
    write_records(path, records)
    return path


def steps_in(path: Path) -> list[int]:
    return [record["history"]["step"]["num"] for record in records(path) if "history" in record]


def test_a_rewritten_file_of_the_client_has_the_same_bytes(file: Path) -> None:
    before = file.read_bytes()
    write_records(file, read_records(file))
    assert file.read_bytes() == before


def test_records_of_any_size_are_read_back_by_the_client(tmp_path: Path) -> None:
    path = session_file(tmp_path)
    chance = random.Random(0)
    sizes = [chance.choice([0, 7, 100, 1000, BLOCK_BYTES, 3 * BLOCK_BYTES]) for _ in range(60)]
    sizes = [max(0, size + chance.randrange(-60, 60)) for size in sizes]
    # Records that leave 0 to 20 bytes of a block, where the header of a chunk may not fit.
    for left in range(21):
        write_records(path, [run_record(), *map(history, range(len(sizes)), sizes)])
        used = path.stat().st_size % BLOCK_BYTES
        overhead = len(history(len(sizes), 0).SerializeToString()) + 7 + 2 + 5
        sizes += [(BLOCK_BYTES - used - overhead - left) % BLOCK_BYTES, 10]
    write_records(path, [run_record(), *map(history, range(len(sizes)), sizes)])

    found = [record["history"] for record in records(path) if "history" in record]
    assert [row["item"]["_step"] for row in found] == list(range(len(sizes)))
    assert [len(row["item"]["text"]) for row in found] == sizes
    assert [record.history.step.num for record in read_records(path)][1:] == list(range(len(sizes)))


def test_a_session_that_is_closed_keeps_all_that_was_on_record(file: Path) -> None:
    before = records(file)
    append_preempted(file)
    after = records(file)
    assert after[: len(before)] == before
    assert [record["type"] for record in after[len(before) :]] == ["preempting", "exit"]
    found = inspect(file)
    assert (found.state, found.exit_code) == ("preempted", 75)
    assert (found.tags, found.notes) == (["mine"], "as it was")
    assert found.config["lr"] == 1
    assert found.summary["val/loss"]["min"] == 1 / 300
    assert is_closed(file)


def test_closing_it_again_changes_nothing(file: Path) -> None:
    assert not is_closed(file)
    append_preempted(file)
    before = file.read_bytes()
    append_preempted(file)
    assert file.read_bytes() == before


def test_a_file_cut_anywhere_is_mended_to_its_whole_records(file: Path) -> None:
    log, all_steps, all_records = file.read_bytes(), steps_in(file), records(file)
    chance = random.Random(1)
    for cut in [8, len(log) - 1, *(chance.randrange(7, len(log)) for _ in range(3))]:
        file.write_bytes(log[:cut])
        step = last_step_on_record(file.parents[2])
        if is_header_only(file):
            assert step == -1
            continue
        append_preempted(file)
        assert last_step_on_record(file.parents[2]) == step
        steps = steps_in(file)
        assert steps == all_steps[: len(steps)]
        assert step == (steps[-1] if steps else -1)
        *kept, preempting, end = records(file)
        assert kept == all_records[: len(kept)]
        assert (preempting["type"], end["type"]) == ("preempting", "exit")


def test_a_flipped_bit_costs_the_rest_of_its_block_at_most(file: Path) -> None:
    log = bytearray(file.read_bytes())
    assert len(log) > 2 * BLOCK_BYTES
    all_steps = steps_in(file)
    log[BLOCK_BYTES + 5000] ^= 1
    file.write_bytes(log)
    append_preempted(file)
    steps = steps_in(file)
    assert set(steps) < set(all_steps)
    assert steps == sorted(steps)
    # Records are of about the same size.
    assert len(all_steps) - len(steps) < len(all_steps) * 1.1 * BLOCK_BYTES / len(log)
    assert steps[-1] == all_steps[-1] == last_step_on_record(file.parents[2])


def test_zeros_at_the_end_as_a_power_loss_leaves_them_are_cut(file: Path) -> None:
    log = file.read_bytes()
    file.write_bytes(log + bytes(5000))
    assert last_step_on_record(file.parents[2]) == 299
    append_preempted(file)
    assert file.read_bytes().startswith(log)
    assert bytes(100) not in file.read_bytes()[len(log) :]
    assert is_closed(file)


@pytest.mark.parametrize("size", [0, 3, 7, 40])
def test_a_file_that_names_no_run_is_header_only(file: Path, size: int) -> None:
    assert not is_header_only(file)
    file.write_bytes(file.read_bytes()[:size])
    assert is_header_only(file)
    assert not is_closed(file)
    assert last_step_on_record(file.parents[2]) == -1
    with pytest.raises(ValueError, match="names no run"):
        append_preempted(file)


def test_the_last_step_is_the_highest_of_all_sessions(tmp_path: Path) -> None:
    assert last_step_on_record(tmp_path) == -1
    write_records(session_file(tmp_path, "20260101_000000"), [run_record(), history(700)])
    # What follows the last row may be longer than the blocks that are looked at first.
    padding = [run_record("x" * 1000) for _ in range(200)]
    write_records(session_file(tmp_path, "20260102_000000"), [history(500), *padding])
    write_records(session_file(tmp_path, "20260103_000000"), [run_record()])
    assert last_step_on_record(tmp_path) == 700
    session_files(tmp_path)[0].unlink()
    assert last_step_on_record(tmp_path) == 500


def test_a_long_history_costs_no_more_than_a_short_one(tmp_path: Path) -> None:
    write_records(session_file(tmp_path), [run_record(), *map(history, range(100_000))])
    started = time.process_time()
    assert last_step_on_record(tmp_path) == 99_999
    assert is_closed(session_files(tmp_path)[0]) is False
    assert time.process_time() - started < 0.2


def test_looking_at_a_file_loads_no_wandb(file: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from flowjobs.tracking.offline_files import is_closed, is_header_only\n"
        "path = Path(sys.argv[1])\nis_closed(path), is_header_only(path)\n"
        "print('wandb' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
