"""What stops a run, in one sentence. `launch` turns it into an exit status, without a traceback."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rvdist.core.text import printable

_OF_A_PLACE = (
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
)


class _Sentence(Exception):
    """Names what strangers wrote, so it is shown on one line that does nothing to a terminal, and is never endless."""

    def __str__(self) -> str:
        return printable(super().__str__())


class BadInput(_Sentence):
    """Input that cannot be used: the message names the file, tensor or key, what is wrong and what to do. Status 2."""


class Failed(_Sentence):
    """Something outside the input went wrong (a full disk, workers that die): what, and how to go on. Status 1."""


def as_ours(error: Exception) -> Exception:
    """What the system refuses for a file's name, place or owner is input; everything else is what it was."""
    if isinstance(error, OSError) and error.errno in _OF_A_PLACE and error.filename is not None:
        return BadInput(
            f"{error.filename}: cannot be read or written ({error.strerror}); name another place, or mend what it is"
        )
    return error


@contextmanager
def sentence_at_the_end() -> Iterator[None]:
    """Ends a small command, one without a run directory, at what stops it: in one sentence, by its status."""
    try:
        yield
    except (BadInput, Failed, OSError) as error:
        ours = as_ours(error)
        print(f"rvdist: {printable(str(ours))}", file=sys.stderr)
        sys.exit(2 if isinstance(ours, BadInput) else 1)
    except KeyboardInterrupt:
        print("rvdist: interrupted", file=sys.stderr)
        sys.exit(130)
