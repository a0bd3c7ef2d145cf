"""flowjobs completion."""

import contextlib
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from flowjobs.cli.commands import COMMANDS, command_of
from flowjobs.cli.defaults import Defaults
from flowjobs.cli.parser import read_command_line

# bash's own way, which zsh has too. Runs and sweeps are those of the default study there; what is
# called otherwise than a run can be is left out: compgen would run code in it, as in $(name).
# The user's aliases (ls -F) and CDPATH are not to be used; in zsh, `command cd` is no builtin.
SCRIPT = """\
{begin}_flowjobs() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} words
    case "$COMP_CWORD:$word:${{COMP_WORDS[1]}}" in
        1:*) words="{commands}" ;;
{cases}
        *) words=$(CDPATH= builtin cd -- "${{FLOWJOBS_STUDY:-study}}" 2>/dev/null && {{
                command ls runs; command ls sweeps | command sed -n 's/[.]runs$//p'
                }} 2>/dev/null | command grep -xE '[A-Za-z0-9][A-Za-z0-9._-]*') ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _flowjobs flowjobs
"""
BEGIN = {"bash": "", "zsh": "autoload -U +X bashcompinit && bashcompinit\n"}


@dataclass(frozen=True)
class Completion:
    """Print a completion script for bash or zsh.

    bash: `flowjobs completion bash >> ~/.bash_completion`; zsh: `flowjobs completion zsh >>
    ~/.zshrc`.
    """

    shell: Annotated[Literal["bash", "zsh"], tyro.conf.Positional]
    """Which shell."""

    def run(self, defaults: Defaults) -> int:
        """Print. Returns the exit code."""
        print(completion_script(self.shell, {name: command_of(name) for name in COMMANDS}), end="")
        return 0


def completion_script(shell: Literal["bash", "zsh"], commands: Mapping[str, type]) -> str:
    """The script that completes these commands, their flags, and the names of runs."""
    cases = "\n".join(
        f'        *:-*:{name}) words="{" ".join(flags)}" ;;'
        for name, flags in flags_of(commands).items()
    )
    return SCRIPT.format(begin=BEGIN[shell], commands=" ".join(commands), cases=cases)


def flags_of(commands: Mapping[str, type]) -> dict[str, list[str]]:
    """The flags of each command, as its help lists them."""
    flags = {}
    for name, command in commands.items():
        with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
            read_command_line(command, f"flowjobs {name}", ["--help"])
        # At the beginning of a line, or after another flag: not those that a text speaks of.
        rows = re.findall(r"^[^\w-]*((?:--?[a-z-]+[ ,]*)+)", shown.getvalue(), re.MULTILINE)
        flags[name] = sorted({flag for row in rows for flag in re.findall(r"--[a-z-]+", row)})
    return flags
