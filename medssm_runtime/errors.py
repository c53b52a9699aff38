"""What a user can mend."""

from __future__ import annotations


class UserError(Exception):
    """A message of one line: the file or argument, what was expected and what came. The command exits with 2."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type when it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
