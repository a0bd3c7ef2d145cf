import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowjobs.config import (
    RestartConfig,
    RunConfig,
    SlurmConfig,
    TrackingConfig,
    TrainingConfig,
    config_to_dict,
    run_config_from_dict,
)
from flowjobs.errors import ConfigError
from flowjobs.field_values import KeyValues, literal_or_text
from flowjobs.formatting import parse_count


@pytest.mark.parametrize(
    "text",
    ["5_k", "1__000", "1_", "_1", "1k5", "0.8", "1.0", "0.0008k", "9" * 400, "9" * 305 + "m"],
)
def test_what_is_no_count_is_none(text: str) -> None:
    assert parse_count(text) is None
    with pytest.raises(ConfigError, match=r"--params: found '.*', expected a number"):
        TrainingConfig(params=text)


def test_a_number_that_no_counter_holds_is_refused() -> None:
    for name in ("epochs", "warmup_steps", "width"):
        with pytest.raises(ConfigError, match=r"found 9+, expected at most"):
            TrainingConfig(**{name: int("9" * 400)})


def test_run_name_is_the_seeds() -> None:
    config = TrainingConfig(arch="mlp", flow="icfm", dataset="5k", aug="none")
    assert config.run_name == "mlp-icfm-5k-none"


@pytest.mark.parametrize(
    ("arch", "dataset", "name"),
    [
        ("my.models:WideNet", "digits", "WideNet-icfm-digits-none"),
        ("wide=my.models:WideNet", "digits", "wide-icfm-digits-none"),
        ("mlp", "/data/my embeddings.npy", "mlp-icfm-my_embeddings-none"),
        ("mlp", "v1.5k", "mlp-icfm-v1.5k-none"),
    ],
)
def test_run_name_can_be_a_folder(arch: str, dataset: str, name: str) -> None:
    assert TrainingConfig(arch=arch, dataset=dataset).run_name == name


def test_config_survives_json() -> None:
    config = RunConfig(
        TrainingConfig(arch_args=KeyValues(width=8, norm="layer"), lr=3e-4),
        SlurmConfig(partition="gpu", mem_gb=1.5, sbatch=KeyValues(exclusive=True)),
    )
    assert run_config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_an_unknown_field_of_a_newer_version_is_named() -> None:
    found = config_to_dict(RunConfig())
    found["training"]["momentum"] = 0.9
    with pytest.raises(ConfigError, match="unknown fields momentum"):
        run_config_from_dict(found)


def test_signature_changes_with_what_changes_the_result_only() -> None:
    base = TrainingConfig()
    for name, value in (("epochs", 7), ("group", "g"), ("num_workers", 0)):
        assert dataclasses.replace(base, **{name: value}).signature == base.signature, name
    for name, value in (("lr", 1.0), ("seed", 1), ("arch_args", KeyValues(width=8))):
        assert dataclasses.replace(base, **{name: value}).signature != base.signature, name


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("batch_size", 0, "--batch-size: found 0, expected at least 1"),
        ("lr", 0.0, "--lr: found 0.0, expected more than 0"),
        ("lr", float("nan"), "--lr: found nan, expected a finite number"),
        ("ema_decay", 1.0, "--ema-decay: found 1.0, expected less than 1"),
        ("flow", "icmf", "--flow: found 'icmf', expected one of icfm, otcfm, .* did you mean icfm"),
    ],
)
def test_a_bad_value_is_refused_by_its_flag(field: str, value: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        dataclasses.replace(TrainingConfig(), **{field: value})


@pytest.mark.parametrize(
    ("field", "given", "taken"),
    [
        ("seed", np.int64(3), 3),
        ("seed", torch.tensor(3), 3),
        ("epochs", 1e2, 100),
        ("batch_size", np.float64(64), 64),
        ("lr", np.float32(0.001), 0.001),
        ("lr", 1, 1),  # kept, as it is in the signatures of runs
        ("compile", np.bool_(True), True),
        ("dataset", Path("x.npy"), "x.npy"),
        ("arch_args", {"width": np.int64(8), "scales": (1, 2)}, {"width": 8, "scales": [1, 2]}),
    ],
)
def test_a_value_from_python_is_of_its_fields_type(field: str, given: Any, taken: Any) -> None:
    config = RunConfig(TrainingConfig(**{field: given}))
    found = getattr(config.training, field)
    assert (found, type(found)) == (taken, KeyValues if field == "arch_args" else type(taken))
    assert run_config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


@pytest.mark.parametrize(
    ("cls", "field", "given", "said"),
    [
        (TrainingConfig, "epochs", "20", "--epochs: found '20', expected a whole number"),
        (TrainingConfig, "epochs", 2.5, "--epochs: found 2.5, expected a whole number"),
        (TrainingConfig, "patience", math.inf, "--patience: found inf, expected a whole number"),
        (TrainingConfig, "seed", True, "--seed: found True, expected a whole number"),
        (TrainingConfig, "seed", np.array([3]), "--seed: found array.*, expected a whole number"),
        (TrackingConfig, "wandb_base_url", "wandb.lab", "--wandb-base-url, .*expected an address"),
        (TrainingConfig, "seed", np.arange(3), "--seed: found array.*, expected a whole number"),
        (TrainingConfig, "grad_clip", None, "--grad-clip: found None, expected a number"),
        (TrainingConfig, "width", "8", "--width: found '8', expected a whole number or None"),
        (TrainingConfig, "compile", 1, "--compile: found 1, expected True or False"),
        (TrainingConfig, "arch", None, "--arch: found None, expected text"),
        (TrainingConfig, "aug", 3, "--aug: found 3, expected text"),
        (TrainingConfig, "arch_args", [1], r"--arch-args: found \[1\], expected a dict"),
        (TrainingConfig, "arch_args", {"act": max}, "--arch-args: found <.*max>, expected a numb"),
        (SlurmConfig, "mem_gb", "64", "--mem-gb: found '64', expected a number or None"),
        (TrackingConfig, "wandb_project", None, "--wandb-project: found None, expected text"),
        (RestartConfig, "retries", 0.5, "--retries: found 0.5, expected a whole number"),
    ],
)
def test_a_value_of_another_type_is_refused(cls: Any, field: str, given: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        cls(**{field: given})


def test_an_sbatch_option_is_named_without_dashes() -> None:
    with pytest.raises(ConfigError, match="without its dashes"):
        SlurmConfig(sbatch=KeyValues({"--exclusive": True}))


def test_an_sbatch_option_that_a_run_cannot_keep_to_is_refused() -> None:
    with pytest.raises(ConfigError, match="--sbatch array: a run is one job"):
        SlurmConfig(sbatch=KeyValues(array="0-3"))


@pytest.mark.parametrize("project", ["team/flows", "", "x" * 129])
def test_a_project_that_wandb_would_refuse_is_refused(project: str) -> None:
    with pytest.raises(ConfigError, match="--wandb-project"):
        TrackingConfig(wandb_project=project)
    asked = TrackingConfig(wandb_entity=project or "https://wandb.ai/team")
    with pytest.raises(ConfigError, match="--wandb-entity, WANDB_ENTITY: found"):
        asked.check_asked("")
    dataclasses.replace(asked, wandb_mode="disabled").check_asked("")
    with pytest.raises(ConfigError, match="--group: found 129 characters"):
        TrackingConfig().check_asked("x" * 129)


def test_key_values_are_literals_or_strings() -> None:
    parsed = KeyValues.parse(["width=512", "norm=layer", "scales=(1, 2)", "gres=gpu:2", "x=1=2"])
    assert parsed == {"width": 512, "norm": "layer", "scales": [1, 2], "gres": "gpu:2", "x": "1=2"}
    # A text that says false would be true to a model, whatever language the word is of.
    for text in ("a=false", "a=False", "a=FALSE"):
        assert KeyValues.parse([text])["a"] is False
    parsed = KeyValues.parse(["a=true", "b=null", "c=none", "d='true'", "e=[true, null]", "f=NaN"])
    assert parsed == {"a": True, "b": None, "c": "none", "d": "true", "e": [True, None], "f": "NaN"}


@pytest.mark.parametrize("text", ["{[1]}", "{1}", "-" * 3000 + "1", "(" * 300, "b'x'", "'", "x\0"])
def test_what_is_no_literal_of_json_is_text(text: str) -> None:
    assert literal_or_text(text) == text
