"""Which code a run is trained with: the flags of all commands that begin or resume one."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from flowjobs.cli.parser import Flag
from flowjobs.errors import ConfigError
from flowjobs.field_values import flag

if TYPE_CHECKING:
    from flowjobs.jobs.snapshot import CodeChoice


@dataclass(frozen=True)
class CodeOptions:
    """What to do with the user's code, of which a run keeps a snapshot."""

    keep_code: Flag = False
    """Resume with the code that the run was submitted with, where yours has changed since."""

    new_code: Flag = False
    """Resume with your code as it is now."""

    no_snapshot: Flag = False
    """Keep no copy of your code with the run: each start imports it as it is then."""

    def flags(self) -> list[str]:
        """Those that are given."""
        given = {flag(known.name): getattr(self, known.name) for known in fields(CodeOptions)}
        return [name for name, is_given in given.items() if is_given]

    def code_choice(self, default: "CodeChoice" = "ask") -> "CodeChoice":
        """What the flags say.

        Args:
            default: What holds without any.

        Raises:
            ConfigError: They contradict one another.
        """
        given = self.flags()
        if len(given) > 1:
            raise ConfigError(f"found {' and '.join(given)}, expected one of them")
        if self.keep_code:
            return "keep"
        if self.new_code:
            return "new"
        return "live" if self.no_snapshot else default
