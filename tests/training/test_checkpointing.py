"""A checkpoint is whole or absent, and data, not code."""

import os
import pickle
import subprocess
from pathlib import Path

import pytest
import torch

from ldm.errors import UserError
from ldm.training import fit, stages
from ldm.training.checkpointing import AtomicCheckpointIO, last_checkpoint_callback, read_header
from runs import tiny_config

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
    assert read_header(path) == ({"seed": 0}, 3)


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
    with pytest.raises(UserError, match=r"evil\.ckpt cannot be read.*resume=never"):
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
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(UserError, match="cannot be read"):
        stages.run(config)
    # What reads the whole of it refuses as well, should the header ever be read in another way.
    monkeypatch.setattr(fit, "_resume_from", lambda *_: 3)
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


def test_one_checkpoint_is_kept_and_its_name_needs_no_quotes(tmp_path):
    config = tiny_config(tmp_path, "stages=[clip]", "clip.max_steps=7", "trainer.checkpoint_every=2")
    stages.run(config)
    assert [path.name for path in fit.checkpoint_path(config, "clip").parent.iterdir()] == ["last.ckpt"]
    assert last_checkpoint_callback(tmp_path, 5)._every_n_train_steps == 5
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
