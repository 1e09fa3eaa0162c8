"""The one error that means the user, and not the code."""


class UserError(Exception):
    """What the user gave can't be used. The message is one line: the bad value and the way out.

    A script ends with that line. Every other exception keeps its traceback, because it shows
    where the code broke.
    """


def one_line(error, longest=200):
    """What an exception of another library says, on one line of at most so many characters."""
    return " ".join(str(error).split())[:longest]
