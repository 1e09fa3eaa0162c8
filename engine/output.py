"""
What a script prints to: a pipe whose reader has gone, a full disk, a terminal without ∑ or é.
"""
import contextlib
import errno
import os
import sys

GONE = errno.EPIPE, errno.EINVAL  # Windows says EINVAL


class Output:
    """sys.stdout or sys.stderr, around the stream that it was before.

    Where that can't be written any more, `on_loss` is called, and what is printed from then on
    goes nowhere.
    """

    def __init__(self, stream, on_loss):
        self.stream, self.on_loss = stream, on_loss
        if hasattr(stream, "reconfigure"):  # not in a notebook
            stream.reconfigure(errors="backslashreplace")  # of characters that it does not have

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self.attempt(self.stream.write, text)

    def flush(self):
        return self.attempt(self.stream.flush)

    def attempt(self, call, *args):
        try:
            return call(*args)
        except OSError as error:
            with contextlib.suppress(OSError):  # a stream that is no file
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())  # what is still in the buffer, too
                os.close(nowhere)
            self.on_loss(error)


@contextlib.contextmanager
def printing(script):
    """Print through `Output` in this block. A stream that was closed prints nothing.

    Where stdout is lost the script ends: without a word if the reader of a pipe has gone, as in
    `python eval.py | head -1`, else with the reason. A training run saves first
    (`run.StopSignal`). It goes on without its stderr, which has progress and warnings only.
    """

    def end(error):
        if error.errno in GONE:
            sys.exit(141)  # 128 + SIGPIPE, as a shell has it of any program
        sys.exit(f"{script}: what it prints can't be written: {error.strerror}")

    def go_on(error):
        pass

    before = sys.stdout, sys.stderr
    streams = [stream or open(os.devnull, "w", encoding="utf-8") for stream in before]
    sys.stdout, sys.stderr = output, errors = Output(streams[0], end), Output(streams[1], go_on)
    try:
        yield
        output.flush()
    finally:
        output.on_loss = go_on
        output.flush()
        errors.flush()
        sys.stdout, sys.stderr = before
