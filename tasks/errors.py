"""The one error that means the user, and not the code."""


class UserError(Exception):
    """What the user gave can't be used. The message is one line: the bad value and the way out.

    A script ends with that line. Every other exception keeps its traceback, because it shows
    where the code broke.
    """
