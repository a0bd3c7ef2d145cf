"""Whether a run is tracked online or offline. Decided without loading wandb."""

import configparser
import netrc
import os
from contextlib import suppress
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from flowjobs.config import TrackingConfig

# Where wandb goes without WANDB_BASE_URL: 0.31 and later, and before.
DEFAULT_HOSTS = ["api.forge.coreweave.com", "api.wandb.ai"]

ResolvedMode = Literal["online", "offline", "disabled"]


def resolve_mode(config: TrackingConfig) -> tuple[ResolvedMode, str]:
    """The mode that applies on this machine, and why, in words for a person.

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
    if os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    url = os.environ.get("WANDB_BASE_URL") or _url_of_login()
    return api_key(url or f"https://{DEFAULT_HOSTS[0]}") is not None


def api_key(url: str) -> str | None:
    """The key that wandb would use at a server: the environment's, else the netrc file's."""
    host = urlsplit(url).netloc
    # A login at the one name of W&B's own server is good for the other.
    hosts = DEFAULT_HOSTS if host in DEFAULT_HOSTS else [host]
    return next(filter(None, map(_api_key_for, hosts)), None)


def _url_of_login() -> str | None:
    """The server of `wandb login --host`, as wandb's settings file has it."""
    folder = os.environ.get("WANDB_CONFIG_DIR") or os.path.expanduser("~/.config/wandb")
    settings = configparser.ConfigParser(interpolation=None)
    with suppress(OSError, configparser.Error):
        settings.read(Path(folder) / "settings")
    return settings.get("default", "base_url", fallback=None)


def _api_key_for(host: str) -> str | None:
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    home = Path(os.path.expanduser("~"))
    for candidate in (os.environ.get("NETRC"), home / ".netrc", home / "_netrc"):
        try:
            # Not authenticators(): it takes the file's default entry for any host.
            found = netrc.netrc(candidate).hosts.get(host) if candidate else None
        except (OSError, netrc.NetrcParseError):
            continue
        if found:
            return found[2]
    return None
