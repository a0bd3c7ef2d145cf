"""Whether a run is tracked online or offline, and at which server. Loads no wandb."""

import configparser
import netrc
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal, cast, get_args
from urllib.parse import urlsplit

from flowjobs.config import TrackingConfig, WandbMode, is_server
from flowjobs.errors import ConfigError, LoginError, ServerError
from flowjobs.runs.hint import program

# Where wandb goes without WANDB_BASE_URL: 0.31 and later, and before.
DEFAULT_HOSTS = ["api.forge.coreweave.com", "api.wandb.ai"]

# A key in them is for the server that is meant here, and goes to no other.
CREDENTIALS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
# wandb makes no login of these, but sends them.
MORE_CREDENTIALS = (
    "WANDB_CREDENTIALS_FILE",
    "WANDB_X_EXTRA_HTTP_HEADERS",
    "WANDB__EXTRA_HTTP_HEADERS",
)

PROBE_TIMEOUT_S = 3.0

ResolvedMode = Literal["online", "offline", "disabled"]
# wandb's older words for them.
OLDER_WORDS = {"dryrun": "offline", "run": "online"}


def resolve_mode(
    config: TrackingConfig, why: str = "mode of the run's config"
) -> tuple[ResolvedMode, str]:
    """The mode that applies on this machine, and why, in words.

    `WANDB_MODE` wins over the config, as it does in wandb itself.

    Args:
        config: How the run is to be tracked.
        why: What gave the config its mode.
    """
    asked: str = config.wandb_mode
    if environment := mode_of_variable():
        asked, why = environment, f"WANDB_MODE={environment}"
    match asked:
        case "online" | "offline" | "disabled":
            return asked, why
    server = server_of(config)
    if has_login(server):
        return "online", "there is a login"
    if not is_here(server):
        return "offline", f"no login for {server} here: {_to_log_in(server)}"
    log_in = f"`{program('wandb')} login`"
    return "offline", f"no login here: {log_in} or WANDB_API_KEY would make it online"


def tracking_in_words(config: TrackingConfig, why: str = "mode of the run's config") -> list[str]:
    """Lines that say where in W&B a run goes, see `resolve_mode`, and what is not used for it."""
    mode, reason = resolve_mode(config, why)
    if mode == "disabled":
        return [f"W&B disabled ({reason})"]
    lines = [f"W&B {mode}: {config.place} ({reason})"]
    project, source = os.environ.get("WANDB_PROJECT", "").strip(), "WANDB_PROJECT"
    if not project:
        project, source = setting("project")
    # Whoever has chosen one knows which it is.
    if project and config.wandb_project == TrackingConfig.wandb_project != project:
        lines.append(f"project {project} of {source} is not used: see --wandb-project")
    return lines


def has_login(server: str) -> bool:
    """Whether wandb would find credentials: in the environment, its settings or the netrc file."""
    if is_here(server) and variables().keys() & {*CREDENTIALS}:
        return True
    with suppress(OSError, ValueError, netrc.NetrcParseError):  # of bytes that are no text
        # Not authenticators(): it takes the file's default entry for any host.
        hosts = netrc.netrc(_netrc_file()).hosts
        return next((bool(hosts[each][2]) for each in _names_of(server) if each in hosts), False)
    return False


def _netrc_file() -> str:
    """The one netrc file that wandb reads, which need not be there."""
    if named := os.environ.get("NETRC"):
        return os.path.expanduser(named)  # as a crontab has it: no shell has read it
    unix, windows = (os.path.expanduser(f"~/{name}") for name in (".netrc", "_netrc"))
    return windows if os.path.exists(windows) and not os.path.exists(unix) else unix


def check_login(server: str) -> None:
    """Raise what keeps this machine from a server.

    Raises:
        ConfigError: It is no address.
        LoginError: There is no key for it.
    """
    if not is_server(server):
        raise ConfigError(
            f"WANDB_BASE_URL: found {server!r}, expected an address as https://{DEFAULT_HOSTS[0]}"
        )
    if not has_login(server):
        raise LoginError(f"no login for W&B at {server}: {_to_log_in(server)}")


def _to_log_in(server: str) -> str:
    wandb = program("wandb")
    if is_here(server):
        return (
            f"run `{wandb} login` once on this machine, or set WANDB_API_KEY (and WANDB_BASE_URL "
            "for a server of your own)"
        )
    return (
        f"run `{wandb} login --host {server}` once on this machine, or set "
        f"WANDB_BASE_URL={server} and its WANDB_API_KEY"
    )


def check_server_answers(server: str) -> None:
    """Raise a ServerError if nothing listens at a server's address.

    `wandb.init` would find out in half a minute; `wandb.setup()` would wait for ever if wandb's own
    process is killed as it starts (0.31).
    """
    from urllib.request import getproxies  # loads ssl, which no command line's start needs

    url = urlsplit(server)
    ours = variables().keys() & {f"WANDB_{url.scheme.upper()}_PROXY", "WANDB__PROXIES"}
    if getproxies().get(url.scheme) or ours:
        return
    address = (url.hostname or "", url.port or (443 if url.scheme == "https" else 80))
    try:
        socket.create_connection(address, PROBE_TIMEOUT_S).close()
    except OSError as error:
        why = error.strerror or error
        raise ServerError(f"cannot reach W&B at {server} ({why})") from error


def server_of(config: TrackingConfig) -> str:
    """The address of the server that a run is at; where its config names none, of the one here."""
    return (config.wandb_base_url or server_url()).rstrip("/")


def server_url() -> str:
    """The server that this machine's settings mean; a key in the environment is for this one."""
    return variables().get("WANDB_BASE_URL", f"https://{DEFAULT_HOSTS[0]}").rstrip("/")


def server_of_settings() -> tuple[str, str]:
    """The server that W&B's settings file of this user names, and the file; "" if it names none."""
    server = _settings_in(_user_file()).get("base_url", "").strip()
    return (server, str(_user_file())) if server else ("", "")


def is_here(server: str) -> bool:
    """Whether a server is the one that is meant here."""
    return _names_of(server) == _names_of(server_url())


def _names_of(server: str) -> list[str]:
    host = ""
    with suppress(ValueError):  # it is no address, which `check_login` says
        host = urlsplit(server).netloc.lower().removesuffix(":443")
    # A login at the one name of W&B's own server is good for the other.
    return DEFAULT_HOSTS if host in DEFAULT_HOSTS else [host]


def variables() -> dict[str, str]:
    """The environment, and what W&B's settings file of this user says as if it stood there."""
    of_user = _settings_in(_user_file())
    settings = {f"WANDB_{name.upper()}": value for name, value in of_user.items()}
    # A key out of a file ends with its newline, which wandb refuses; an empty one is none.
    found = [*settings.items(), *os.environ.items()]  # the environment wins
    return {name: value.strip() for name, value in found if value.strip()}


def entity_here() -> str | None:
    """The entity that W&B's own variable, or settings, name here; None where none do.

    To be read once, as a run is made: an attempt, or a sync, that started elsewhere would find
    another one, and so another run in W&B.
    """
    return os.environ.get("WANDB_ENTITY", "").strip() or setting("entity")[0] or None


def mode_of_variable(environment: Mapping[str, str] = os.environ) -> ResolvedMode | None:
    """What WANDB_MODE says; None where it says nothing that counts.

    To be noted as a run is made, too: whoever records how it ended may have another environment.
    """
    mode = environment.get("WANDB_MODE", "").strip().lower()
    mode = OLDER_WORDS.get(mode, mode)
    return cast(ResolvedMode, mode) if mode in get_args(ResolvedMode) else None


def mode_of_settings() -> tuple[str, str]:
    """`setting` for the mode, which `wandb offline`, `online` and `disabled` write."""
    mode, file = setting("mode")
    mode = OLDER_WORDS.get(mode, mode)
    return (mode, file) if mode in get_args(WandbMode) else ("", "")


def setting(name: str) -> tuple[str, str]:
    """What W&B's settings files say of this name, and the file that does; "" where none does."""
    # wandb's own order: the working directory's wins.
    folder = ".wandb" if os.path.exists(".wandb") else "wandb"
    for file in (Path(folder) / "settings", _user_file()):
        if value := _settings_in(file).get(name, "").strip():
            return value, str(file)
    return "", ""


def _user_file() -> Path:
    folder = os.environ.get("WANDB_CONFIG_DIR") or os.path.join("~", ".config", "wandb")
    return Path(os.path.expanduser(folder)) / "settings"


def _settings_in(file: Path) -> dict[str, str]:
    settings = configparser.ConfigParser(interpolation=None)
    with suppress(OSError, ValueError, configparser.Error):
        settings.read(file)
    return dict(settings["default"]) if settings.has_section("default") else {}
