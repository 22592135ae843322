"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """Say what is wrong, where, why, and the command that mends it.

    The command line prints the message without a traceback and exits with code 2.
    """
