"""What the user did wrong, in one sentence. `launch` turns it into exit status 2 without a traceback."""


class BadInput(Exception):
    """Input that cannot be used: the message names the file, tensor or key, what is wrong and what to do."""
