"""A checkpoint is whole or absent, and data, not code."""

import errno
import os
import pickle
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldm.errors import UserError
from ldm.training import fit, stages
from ldm.training.checkpointing import (
    VERSION,
    AtomicCheckpointIO,
    check_room,
    newest_whole,
    read_header,
)
from probes import Stopped
from runs import tiny_config
from training_checks import assert_equal

CONTENT = {"identity": {"seed": 0}, "global_step": 3, "state_dict": {"a": torch.arange(1000.0)}}


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture
def io() -> AtomicCheckpointIO:
    return AtomicCheckpointIO()


def test_what_is_written_is_read(io, tmp_path):
    path = tmp_path / "a" / "b" / "last.ckpt"
    io.save_checkpoint(CONTENT, path)
    read = io.load_checkpoint(path)
    assert torch.equal(read["state_dict"]["a"], CONTENT["state_dict"]["a"]) and read["global_step"] == 3
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    assert read_header(path) == ({"seed": 0}, 3, 0, None)
    io.save_checkpoint({**CONTENT, "version": VERSION, "batch": 8}, path)
    assert read_header(path) == ({"seed": 0}, 3, VERSION, 8)


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_the_old_one(io, tmp_path, monkeypatch, fault):
    path = tmp_path / "last.ckpt"
    io.save_checkpoint(CONTENT, path)
    before = path.read_bytes()

    def half(content, file):
        file.write(before[: len(before) // 2])
        raise fault

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(type(fault)):
        io.save_checkpoint({**CONTENT, "global_step": 4}, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]  # nothing half-written lies about


def test_it_is_on_the_disk_before_it_takes_its_name(io, tmp_path, monkeypatch):
    calls = []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), real_fsync(fd)))
    monkeypatch.setattr(
        os, "replace", lambda a, b: (calls.append(Path(a).parent == Path(b).parent), real_replace(a, b))
    )
    io.save_checkpoint(CONTENT, tmp_path / "last.ckpt")
    assert calls == ["fsync", True, "fsync"]  # the file, its name (in the same folder), the folder


def test_what_a_killed_write_left_is_written_over(io, tmp_path):
    (tmp_path / ".last.ckpt.tmp").write_bytes(b"half a checkpoint" * 100000)
    io.save_checkpoint(CONTENT, tmp_path / "last.ckpt")
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert read_header(tmp_path / "last.ckpt").step == 3


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_wants_to_run_something_is_refused(io, tmp_path, zipped):
    path, touched = tmp_path / "evil.ckpt", tmp_path / "touched"
    content = {**CONTENT, "extra": Payload(touched)}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(pickle.UnpicklingError):
        io.load_checkpoint(path, weights_only=False)
    with pytest.raises(UserError, match=r"evil\.ckpt cannot be read"):
        read_header(path)
    assert not touched.exists()


def test_an_environment_variable_does_not_open_that_door(io, tmp_path, monkeypatch):
    """PyTorch's own switch makes an unsaid `weights_only` mean False, in every process of a machine."""
    path, touched = tmp_path / "evil.ckpt", tmp_path / "touched"
    torch.save({**CONTENT, "extra": Payload(touched)}, path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(pickle.UnpicklingError):
        io.load_checkpoint(path)
    with pytest.raises(UserError):
        read_header(path)
    assert not touched.exists()
    torch.load(path)
    assert touched.exists()  # the payload does bite where nothing is said


def test_a_run_does_not_open_that_door_either(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, "stages=[clip]", "clip.max_steps=4")
    stages.run(tiny_config(tmp_path, "stages=[clip]"))
    path, touched = fit.checkpoint_path(config, "clip"), tmp_path / "touched"
    content = torch.load(path, weights_only=True)
    torch.save({**content, "callbacks": Payload(touched)}, path)
    (path.parent / "previous.ckpt").unlink()
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(UserError, match="cannot be read"):
        stages.run(config)
    # What reads the whole of it refuses as well, should the header ever be read in another way.
    monkeypatch.setattr(fit, "_resume_from", lambda *_: (path, 3))
    with pytest.raises(pickle.UnpicklingError):
        stages.run(config)
    assert not touched.exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "other"])
def test_a_damaged_checkpoint_is_a_user_error(damage, tmp_path):
    config = tiny_config(tmp_path, "stages=[clip]")
    path = fit.checkpoint_path(config, "clip")
    AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-500])
    elif damage == "other":
        torch.save({"weights": torch.zeros(2)}, path)
    else:
        path.write_bytes(b"" if damage == "empty" else b"not a checkpoint")
    with pytest.raises(UserError, match=r"last\.ckpt cannot be read: .*resume=never") as error:
        stages.run(config)
    assert "\n" not in str(error.value)
    assert path.exists()
    stages.run(tiny_config(tmp_path, "stages=[clip]", "resume=never"))
    assert read_header(path).step == 3


def test_two_checkpoints_are_kept_and_their_names_need_no_quotes(tmp_path):
    config = tiny_config(tmp_path, "stages=[clip]", "clip.max_steps=7", "trainer.checkpoint_every=2")
    stages.run(config)
    assert steps(fit.checkpoint_path(config, "clip").parent) == {"last.ckpt": 7, "previous.ckpt": 6}
    assert "=" not in str(fit.checkpoint_path(config, "clip"))


def test_checkpoints_are_written_when_they_are_due(tmp_path, monkeypatch):
    steps = []
    real = AtomicCheckpointIO.save_checkpoint

    def note(self, checkpoint, path, storage_options=None):
        steps.append(checkpoint["global_step"])
        real(self, checkpoint, path, storage_options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", note)
    stages.run(tiny_config(tmp_path, "stages=[clip]", "clip.max_steps=7", "trainer.checkpoint_every=3"))
    assert steps == [3, 6, 7]  # and one of the end


def test_a_small_disk_that_fills_up_keeps_the_old_checkpoint(io, tmp_path):
    """On a file system of its own, where there is one to be had."""
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(mount)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        path = mount / "last.ckpt"
        io.save_checkpoint(CONTENT, path)
        with pytest.raises((OSError, RuntimeError)):
            io.save_checkpoint({**CONTENT, "global_step": 4, "large": torch.zeros(200_000)}, path)
        assert read_header(path).step == 3
        assert [file.name for file in mount.iterdir()] == ["last.ckpt"]
    finally:
        subprocess.run(["umount", str(mount)], check=True)


# ------------------------------------------------------------------------------------------- the one before the last


def steps(folder: Path) -> dict[str, int]:
    return {path.name: torch.load(path, weights_only=True)["global_step"] for path in sorted(folder.iterdir())}


def test_the_one_before_the_last_stays(io, tmp_path):
    for step in (3, 4, 5):
        io.save_checkpoint({**CONTENT, "global_step": step}, tmp_path / "last.ckpt")
    assert steps(tmp_path) == {"last.ckpt": 5, "previous.ckpt": 4}
    os.replace(tmp_path / "last.ckpt", tmp_path / "previous.ckpt")  # killed between two renames
    path, header, faults = newest_whole(tmp_path)
    assert (path.name, header.step, faults) == ("previous.ckpt", 5, [])


def test_another_run_s_checkpoint_is_none_before_this_one_s(tmp_path):
    for step in (8, 9):
        AtomicCheckpointIO().save_checkpoint({**CONTENT, "global_step": step}, tmp_path / "last.ckpt")
    io = AtomicCheckpointIO()
    io.anew = True
    io.save_checkpoint({**CONTENT, "global_step": 1}, tmp_path / "last.ckpt")
    assert steps(tmp_path) == {"last.ckpt": 1}
    io.save_checkpoint({**CONTENT, "global_step": 2}, tmp_path / "last.ckpt")
    assert steps(tmp_path) == {"last.ckpt": 2, "previous.ckpt": 1}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), change=st.integers(1, 255), cut=st.booleans())
def test_a_damaged_byte_anywhere_is_noticed(io, tmp_path, place, change, cut):
    """What is found is what was written, or the one before it."""
    for step in (3, 4):
        io.save_checkpoint({**CONTENT, "global_step": step}, tmp_path / "last.ckpt")
    path = tmp_path / "last.ckpt"
    content = bytearray(path.read_bytes())
    place %= len(content)
    if cut:
        del content[place:]
    else:
        content[place] ^= change
    path.write_bytes(content)
    found, header, _ = newest_whole(tmp_path)
    assert header.step == (4 if found == path else 3)
    assert torch.equal(io.load_checkpoint(found)["state_dict"]["a"], CONTENT["state_dict"]["a"])


def test_a_run_goes_on_from_the_one_before_a_damaged_last_and_ends_the_same(tmp_path, capsys):
    long = ["stages=[clip]", "clip.max_steps=5", "trainer.checkpoint_every=2"]
    whole = tiny_config(tmp_path / "whole", *long)
    stages.run(whole)
    config = tiny_config(tmp_path / "damaged", *long)
    with pytest.raises(Stopped):
        stop = "+callbacks.x={_target_: probes.StopAt, stage: clip, step: 4}"
        stages.run(tiny_config(tmp_path / "damaged", *long, stop))
    path = fit.checkpoint_path(config, "clip")
    assert steps(path.parent) == {"last.ckpt": 4, "previous.ckpt": 2}
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    stages.run(config)
    out = capsys.readouterr().out
    assert re.search(r"last\.ckpt cannot be read: .* is not what was written", out) and "going on from step 2" in out
    states = [torch.load(fit.checkpoint_path(each, "clip"), weights_only=True) for each in (config, whole)]
    for part in ("state_dict", "optimizer_states"):
        assert_equal(states[0][part], states[1][part], part)


def test_a_checkpoint_of_a_later_release_is_not_guessed_at(io, tmp_path):
    io.save_checkpoint({**CONTENT, "version": VERSION + 1}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"a later release of ldm .*go on with that release"):
        newest_whole(tmp_path)
    io.save_checkpoint({**CONTENT, "version": VERSION}, tmp_path / "last.ckpt")
    assert newest_whole(tmp_path)[1].step == 3


def failing(error: Exception):
    def fail(*_, **__):
        raise error

    return fail


CANNOT_MAP = RuntimeError("unable to mmap 4480 bytes from file <last.ckpt>: Cannot allocate memory (12)")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        *((OSError(number, os.strerror(number)), os.strerror(number))
          for number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.EACCES, errno.EPERM)),
        (MemoryError(), "Cannot allocate memory"),
        (CANNOT_MAP, "Cannot allocate memory"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)  # fmt: skip
@pytest.mark.parametrize("place", ["ldm.training.checkpointing._compare_checksums", "torch.load"])
def test_a_fault_that_is_not_the_file_s_ends_the_run(io, tmp_path, monkeypatch, error, told, place):
    """Else the run would go on behind it, and the next checkpoint take the place of a good one that is newer."""
    for step in (3, 4):
        io.save_checkpoint({**CONTENT, "global_step": step}, tmp_path / "last.ckpt")
    with monkeypatch.context() as patch:
        patch.setattr(place, failing(error))
        with pytest.raises(UserError, match=rf"last\.ckpt cannot be read now: {told}\. .*same command again$"):
            newest_whole(tmp_path)
    assert newest_whole(tmp_path)[1].step == 4
    monkeypatch.setattr(place, failing(OSError(errno.EIO, "Input/output error")))  # of the file: the one before it
    with pytest.raises(UserError, match=r"last\.ckpt cannot be read: .*previous\.ckpt cannot be read: .*resume=never"):
        newest_whole(tmp_path)


def test_a_checkpoint_that_may_not_be_looked_at_is_not_taken_for_none(io, tmp_path, monkeypatch):
    assert newest_whole(tmp_path) is None and newest_whole(tmp_path / "none") is None
    io.save_checkpoint(CONTENT, tmp_path / "last.ckpt")
    monkeypatch.setattr(Path, "stat", failing(PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(UserError, match="cannot be read now: Permission denied"):
        newest_whole(tmp_path)


def test_room_is_looked_for_before_training(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(UserError, match=r"0\.0 GiB free, and checkpoints need .*output_dir="):
        stages.run(tiny_config(tmp_path / "out", "stages=[clip]"))
    assert not list(tmp_path.rglob("*.ckpt"))
    check_room(tmp_path / "a" / "b", 30_000)
    (tmp_path / "last.ckpt").write_bytes(bytes(60_000))
    check_room(tmp_path, 50_000)  # of three two are there, almost
    with pytest.raises(UserError):
        check_room(tmp_path, 60_000)


def test_a_tensor_of_another_size_than_it_says_is_told(io, tmp_path):
    """Whole to its checksums, and still not what was written."""
    import zipfile

    torch.save(CONTENT, tmp_path / "good.ckpt")
    with zipfile.ZipFile(tmp_path / "good.ckpt") as good, zipfile.ZipFile(tmp_path / "last.ckpt", "w") as bad:
        for name in good.namelist():
            bad.writestr(name, good.read(name)[: 400 if "/data/" in name else None])
    with pytest.raises(UserError, match=r"last\.ckpt cannot be read: record size"):
        io.load_checkpoint(tmp_path / "last.ckpt")
