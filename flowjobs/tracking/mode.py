"""Whether a run is tracked online or offline, and at which server. Loads no wandb."""

import configparser
import netrc
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from flowjobs.config import TrackingConfig
from flowjobs.errors import ConfigError, LoginError, ServerError

# Where wandb goes without WANDB_BASE_URL: 0.31 and later, and before.
DEFAULT_HOSTS = ["api.forge.coreweave.com", "api.wandb.ai"]

PROBE_TIMEOUT_S = 3.0

ResolvedMode = Literal["online", "offline", "disabled"]


def resolve_mode(config: TrackingConfig) -> tuple[ResolvedMode, str]:
    """The mode that applies on this machine, and why, in words.

    `WANDB_MODE` wins over the config, as it does in wandb itself.
    """
    asked: str = config.wandb_mode
    why = f"--wandb-mode {asked}"
    environment = os.environ.get("WANDB_MODE", "").lower()
    words = {"dryrun": "offline", "run": "online"}  # wandb's older ones
    environment = words.get(environment, environment)
    if environment in ("online", "offline", "disabled"):
        asked, why = environment, f"WANDB_MODE={environment}"
    match asked:
        case "online" | "offline" | "disabled":
            return asked, why
    if has_login():
        return "online", "there is a login"
    return "offline", "no login here: `wandb login` or WANDB_API_KEY would make it online"


def has_login() -> bool:
    """Whether wandb would find credentials: in the environment or in the netrc file."""
    names = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
    if any(os.environ.get(name, "").strip() for name in names):
        return True
    host = urlsplit(server_url()).netloc
    # A login at the one name of W&B's own server is good for the other.
    hosts = DEFAULT_HOSTS if host in DEFAULT_HOSTS else [host]
    home = Path(os.path.expanduser("~"))
    for file in (os.environ.get("NETRC"), home / ".netrc", home / "_netrc"):
        with suppress(OSError, ValueError, netrc.NetrcParseError):  # of bytes that are no text
            # Not authenticators(): it takes the file's default entry for any host.
            if any(netrc.netrc(file).hosts.get(each) for each in hosts):
                return True
    return False


def check_login() -> None:
    """Raise what keeps this machine from any server.

    Raises:
        ConfigError: WANDB_BASE_URL is no address.
        LoginError: There is no key.
    """
    url = urlsplit(server_url())
    is_address = False
    with suppress(ValueError):  # the port is no number
        is_address = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    if not is_address:
        raise ConfigError(
            f"WANDB_BASE_URL: found {server_url()!r}, expected an address as https://{DEFAULT_HOSTS[0]}"
        )
    if not has_login():
        raise LoginError(
            f"no login for W&B at {server_url()}: run `wandb login` once on this machine, or set "
            "WANDB_API_KEY (and WANDB_BASE_URL for a server of your own)"
        )


def check_server_answers() -> None:
    """Raise a ServerError if nothing listens at W&B's address.

    `wandb.init` would find out in half a minute; `wandb.setup()` would wait for ever if wandb's own
    process is killed as it starts (0.31).
    """
    from urllib.request import getproxies  # loads ssl, which no command line's start needs

    url = urlsplit(server_url())
    proxy = f"WANDB_{url.scheme.upper()}_PROXY"
    if getproxies().get(url.scheme) or os.environ.get(proxy):
        return
    address = (url.hostname or "", url.port or (443 if url.scheme == "https" else 80))
    try:
        socket.create_connection(address, PROBE_TIMEOUT_S).close()
    except OSError as error:
        why = error.strerror or error
        raise ServerError(f"cannot reach W&B at {server_url()} ({why})") from error


def server_url() -> str:
    """The server's address: the environment's, or the one of `wandb login --host`."""
    url = os.environ.get("WANDB_BASE_URL", "").strip() or settings_of_user().get("base_url")
    return (url or f"https://{DEFAULT_HOSTS[0]}").rstrip("/")


def settings_of_user() -> dict[str, str]:
    """What W&B's settings file of this user says."""
    return _settings_in(_user_file())


def entity_here() -> str | None:
    """The entity that W&B's own variable, or settings, name here; None where none do.

    To be read once, as a run is made: an attempt, or a sync, that started elsewhere would find
    another one, and so another run in W&B.
    """
    return os.environ.get("WANDB_ENTITY", "").strip() or entity_of_settings()[0] or None


def entity_of_settings() -> tuple[str, str]:
    """The entity that W&B's settings files name, and the file that does; "" where none does."""
    # wandb's own order: the working directory's wins.
    folder = ".wandb" if Path(".wandb").exists() else "wandb"
    for file in (Path(folder) / "settings", _user_file()):
        if entity := _settings_in(file).get("entity", "").strip():
            return entity, str(file)
    return "", ""


def _user_file() -> Path:
    folder = os.environ.get("WANDB_CONFIG_DIR") or os.path.join("~", ".config", "wandb")
    return Path(os.path.expanduser(folder)) / "settings"


def _settings_in(file: Path) -> dict[str, str]:
    settings = configparser.ConfigParser(interpolation=None)
    with suppress(OSError, ValueError, configparser.Error):
        settings.read(file)
    return dict(settings["default"]) if settings.has_section("default") else {}
