"""What stops a run, in one sentence. `launch` turns it into an exit status, without a traceback."""

from rvdist.core.text import printable


class _Sentence(Exception):
    """Names what strangers wrote, so it is shown on one line that does nothing to a terminal, and is never endless."""

    def __str__(self) -> str:
        return printable(super().__str__())


class BadInput(_Sentence):
    """Input that cannot be used: the message names the file, tensor or key, what is wrong and what to do. Status 2."""


class Failed(_Sentence):
    """Something outside the input went wrong (a full disk, workers that die): what, and how to go on. Status 1."""
