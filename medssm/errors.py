"""What a user can mend, and how medssm is installed."""

from __future__ import annotations


class UserError(Exception):
    """A message of one line for each thing that is wrong: the file or argument, what was expected and what came. The command exits with 2."""


def install_command(extra: str = "", again: bool = False) -> str:
    """The command that installs medssm, for a message. No package index has it yet: it is installed from its source folder.

    Args:
        extra: segment, io, view, explain, export, nnunet or dev
        again: build the kernels anew over an installation that lacks them
    """
    options = " --no-cache-dir --force-reinstall --no-deps" if again else ""
    what = f"'.[{extra}]'" if extra else "."
    return f"pip install{options} {what} (in medssm's source folder)"
