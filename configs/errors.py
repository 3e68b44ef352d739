"""The one error type that a user's input may cause."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user gave is wrong.

    The message is one line: what is wrong, where (file, row, value), how to mend it. The command
    line prints it on stderr and exits with code 2; anything else that is raised is a bug.
    """
