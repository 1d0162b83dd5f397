"""What stops a run, in one sentence. `launch` turns it into an exit status, without a traceback."""


class BadInput(Exception):
    """Input that cannot be used: the message names the file, tensor or key, what is wrong and what to do. Status 2."""


class Failed(Exception):
    """Something outside the input went wrong (a full disk, workers that die): what, and how to go on. Status 1."""
