"""How fast the trainer is on a GPU, against what a user would take or write instead.

python3 -m pytest -m bench -s tests/gpu/test_speed.py
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from flowjobs.config import TrainingConfig
from flowjobs.field_values import KeyValues
from tests.gpu.timed import Table, timed_tables

pytestmark = [pytest.mark.gpu, pytest.mark.bench, pytest.mark.timeout(400)]

# Never at an end. Who asks for saves so often knows what one costs here, so that the first seconds
# have as many as any others: as many as 1 % of the time allows.
ENDLESS: Any = {"epochs": 1_000_000, "patience": 1_000_000, "checkpoint_every_s": 1.0}
# Columns and rows of the wide data; 15 % of the rows are for validation.
WIDE, ROWS = 1024, 20_000
# Of the replay of a graph of a whole step, the steps between two validations.
OF_THE_LIMIT = 0.9
OURS = "ours"


def config(**given: Any) -> TrainingConfig:
    """Of a run without an end; on digits, of 64 columns in batches of 64."""
    return TrainingConfig(**ENDLESS, **given)


@pytest.fixture(scope="module")
def tables() -> Iterator[list[Table]]:
    """All that were measured, printed together at the end."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU, and torch sees none")
    found: list[Table] = []
    yield found
    print(f"\n\n{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for table in found:
        print(f"\n{table}")


@pytest.fixture(scope="module")
def small(tables: list[Table], tmp_path_factory: pytest.TempPathFactory) -> list[Table]:
    """Default models on digits: the mlp with all loops, the unet, the dit."""
    mlp = {
        OURS: ("trainer_loop", config()),
        "ours, no graph": ("trainer_loop", config(cuda_graph=False)),
        "ours, --deterministic": ("trainer_loop", config(deterministic=True)),
        "ours, W&B offline": ("tracked_loop", config()),
        "ours, saving nothing": ("unsaved_loop", config()),
        "torchcfm": ("torchcfm_loop", config()),
        "Lightning": ("lightning_loop", config()),
        "DataLoader loop": ("dataloader_loop", config()),
        "tuned loop": ("tuned_loop", config()),
        "the graph alone": ("replay_loop", config()),
        "otcfm: ours": ("trainer_loop", config(flow="otcfm")),
        "otcfm: torchcfm": ("torchcfm_loop", config(flow="otcfm")),
    }
    groups = {"mlp, 64 columns, batch 64": mlp}
    for arch in ("unet", "dit"):
        groups[f"{arch}, 64 columns, batch 64"] = {
            OURS: ("trainer_loop", config(arch=arch)),
            "ours, --deterministic": ("trainer_loop", config(arch=arch, deterministic=True)),
            "tuned loop": ("tuned_loop", config(arch=arch)),
            "the graph alone": ("replay_loop", config(arch=arch)),
        }
    found = timed_tables(groups, tmp_path_factory.mktemp("small"))
    tables += found
    return found


@pytest.fixture(scope="module")
def wide(tables: list[Table], tmp_path_factory: pytest.TempPathFactory) -> list[Table]:
    """On 1,024 columns: the mlp with all loops, and a dit that keeps the GPU busy."""
    folder = tmp_path_factory.mktemp("wide")
    rows = np.random.default_rng(0).standard_normal((ROWS, WIDE), dtype=np.float32)
    np.save(folder / "rows.npy", rows)
    same: Any = {"dataset": str(folder / "rows.npy"), "batch_size": 256}
    mlp = {
        OURS: ("trainer_loop", config(**same)),
        "ours, no graph": ("trainer_loop", config(**same, cuda_graph=False)),
        "ours, bf16": ("trainer_loop", config(**same, precision="bf16")),
        "ours, saving nothing": ("unsaved_loop", config(**same)),
        "torchcfm": ("torchcfm_loop", config(**same)),
        "Lightning": ("lightning_loop", config(**same)),
        "tuned loop": ("tuned_loop", config(**same)),
        "the graph alone": ("replay_loop", config(**same)),
    }
    # Eight tokens a row.
    same |= {"arch": "dit", "width": 1024, "arch_args": KeyValues(chunk=WIDE // 8)}
    dit = {
        OURS: ("trainer_loop", config(**same)),
        "ours, no graph": ("trainer_loop", config(**same, cuda_graph=False)),
        "ours, bf16": ("trainer_loop", config(**same, precision="bf16")),
        "ours, bf16, no graph": (
            "trainer_loop",
            config(**same, precision="bf16", cuda_graph=False),
        ),
    }
    groups = {
        f"mlp, {WIDE} columns, batch 256": mlp,
        f"dit of width 1024, {WIDE} columns": dit,
    }
    found = timed_tables(groups, folder)
    tables += found
    return found


def check_all_ran(table: Table) -> None:
    """Raise where a loop has failed."""
    failed = {name: of.note for name, of in table.speeds.items() if of.note.startswith("FAILED")}
    assert not failed


def test_a_small_model_trains_three_times_as_fast_as_in_torchcfms_loop(small: list[Table]) -> None:
    mlp, *_ = small
    check_all_ran(mlp)
    assert mlp.ratio(OURS, "torchcfm") >= 3


def test_a_small_model_trains_faster_than_in_any_loop_without_a_graph(small: list[Table]) -> None:
    mlp, *_ = small
    assert mlp.ratio(OURS, "Lightning") >= 1.6
    assert mlp.ratio(OURS, "DataLoader loop") >= 1.3
    assert mlp.ratio(OURS, "tuned loop") >= 1
    assert mlp.ratio(OURS, "ours, no graph") >= 1


def test_steps_of_a_small_model_take_hardly_longer_than_their_graph(small: list[Table]) -> None:
    mlp, *_ = small
    assert mlp.speeds[OURS].note.startswith("captured")
    assert mlp.ratio(OURS, "the graph alone", alone=True) >= OF_THE_LIMIT


def test_tracking_takes_two_percent_of_the_speed_at_most(small: list[Table]) -> None:
    mlp, *_ = small
    assert mlp.ratio("ours, W&B offline", OURS) >= 0.98


def test_optimal_transport_is_faster_than_torchcfms(small: list[Table]) -> None:
    mlp, *_ = small
    assert mlp.ratio("otcfm: ours", "otcfm: torchcfm") >= 1


def test_other_architectures_train_as_fast_as_in_a_tuned_loop(small: list[Table]) -> None:
    _, *others = small
    for table in others:
        check_all_ran(table)
        assert table.ratio(OURS, "tuned loop") >= 1


def test_a_wide_model_trains_faster_than_in_any_loop_without_a_graph(wide: list[Table]) -> None:
    mlp, _ = wide
    check_all_ran(mlp)
    for other in ("torchcfm", "Lightning", "tuned loop"):
        assert mlp.ratio(OURS, other) >= 1


def test_steps_of_a_wide_model_take_hardly_longer_than_their_graph(wide: list[Table]) -> None:
    mlp, _ = wide
    assert mlp.ratio(OURS, "the graph alone", alone=True) >= OF_THE_LIMIT


def test_bf16_is_faster_where_the_gpu_is_busy(wide: list[Table]) -> None:
    _, dit = wide
    check_all_ran(dit)
    assert dit.ratio("ours, bf16", OURS) > 1
