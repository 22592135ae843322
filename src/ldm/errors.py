"""The one exception that means: the user can mend this."""

from collections.abc import Iterator
from contextlib import contextmanager
from errno import EDQUOT, ENOSPC


class UserError(Exception):
    """Say what is wrong, where, why, and the command that mends it.

    The command line prints the message without a traceback and exits with code 2.
    """


@contextmanager
def explaining_full_disk() -> Iterator[None]:
    """Say in one line that a disk is full, however deep below that was found.

    Raises:
        UserError: there is an `OSError` of that kind among the causes of an exception.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (cause := full_disk(error)) is None:
            raise
        where = f" for {cause.filename}" if cause.filename else ""
        raise UserError(
            f"no space is left on the disk{where}. What was written before is whole: make room and give the same "
            "command again"
        ) from error


def full_disk(error: BaseException | None) -> OSError | None:
    """Return the error of a full disk, or of a spent quota, among an exception and its causes; None without one."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT):
            return error
        # What `from None` hides was dealt with: it is no cause.
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None
