import errno
import os
import random
from pathlib import Path
from typing import IO, Any, cast

import pytest
import torch
from torch import nn

from flowjobs.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointUnloadableError,
    CheckpointWriteError,
    RunTakenOverError,
)
from flowjobs.training import (
    EMAModel,
    get_checkpoint_path,
    get_cosine_schedule_with_warmup,
    load_checkpoint,
    save_checkpoint,
)
from flowjobs.training.checkpoint import (
    previous_of,
    read_checkpoint,
    read_newest_good,
    sweep_unfinished,
    write_checkpoint,
)
from flowjobs.training.seal import SealedWriter


def parts(width: int = 4) -> tuple[Any, ...]:
    model = nn.Linear(width, width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return model, EMAModel(model), optimizer, get_cosine_schedule_with_warmup(optimizer, 10, 100)


def saved(path: Path, width: int = 4) -> tuple[Any, ...]:
    model, ema, optimizer, scheduler = parts(width)
    for _ in range(3):
        model(torch.ones(1, width)).sum().backward()
        optimizer.step()
        scheduler.step()
        ema.update(model)
    stats = {"mean": torch.zeros(width), "std": torch.ones(width)}
    save_checkpoint(path, 2, model, ema, optimizer, scheduler, 0.5, {"lr": 1e-3}, stats)
    return model, ema, optimizer, scheduler


def files_in(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "best.pt"
    before = saved(path)
    after = parts()
    assert load_checkpoint(path, *after, torch.device("cpu")) == (3, 0.5)
    for old, new in zip(before[:1] + before[2:], after[:1] + after[2:], strict=True):
        assert str(old.state_dict()) == str(new.state_dict())
    assert str(before[1].shadow) == str(after[1].shadow)
    assert before[1].updates == after[1].updates == 3


def test_moments_have_the_layout_of_their_weights(tmp_path: Path) -> None:
    ends = []
    for resumes_as in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3, padding=1)
        for memory_format in (torch.contiguous_format, resumes_as):
            model = model.to(memory_format=memory_format)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
            rest = EMAModel(model), optimizer, get_cosine_schedule_with_warmup(optimizer, 0, 9)
            if (tmp_path / "last.pt").exists():
                load_checkpoint(tmp_path / "last.pt", model, *rest, torch.device("cpu"))
            for _ in range(2):
                optimizer.zero_grad()
                model(torch.arange(75.0).view(1, 3, 5, 5).sin()).square().sum().backward()
                optimizer.step()
            save_checkpoint(tmp_path / "last.pt", 0, model, *rest, 0.0, {}, {})
        (tmp_path / "last.pt").unlink()
        ends.append(model.weight)
    torch.testing.assert_close(*ends, check_stride=False)


def test_an_optimizer_of_other_weights_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "best.pt")
    payload = read_checkpoint(tmp_path / "best.pt")
    moments = payload["optimizer_state_dict"]["state"]
    for change in (
        lambda: moments.update({0: moments[1], 1: moments[0]}),
        lambda: payload.update(optimizer_weights=["bias", "another"]),
    ):
        change()
        write_checkpoint(tmp_path / "best.pt", payload)
        with pytest.raises(CheckpointMismatchError, match="of another model than the config asks"):
            load_checkpoint(tmp_path / "best.pt", *parts(), torch.device("cpu"))


def test_any_torch_can_read_it_without_running_code(tmp_path: Path) -> None:
    saved(tmp_path / "best.pt")
    assert torch.load(tmp_path / "best.pt", weights_only=True)["epoch"] == 2


def test_one_flipped_bit_anywhere_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    saved(path)
    sound = path.read_bytes()
    # Every bit of the two ends, where the archive's structure and the seal are, and many between.
    ends = [*range(80), *range(len(sound) - 600, len(sound))]
    places = [8 * byte + bit for byte in ends for bit in range(8)]
    places += random.Random(0).sample(range(8 * len(sound)), 2000)
    for place in places:
        content = bytearray(sound)
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        with pytest.raises(CheckpointDamagedError):
            read_checkpoint(path)


def test_a_file_cut_short_anywhere_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    saved(path)
    sound = path.read_bytes()
    for kept in {*range(200), *range(0, len(sound), 37), *range(len(sound) - 200, len(sound))}:
        path.write_bytes(sound[:kept])
        with pytest.raises(CheckpointDamagedError, match="cut short"):
            read_checkpoint(path)


def test_a_file_that_goes_on_too_long_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    saved(path)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CheckpointDamagedError):
        read_checkpoint(path)


class Bomb:
    def __reduce__(self) -> Any:
        return (Path("exploded").write_text, ("boom",))


def bomb(path: Path) -> None:
    """As an earlier version of flowjobs would have written it."""
    with path.open("wb") as file:
        sealed = SealedWriter(file)
        torch.save({"format": 1, "width": 4, "epoch": Bomb()}, cast(IO[bytes], sealed))
        sealed.seal()


def test_a_pickle_bomb_does_nothing(workplace: Path) -> None:
    path = workplace / "best.pt"
    bomb(path)
    with pytest.raises(CheckpointUnloadableError, match="would run code"):
        read_checkpoint(path)
    assert not Path("exploded").exists()


def test_what_could_not_be_loaded_is_not_written(workplace: Path) -> None:
    with pytest.raises(CheckpointUnloadableError, match=r"holds a tests.*Bomb \(epoch\)"):
        write_checkpoint(workplace / "best.pt", {"format": 1, "epoch": Bomb()})
    assert list(workplace.iterdir()) == []


def test_another_model_is_refused_with_what_to_do(tmp_path: Path) -> None:
    saved(tmp_path / "best.pt", width=4)
    with pytest.raises(CheckpointMismatchError, match="give the run another --name"):
        load_checkpoint(tmp_path / "best.pt", *parts(width=5), torch.device("cpu"))


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "best.pt", {"format": 99})
    with pytest.raises(CheckpointMismatchError, match="update flowjobs"):
        read_checkpoint(tmp_path / "best.pt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere.pt cannot be read: No such file"):
        read_checkpoint(tmp_path / "nowhere.pt")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES])
def test_a_write_that_fails_leaves_the_old_file_and_says_what_it_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path = tmp_path / "checkpoints" / "best.pt"
    saved(path, width=300)
    before = path.read_bytes()

    def refuse(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(CheckpointWriteError) as caught:
        saved(path, width=300)
    said = str(caught.value)
    assert said.startswith(f"{path} could not be written: {os.strerror(code)}; it needs 1.45 MB, ")
    assert ("your quota" in said) == (code == errno.EDQUOT)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_file_system_that_keeps_other_bytes_is_noticed_before_the_old_file_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    write_checkpoint(path, {"format": 1, "step": 1})
    real = os.fsync

    def lose_a_bit(descriptor: int) -> None:
        os.pwrite(descriptor, b"?", 200)
        real(descriptor)

    monkeypatch.setattr("os.fsync", lose_a_bit)
    with pytest.raises(CheckpointWriteError, match="does not hold the bytes"):
        write_checkpoint(path, {"format": 1, "step": 2})
    assert read_checkpoint(path)["step"] == 1


def test_an_attempt_that_lost_the_run_changes_no_name(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    for step in (1, 2):
        write_checkpoint(path, {"format": 1, "step": step})
    before = files_in(tmp_path)

    def lost() -> None:
        raise RunTakenOverError("job 2 holds the run")

    with pytest.raises(RunTakenOverError):
        write_checkpoint(path, {"format": 1, "step": 3}, before_replace=lost)
    assert files_in(tmp_path) == before


def test_what_killed_writers_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    for step in (1, 2):
        write_checkpoint(path, {"format": 1, "step": step})
    kept = {path, previous_of(path), tmp_path / ".best.pt.n1-7.tmp", tmp_path / ".last.ptx.tmp"}
    left = {tmp_path / ".last.pt.n1-7.tmp", tmp_path / ".last.pt.7.link"}
    for file in {*kept, *left} - {path, previous_of(path)}:
        file.touch()
    sweep_unfinished(path)
    assert set(files_in(tmp_path)) == kept


def test_a_writer_whose_file_was_swept_fails_and_harms_nothing(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    for step in (1, 2):
        write_checkpoint(path, {"format": 1, "step": step})
    with pytest.raises(CheckpointWriteError, match="No such file"):
        write_checkpoint(
            path, {"format": 1, "step": 3}, before_replace=lambda: sweep_unfinished(path)
        )
    assert read_checkpoint(path)["step"] == 2


def test_checkpoint_path_is_the_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert get_checkpoint_path("mlp-icfm-5k-none") == "study/checkpoints/mlp-icfm-5k-none/best.pt"
    monkeypatch.setenv("FLOWJOBS_STUDY", "~/study")  # as a crontab has it
    in_home = Path.home() / "study/checkpoints/mlp-icfm-5k-none/best.pt"
    assert get_checkpoint_path("mlp-icfm-5k-none") == str(in_home)


def test_the_checkpoint_before_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    for step in (1, 2, 3):
        write_checkpoint(path, {"format": 1, "step": step})
    assert read_checkpoint(path)["step"] == 3
    assert read_checkpoint(tmp_path / "last.previous.pt")["step"] == 2


def test_the_checkpoint_before_is_kept_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*names: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    test_the_checkpoint_before_is_kept(tmp_path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "data.pkl").touch()


def link_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def named_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def another_torch_file(path: Path) -> None:
    torch.save({"format": 1, "step": 9}, path)


DAMAGES = [truncate, empty, flip, folder, link_loop, named_pipe, another_torch_file]


@pytest.mark.parametrize("name", ["last", "best"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_set_aside_and_the_one_before_used(
    tmp_path: Path, damage: Any, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / f"{name}.pt"
    for step in (1, 2):
        write_checkpoint(path, {"format": 1, "step": step})
    damage(path)
    found = read_newest_good(path)
    assert found is not None
    assert found["step"] == 1
    assert not os.path.lexists(path)
    (aside,) = tmp_path.glob(f"{name}.damaged-*.pt")
    assert aside.name in caplog.text
    empty(previous_of(path))
    assert read_newest_good(path) is None


def newer_format(path: Path) -> None:
    write_checkpoint(path.with_name("new.pt"), {"format": 99})
    path.with_name("new.pt").replace(path)


def another_model(path: Path) -> None:
    write_checkpoint(path.with_name("other.pt"), {"format": 1, "width": 5})
    path.with_name("other.pt").replace(path)


def check_width(payload: dict[str, Any], path: Path) -> None:
    if payload["width"] != 4:
        raise CheckpointMismatchError(f"{path} is of another model")


@pytest.mark.parametrize("mismatch", [newer_format, another_model, bomb])
def test_a_file_of_something_else_is_set_aside_where_one_before_it_fits(
    tmp_path: Path, mismatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "last.pt"
    for step in (1, 2):
        write_checkpoint(path, {"format": 1, "step": step, "width": 4})
    mismatch(path)
    found = read_newest_good(path, check=check_width)
    assert found is not None
    assert found["step"] == 1
    (aside,) = tmp_path.glob("last.mismatched-*.pt")
    assert aside.name in caplog.text


@pytest.mark.parametrize("mismatch", [newer_format, another_model, bomb])
def test_sound_files_of_something_else_alone_are_an_error_and_stay(
    tmp_path: Path, mismatch: Any
) -> None:
    path = tmp_path / "last.pt"
    for step in (1, 2):
        write_checkpoint(path, {"format": 1, "step": step, "width": 4})
    mismatch(path)
    mismatch(previous_of(path))
    before = files_in(tmp_path)
    with pytest.raises(CheckpointMismatchError):
        read_newest_good(path, check=check_width)
    assert files_in(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_an_error_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    write_checkpoint(path, {"format": 1})
    path.chmod(0)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        read_newest_good(path)
    assert path.exists()


def test_a_file_that_cannot_be_read_is_not_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    write_checkpoint(path, {"format": 1})

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match="cannot be read: Input/output error"):
        read_newest_good(path)
    assert path.exists()
