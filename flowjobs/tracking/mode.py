"""Whether a run is tracked online or offline. Decided without loading wandb."""

import netrc
import os
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
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    url = os.environ.get("WANDB_BASE_URL")
    hosts = [urlsplit(url).netloc] if url else DEFAULT_HOSTS
    home = Path.home()
    candidates = [os.environ.get("NETRC"), str(home / ".netrc"), str(home / "_netrc")]
    for candidate in filter(None, candidates):
        try:
            logins = netrc.netrc(candidate).hosts
        except (OSError, netrc.NetrcParseError):
            continue
        if logins.keys() & set(hosts):
            return True
    return False
