"""What a user can mend."""


class UserError(Exception):
    """A message of one line per bad thing: the file or argument, what was expected and what came. The command prints it and exits with 2."""
