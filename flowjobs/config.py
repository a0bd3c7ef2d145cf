"""What a run is asked to do: frozen dataclasses, checked once, that go to JSON and back.

The fields are the command line's flags and their docstrings its help. This module knows
neither torch nor Slurm nor W&B.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional, get_args
from urllib.parse import urlsplit

from flowjobs.errors import ConfigError
from flowjobs.field_values import KeyValues, flag, take_types
from flowjobs.formatting import parse_count
from flowjobs.from_json import from_json
from flowjobs.nearest import did_you_mean

BUILT_IN_ARCHS = ("mlp", "unet", "dit")
BUILT_IN_FLOWS = ("icfm", "otcfm", "fm", "sbcfm", "vpcfm", "reflow")
Augmentation = Literal["none", "noise", "mixup", "dropout"]
TimeSampling = Literal["uniform", "logit-normal"]
Normalization = Literal["columns", "none"]
Precision = Literal["fp32", "bf16"]
DataPlacement = Literal["auto", "device", "loader"]
WandbMode = Literal["auto", "online", "offline", "disabled"]

MAX_SEED = 2**63 - 1
DATA_FILE_SUFFIXES = (".pt", ".npy")

# Options of sbatch that flowjobs decides, and why.
DECIDED_OPTIONS = {
    "job-name": "a job is named after its run; see --name",
    "output": "logs are in the run's folder",
    "error": "logs are in the run's folder",
    "open-mode": "a requeued job adds to its log",
    "array": "a run is one job; for arrays see flowjobs sweep",
    "wait": "submit returns at once; --follow waits",
    "gpus-per-task": "there is one process per GPU; see --gpus-per-node",
    "gpus-per-socket": "GPUs are asked for by node; see --gpus-per-node",
}

# `str | None` says the same, but for a union of that form tyro loads typeguard, a fifth of the
# time of `submit --help`.
OptionalStr = Optional[str]  # noqa: UP045
OptionalInt = Optional[int]  # noqa: UP045
OptionalFloat = Optional[float]  # noqa: UP045
OptionalPath = Optional[Path]  # noqa: UP045

# The training fields that do not decide what a step computes, so that a run keeps its name and
# its signature when they change. `epochs` and `patience` say how long; more extends the run.
# `dataset` says where the data are; what they are is known by their content (runs/data_file.py),
# and so it is with `source` where that is a file.
NOT_IN_SIGNATURE = frozenset(
    {
        "dataset",
        "epochs",
        "patience",
        "group",
        "data_placement",
        "num_workers",
        "cuda_graph",
        "checkpoint_every_s",
        "evaluate",
    }
)


# Those that a run keeps when it is submitted again, unless they are given.
KEPT_UNLESS_GIVEN = ("epochs", "patience", "group")

# Those that name data, by the path of a file or otherwise.
DATA_FIELDS = ("dataset", "source")

# Those that may be the path of a file.
FILE_FIELDS = ("init_from", *DATA_FIELDS)

# Those that came later, and change nothing at their defaults: runs from before keep their own
# signature.
LATER = frozenset(
    {
        "init_from",
        "width",
        "depth",
        "params",
        "aug_strength",
        "source",
        "normalize",
        "ot_batch",
        "reflow_from",
        "time_sampling",
        "time_mean",
        "time_std",
    }
)

# Arguments of the model that are fields as well: comparing models of one size needs them.
SIZE_FIELDS = ("width", "depth")

# What the name of a run is made of.
IN_NAME = ("arch", "flow", "dataset", "aug")

# Where a run is in W&B, which it keeps.
PLACE_FIELDS = ("wandb_project", "wandb_entity", "wandb_base_url")

# Characters of a project's, a team's or a group's name in W&B.
NAME_IN_WANDB_LIMIT = 128

# Between the path of a file and the digest of its content, in `init_from` and `reflow_from`.
PINNED = "@sha256:"


@dataclass(frozen=True)
class TrainingConfig:
    """What is trained, on what, and how."""

    arch: str = "mlp"
    """Model: mlp (residual blocks), unet (down and up, with skips), dit (transformer over chunks),
    or your own nn.Module as package.module:Name (x: (batch, dim), t: (batch,) -> (batch, dim));
    LABEL=package.module:Name gives it a short name."""

    flow: str = "icfm"
    """Flow, by torchcfm's names: icfm (independent coupling), otcfm (exact optimal transport of a
    batch), fm (Lipman et al.), sbcfm (Schrödinger bridge), vpcfm (variance preserving), reflow
    (pairs of a finished run), or your own as package.module:name."""

    dataset: str = "digits"
    """Data: digits (embedded), the NAME of splits in STUDY/datasets/splits, or the path of a .pt
    or .npy file of shape (n, dim)."""

    aug: Augmentation = "none"
    """Augmentation of the training data: noise, mixup or dropout (of entries). Validation and
    measures use clean data."""

    aug_strength: OptionalFloat = None
    """noise: standard deviation, in units of the data's if normalized; mixup: a of Beta(a, a);
    dropout: share of entries; default: 0.1, 0.2 and 0.1."""

    source: str = "normal"
    """Where paths start: normal (noise), or data, named as for --dataset."""

    normalize: Normalization = "columns"
    """columns: each by its own mean and standard deviation; none: train on the data as they are."""

    group: str = "ablation"
    """Group of the run in W&B."""

    arch_args: KeyValues = field(default_factory=KeyValues)
    """Other arguments of the model: dropout=0.1."""

    width: OptionalInt = None
    """Width of the model, passed to it as `width`; default: 256 (dit: 128), or the data's width
    (dit: a chunk's) where that is larger."""

    depth: OptionalInt = None
    """Blocks of the model (unet: how often the width is halved), passed to it as `depth`; default:
    3 (unet: 2)."""

    params: OptionalStr = None
    """Choose the width so that the model has so many parameters (500k, 2M), within 5 %."""

    init_from: OptionalStr = None
    """Start from the weights (EMA) of this checkpoint of another run, with everything else new:
    optimizer, schedule, counters."""

    epochs: int = 200
    """Passes over the training data. On an existing run: unchanged unless given; a larger number
    extends it."""

    batch_size: int = 64
    """Rows per optimizer step, over all ranks together."""

    lr: float = 1e-3
    """Peak learning rate of AdamW."""

    warmup_steps: int = 100
    """Steps of linear warm-up before the cosine decay."""

    patience: int = 50
    """Stop after this many epochs without a better validation loss. On an existing run: unchanged
    unless given; a larger number extends a stopped one."""

    weight_decay: float = 0.01
    """Weight decay of AdamW."""

    grad_clip: float = 1.0
    """Largest norm of the gradient."""

    ema_decay: float = 0.9999
    """Decay of the weights' moving average, which validation and sampling use."""

    sigma: float = 0.0
    """Standard deviation of the noise around the path from x_0 to x_1."""

    ot_batch: OptionalInt = None
    """Rows that otcfm and sbcfm pair at once, over all ranks; a multiple of the batch size;
    default: the batch size."""

    reflow_from: OptionalStr = None
    """A finished run of this study; --flow reflow trains on its pairs of noise and sample."""

    time_sampling: TimeSampling = "uniform"
    """Distribution of t in training: uniform, or logit-normal (the sigmoid of a normal variable).
    Validation takes it uniform."""

    time_mean: float = 0.0
    """Mean of the normal variable of logit-normal."""

    time_std: float = 1.0
    """Standard deviation of the normal variable of logit-normal."""

    seed: int = 0
    """Seed of weights, order, noise and times."""

    precision: Precision = "fp32"
    """Arithmetic of the model's forward and backward pass."""

    compile: bool = False
    """Compile the model with torch.compile."""

    cuda_graph: bool = True
    """On a GPU, replay each step as one CUDA graph where the model allows it (with --deterministic
    where the bits are the same)."""

    data_placement: DataPlacement = "auto"
    """device: keep the data there; loader: read each step's rows from the file; auto: on the device
    if they fit."""

    num_workers: int = 2
    """Threads that read the coming steps' rows where the data is not on the device."""

    checkpoint_every_s: OptionalFloat = None
    """Save at least this often, in seconds, unless saving would take over 1 % of the time; default:
    300."""

    evaluate: bool = True
    """At the end, measure samples (takes seconds); see flowjobs evaluate."""

    deterministic: bool = False
    """On a GPU too, end with the bits of an uninterrupted run: only deterministic algorithms of
    torch, which can be slower, and an error if an operation has none. A CPU does so anyway."""

    def __post_init__(self) -> None:
        take_types(self)
        for name in ("epochs", "batch_size", "patience"):
            _require(self, name, minimum=1)
        if self.ot_batch is not None and (self.ot_batch < 1 or self.ot_batch % self.batch_size):
            raise ConfigError(
                f"--ot-batch: found {self.ot_batch}, expected a multiple of --batch-size "
                f"({self.batch_size})"
            )
        for name in ("warmup_steps", "num_workers", "weight_decay", "sigma"):
            _require(self, name, minimum=0)
        for name in ("lr", "grad_clip", "time_std"):
            _require(self, name, above=0)
        _require(self, "time_mean")
        if self.aug_strength is not None:
            _require(self, "aug_strength", above=0, below=1 if self.aug == "dropout" else None)
        if self.checkpoint_every_s is not None:
            _require(self, "checkpoint_every_s", minimum=0)
        _require(self, "ema_decay", minimum=0, below=1)
        _require(self, "seed", minimum=0, below=MAX_SEED)
        _require_choice("aug", self.aug, Augmentation)
        _require_choice("precision", self.precision, Precision)
        _require_choice("data_placement", self.data_placement, DataPlacement)
        _require_choice("normalize", self.normalize, Normalization)
        _require_choice("time_sampling", self.time_sampling, TimeSampling)
        if ":" not in self.flow and self.flow not in BUILT_IN_FLOWS:
            raise ConfigError(
                f"--flow: found {self.flow!r}, expected one of {', '.join(BUILT_IN_FLOWS)}, or "
                f"your own as package.module:name{did_you_mean(self.flow, BUILT_IN_FLOWS)}"
            )
        self._check_model_args()

    def _check_model_args(self) -> None:
        for key in self.arch_args:
            if not key.isidentifier():
                raise ConfigError(f"--arch-args: found {key!r}, expected an argument's name")
        for name in SIZE_FIELDS:
            if (value := getattr(self, name)) is None:
                continue
            _require(self, name, minimum=1)
            if name in self.arch_args:
                raise ConfigError(
                    f"--{name}: found {value}, and {name}={self.arch_args[name]} in --arch-args: "
                    "give one of them"
                )
        if self.params is not None and not parse_count(self.params):
            raise ConfigError(
                f"--params: found {self.params!r}, expected a number of parameters (500k, 2M, "
                "1_000_000)"
            )

    @property
    def run_name(self) -> str:
        """`{arch}-{flow}-{dataset}-{aug}`: the name of the run's folder where none is given."""
        parts = [value_in_name(name, getattr(self, name)) for name in IN_NAME]
        return re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(parts))

    @property
    def arch_label(self) -> str:
        """What a run name calls the model: the label, or the class's own name."""
        return value_in_name("arch", self.arch)

    @property
    def arch_path(self) -> str:
        """The built-in's name or `package.module:Name`, without the label."""
        return self.arch.rpartition("=")[2]

    @property
    def flow_label(self) -> str:
        """What a run name calls the flow."""
        return value_in_name("flow", self.flow)

    @property
    def flow_path(self) -> str:
        """The built-in's name or `package.module:name`, without the label."""
        return self.flow.rpartition("=")[2]

    @property
    def model_args(self) -> KeyValues:
        """All arguments of the model but the data's width."""
        return KeyValues(_model_args(vars(self)))

    @property
    def user_modules(self) -> tuple[str, ...]:
        """The modules that the import paths among the fields name; none of them is imported."""
        paths = (self.arch_path, self.flow_path)
        return tuple(dict.fromkeys(path.partition(":")[0] for path in paths if ":" in path))

    @property
    def signature(self) -> str:
        """Hash of everything here that changes the result of a step (16 hex digits)."""
        return signature_of(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON's types."""
        return config_to_dict(self)


@dataclass(frozen=True)
class SlurmConfig:
    """What the job asks of the cluster, in sbatch's words."""

    partition: OptionalStr = None
    """Partition of the job; default: the cluster's."""

    account: OptionalStr = None
    """Account that is charged."""

    qos: OptionalStr = None
    """Quality of service."""

    constraint: OptionalStr = None
    """Features that the nodes must have."""

    exclude: OptionalStr = None
    """Nodes to leave out (n1,n7)."""

    nodes: int = 1
    """Nodes; one process (rank) per GPU on each."""

    gpus_per_node: int = 1
    """GPUs per node; 0 trains on the CPU."""

    gpu_type: OptionalStr = None
    """Type of the GPUs, as the cluster names it (a100); default: any."""

    cpus_per_task: OptionalInt = None
    """CPU cores per process; default: the cluster's."""

    mem_gb: OptionalFloat = None
    """Memory per node in GB; default: the cluster's."""

    timeout_min: OptionalInt = None
    """Time limit of one job in minutes, not of the run; default: the partition's."""

    signal_delay_s: int = 90
    """Seconds before the time limit at which the job is told to save; at most half the limit."""

    mps: bool = False
    """Runs that share a job's GPU (sweep --runs-per-gpu) compute at once by CUDA's MPS; a fault of
    one on the GPU ends the others too."""

    comment: OptionalStr = None
    """Comment of the job."""

    sbatch: KeyValues = field(default_factory=KeyValues)
    """Any other sbatch options: reservation=course exclusive=True."""

    def __post_init__(self) -> None:
        take_types(self)
        _require(self, "nodes", minimum=1)
        _require(self, "gpus_per_node", minimum=0)
        _require(self, "signal_delay_s", minimum=0)
        for name in ("cpus_per_task", "timeout_min"):
            if getattr(self, name) is not None:
                _require(self, name, minimum=1)
        if self.mem_gb is not None:
            _require(self, "mem_gb", minimum=0.01)
        for known in dataclasses.fields(self):
            _check_batch_script(flag(known.name), getattr(self, known.name))
        for key, value in self.sbatch.items():
            _check_batch_script(f"--sbatch {key}", value)
            if not re.fullmatch(r"[a-z][a-z-]*", key):
                raise ConfigError(
                    f"--sbatch: found {key!r}, expected the long name of an sbatch option "
                    "without its dashes (reservation)"
                )
            if key in DECIDED_OPTIONS:
                raise ConfigError(f"--sbatch {key}: {DECIDED_OPTIONS[key]}")

    @property
    def signal_before_end_s(self) -> int:
        """`signal_delay_s`, but no more than half of a short time limit."""
        if self.timeout_min is None:
            return self.signal_delay_s
        return min(self.signal_delay_s, 30 * self.timeout_min)

    @property
    def tasks_per_node(self) -> int:
        """Processes per node: one per GPU, or one on the CPU."""
        return max(1, self.gpus_per_node)


@dataclass(frozen=True)
class TrackingConfig:
    """Where the run is mirrored in Weights & Biases."""

    wandb_project: str = "flow-matching-study"
    """Project in W&B."""

    wandb_entity: OptionalStr = None
    """User or team in W&B; default: your own."""

    wandb_base_url: OptionalStr = None
    """Server, as https://wandb.my-lab.org; default: W&B's own."""

    wandb_mode: WandbMode = "auto"
    """auto: online where there is a login, else offline; disabled leaves W&B out altogether."""

    @property
    def place(self) -> str:
        """Where in W&B: "the-lab/study", "study at https://wandb.my-lab.org"."""
        place = "/".join(filter(None, [self.wandb_entity, self.wandb_project]))
        return f"{place} at {self.wandb_base_url}" if self.wandb_base_url else place

    def __post_init__(self) -> None:
        take_types(self)
        _require_choice("wandb_mode", self.wandb_mode, WandbMode)
        if self.wandb_base_url is not None and not is_server(self.wandb_base_url):
            raise ConfigError(
                f"--wandb-base-url, WANDB_BASE_URL: found {self.wandb_base_url!r}, expected an "
                "address as https://wandb.my-lab.org"
            )
        # W&B would refuse it too, but when the run has started and nobody looks.
        _check_wandb_name("--wandb-project", self.wandb_project)

    def check_asked(self, group: str) -> None:
        """Raise a ConfigError for what W&B would refuse; for a run that is submitted, not read."""
        if self.wandb_mode == "disabled":
            return
        if self.wandb_entity:
            _check_wandb_name("--wandb-entity, WANDB_ENTITY", self.wandb_entity)
        if len(group) > NAME_IN_WANDB_LIMIT:
            raise ConfigError(
                f"--group: found {len(group)} characters, expected at most "
                f"{NAME_IN_WANDB_LIMIT}, as W&B does"
            )


@dataclass(frozen=True)
class RestartConfig:
    """When a run is restarted automatically. Preemptions and time limits always restart it."""

    retries: int = 0
    """Automatic restarts after a transient failure: node lost, out of memory, killed, GPU lost
    after its first step, file system; never after an exception of the code."""

    give_up_after: int = 5
    """Attempts in a row without a new step after which the run stops."""

    def __post_init__(self) -> None:
        take_types(self)
        _require(self, "retries", minimum=0)
        _require(self, "give_up_after", minimum=1)


def _check_wandb_name(option: str, name: str) -> None:
    if not re.fullmatch(rf"[^/\\#?%:]{{1,{NAME_IN_WANDB_LIMIT}}}", name):
        raise ConfigError(
            f"{option}: found {name!r}, expected a name of at most {NAME_IN_WANDB_LIMIT} "
            "characters without / \\ # ? % : (TEAM/PROJECT is --wandb-entity TEAM "
            "--wandb-project PROJECT)"
        )


@dataclass(frozen=True)
class RunConfig:
    """All that a job needs to know; a run's `config.json`."""

    training: TrainingConfig = field(default_factory=TrainingConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    restarts: RestartConfig = field(default_factory=RestartConfig)


# The config of each part of a run, by the name that the run's `config.json` has for it.
PARTS: dict[str, Any] = {part.name: part.default_factory for part in dataclasses.fields(RunConfig)}


def differences_from_defaults(config: RunConfig) -> dict[str, Any]:
    """The options that are not the default, by their names."""
    changed = {}
    for part, cls in PARTS.items():
        given, default = getattr(config, part), cls()
        for option in dataclasses.fields(cls):
            if (value := getattr(given, option.name)) != getattr(default, option.name):
                changed[option.name] = value
    return changed


def is_data_file(dataset: str) -> bool:
    """Whether `--dataset` is the path of a file rather than the name of splits."""
    return dataset.endswith(DATA_FILE_SUFFIXES)


def is_path(field: str, value: str) -> bool:
    """Whether the value of a field is the path of a file."""
    return field == "init_from" or (field in DATA_FIELDS and is_data_file(value))


def value_in_name(field: str, value: Any) -> str:
    """The value of a field in the words that a run's name has for it."""
    if field in ("arch", "flow"):
        label, _, path = str(value).rpartition("=")
        return label or path.rpartition(":")[2]
    if field in ("init_from", "reflow_from"):
        return Path(str(value).partition(PINNED)[0]).name
    if field in DATA_FIELDS and is_data_file(str(value)):
        return Path(str(value)).stem
    return str(value)


def signature_of(training: Mapping[str, Any]) -> str:
    """The signature of a training config as JSON has it."""
    relevant = {
        key: value
        for key, value in _relevant(training).items()
        if key not in LATER or value != _default(key)
    }
    canonical = json.dumps(relevant, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def signature_differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """A line for each field that decides the result and differs between two training configs.

    A field that one of them lacks, by its age, is unknown there and no difference.
    """
    old, new = _relevant(there), _relevant(here)
    lines = [
        f"  {flag(key)}: {there.get(key, _default(key))} there, {here[key]} asked for"
        for key in here
        if key in old and key in new and old[key] != new[key] and key != "arch_args"
    ]
    arguments = [found.get("arch_args") or {} for found in (old, new)]
    for key in dict.fromkeys(key for of in arguments for key in of):
        values = [of.get(key, "the default") for of in arguments]
        if values[0] != values[1]:
            name = flag(key) if key in SIZE_FIELDS else f"--arch-args {key}"
            lines.append(f"  {name}: {values[0]} there, {values[1]} asked for")
    return lines


def not_said(training: Mapping[str, Any]) -> list[str]:
    """The options that decide the result and of which a training config says nothing."""
    known = NOT_IN_SIGNATURE | LATER | training.keys()
    fields = dataclasses.fields(TrainingConfig)
    return [flag(field.name) for field in fields if field.name not in known]


def _relevant(training: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a training config that decide the result, files by their content alone."""
    whole = {key: _default(key) for key in LATER} | dict(training)
    found = {key: value for key, value in whole.items() if key not in NOT_IN_SIGNATURE}
    for key in ("init_from", "reflow_from"):
        found[key] = found[key] and found[key].rpartition(PINNED)[2]
    if is_data_file(str(found["source"])):
        found["source"] = "a file"
    # By whichever option it was given.
    if arguments := _model_args(found):
        found["arch_args"] = arguments
    if "width" in arguments:
        found["params"] = None  # what it was chosen for decides nothing more
    return {key: value for key, value in found.items() if key not in SIZE_FIELDS}


def _model_args(training: Mapping[str, Any]) -> dict[str, Any]:
    fields = {name: training[name] for name in SIZE_FIELDS if training[name] is not None}
    return {**(training.get("arch_args") or {}), **fields}


def _default(key: str) -> Any:
    """The default of a field, where that is no object of its own."""
    return getattr(TrainingConfig, key)


def config_to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON's types."""
    found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return found


def run_config_from_dict(found: Mapping[str, Any]) -> RunConfig:
    """The inverse of `config_to_dict` for a whole run.

    Raises:
        ConfigError: A field that this version of flowjobs does not know, or a bad value.
    """
    return RunConfig(
        **{name: _part_from_dict(name, cls, found.get(name, {})) for name, cls in PARTS.items()}
    )


def _part_from_dict(name: str, cls: Any, found: Any) -> Any:
    known = {known.name for known in dataclasses.fields(cls)}
    if isinstance(found, dict) and (unknown := sorted(set(found) - known)):
        raise ConfigError(
            f"{cls.__name__}: unknown fields {', '.join(unknown)}; "
            "was this written by a newer flowjobs?"
        )
    try:
        return from_json(cls, found)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error


def is_server(url: str) -> bool:
    """Whether that is the address of a web server."""
    try:
        found = urlsplit(url)
        return found.scheme in ("http", "https") and bool(found.hostname) and found.port != 0
    except ValueError:  # the port is no number, say
        return False


def _require(
    config: Any,
    name: str,
    minimum: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> None:
    value, expected = getattr(config, name), ""
    # No text is made of what is as it should be: a sweep has thousands of configs.
    if isinstance(value, float) and not math.isfinite(value):
        expected = "a finite number"
    elif minimum is not None and not value >= minimum:
        expected = f"at least {minimum}"
    elif above is not None and not value > above:
        expected = f"more than {above}"
    elif below is not None and not value < below:
        expected = f"less than {below}"
    elif isinstance(value, int) and value > MAX_SEED:  # no counter of 64 bits holds it
        expected = f"at most {MAX_SEED}"
    if expected:
        raise ConfigError(f"{flag(name)}: found {value}, expected {expected}")


def _check_batch_script(option: str, value: Any) -> None:
    # A line break would make a line of the batch script of what follows it.
    if isinstance(value, str) and (fault := fault_of_text(value)):
        raise ConfigError(f"{option}: found {value!r} with {fault}, expected text without")


def fault_of_text(text: str) -> str:
    """What a text has that batch scripts, or files in UTF-8, cannot hold; empty: nothing."""
    if text.isprintable():
        return ""  # of most, and they are many
    if any(character < " " for character in text):
        return "a control character"
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of a command line that are no text
        return "bytes that are not UTF-8"
    return ""


def _require_choice(name: str, value: str, literal: Any) -> None:
    choices = get_args(literal)
    if value not in choices:
        raise ConfigError(f"{flag(name)}: found {value!r}, expected one of {', '.join(choices)}")
