"""A full disk is told in one line, however deep below it was found."""

import errno
import os
from pathlib import Path

import pytest

from ldm.errors import UserError, explaining_full_disk


def test_a_full_disk_below_another_error():
    with (
        pytest.raises(UserError, match=r"^no space is left on the disk for /x/y\. .*same command again$"),
        explaining_full_disk(),
    ):
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/x/y")
        except OSError:
            raise RuntimeError("unexpected pos 832 vs 726")  # noqa: B904 as torch.save does


def test_a_full_disk_that_was_dealt_with_is_no_cause():
    with pytest.raises(ValueError, match="of its own"), explaining_full_disk():
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            raise ValueError("of its own") from None
    with pytest.raises(UserError, match="no space"), explaining_full_disk():
        raise ValueError("above") from OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "no"), ValueError("x"), UserError("mine")])
def test_other_errors_are_what_they_are(error):
    with pytest.raises(type(error)) as raised, explaining_full_disk():
        raise error
    assert raised.value is error


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the device that is always full is Linux's")
def test_a_device_that_is_full():
    with pytest.raises(UserError, match="no space is left"), explaining_full_disk(), open("/dev/full", "wb", 0) as file:
        file.write(b"x")
