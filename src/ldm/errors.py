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
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError) and cause.errno in (ENOSPC, EDQUOT):
                where = f" for {cause.filename}" if cause.filename else ""
                raise UserError(
                    f"no space is left on the disk{where}. What was written before is whole: make room and give the "
                    "same command again"
                ) from error
            cause = cause.__cause__ or cause.__context__
        raise
