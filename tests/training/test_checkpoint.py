from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flowjobs.errors import CheckpointDamagedError, CheckpointError, CheckpointMismatchError
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
    write_checkpoint,
)


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


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "best.pt"
    before = saved(path)
    after = parts()
    assert load_checkpoint(path, *after, torch.device("cpu")) == (3, 0.5)
    for old, new in zip(before[:1] + before[2:], after[:1] + after[2:], strict=True):
        assert str(old.state_dict()) == str(new.state_dict())
    assert str(before[1].shadow) == str(after[1].shadow)
    assert before[1].updates == after[1].updates == 3


def test_any_torch_can_read_it_without_running_code(tmp_path: Path) -> None:
    saved(tmp_path / "best.pt")
    assert torch.load(tmp_path / "best.pt", weights_only=True)["epoch"] == 2


@pytest.mark.parametrize("where", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_one_flipped_bit_is_noticed(tmp_path: Path, where: float) -> None:
    path = tmp_path / "best.pt"
    saved(path)
    content = bytearray(path.read_bytes())
    content[round(where * (len(content) - 1))] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointDamagedError):
        read_checkpoint(path)


@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_a_file_cut_short_is_noticed(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "best.pt"
    saved(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointDamagedError, match="cut short"):
        read_checkpoint(path)


class Bomb:
    def __reduce__(self) -> Any:
        return (Path("exploded").write_text, ("boom",))


def test_a_pickle_bomb_does_nothing(workplace: Path) -> None:
    path = workplace / "best.pt"
    write_checkpoint(path, {"format": 1, "epoch": Bomb()})
    with pytest.raises(CheckpointDamagedError, match="would run code"):
        read_checkpoint(path)
    assert not Path("exploded").exists()


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


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoints" / "best.pt"
    saved(path)
    before = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        saved(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_checkpoint_path_is_the_seeds() -> None:
    assert get_checkpoint_path("mlp-icfm-5k-none") == "study/checkpoints/mlp-icfm-5k-none/best.pt"


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


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def damage_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def damage_bomb(path: Path) -> None:
    write_checkpoint(path.with_name("bomb.pt"), {"format": 1, "epoch": Bomb()})
    path.with_name("bomb.pt").replace(path)


@pytest.mark.parametrize(
    "damage", [damage_truncate, damage_empty, damage_flip, damage_folder, damage_bomb]
)
def test_a_damaged_file_is_set_aside_and_the_one_before_used(
    tmp_path: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "last.pt"
    for step in (1, 2):
        write_checkpoint(path, {"format": 1, "step": step})
    damage(path)
    found = read_newest_good(path)
    assert found is not None
    assert found["step"] == 1
    assert not path.exists()
    (aside,) = tmp_path.glob("last.damaged-*.pt")
    assert aside.name in caplog.text
    damage_empty(previous_of(path))
    assert read_newest_good(path) is None


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
