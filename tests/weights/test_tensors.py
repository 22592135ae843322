"""Files of tensors: what is written is what other tools read, and nothing of what is read is run."""

import collections
import hashlib
import json
import os
import pickle
import subprocess
import sys
import zipfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm import __version__
from ldm.errors import UserError
from ldm.weights.tensors import read_metadata, read_weights, write_weights

SRC = Path(__file__).parents[2] / "src"
PICKLES = ["x.ckpt", "x.pt", "x.pth", "x.bin"]


def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"conv.weight": (3, 4, 2, 2), "a": (5,), "scalar": (), "empty": (0, 3), "é.日本": (7, 3)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def assert_equal(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


# -------------------------------------------------------------------------------------------------------- writing


def test_the_library_reads_what_we_write(tmp_path):
    write_weights(tmp_path / "x.safetensors", state(), {"kind": "unet", "é": '"{日本}\\\n'})
    assert_equal(load_file(tmp_path / "x.safetensors"), state())
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "ldm_version": __version__, "kind": "unet", "é": '"{日本}\\\n'}
    assert_equal(read_weights(tmp_path / "x.safetensors"), state())
    for dtype in (torch.float32, torch.bfloat16):
        expected = {name: tensor.to(dtype) for name, tensor in state().items()}
        assert_equal(read_weights(tmp_path / "x.safetensors", dtype), expected)
    assert read_metadata(tmp_path / "x.safetensors")["é"] == '"{日本}\\\n'
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_tensors_are_converted_as_they_are_written(tmp_path, dtype):
    write_weights(tmp_path / "x.safetensors", state(), {}, dtype)
    assert_equal(load_file(tmp_path / "x.safetensors"), {name: t.to(dtype) for name, t in state().items()})


def test_dtypes_are_kept_and_aligned_and_views_are_written_plainly(tmp_path):
    mixed = {
        "a": torch.randn(3).half(),
        "b": torch.randn(4, 6, 2, 2).to(memory_format=torch.channels_last),
        "c": torch.randn(8, 4).T,
        "d": torch.randn(10)[::2].double(),
        "e": torch.randn(2).bfloat16(),
        "f": torch.nn.Parameter(torch.randn(2)),
        "g": torch.randn(1).expand(5),
    }
    write_weights(tmp_path / "x.safetensors", mixed, {})
    found = load_file(tmp_path / "x.safetensors")
    assert_equal(found, mixed)
    assert all(t.data_ptr() % t.element_size() == 0 for t in found.values())


def test_the_same_content_makes_the_same_bytes(tmp_path):
    code = (
        "import sys, torch; from pathlib import Path; from ldm.weights.tensors import write_weights\n"
        "write_weights(Path(sys.argv[1]), {n: torch.arange(4.) for n in 'cab'}, {n: n for n in 'zyxwvu'})"
    )
    digests = set()
    for i in range(2):
        path = tmp_path / f"{i}.safetensors"
        subprocess.run([sys.executable, "-c", code, str(path)], check=True, env={**os.environ, "PYTHONPATH": str(SRC)})
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_a_write_that_fails_leaves_what_was(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    write_weights(path, state(), {})
    before = path.read_bytes()
    broken = {**state(), "conv.weight": torch.zeros(2, device="meta")}
    with pytest.raises(NotImplementedError):
        write_weights(path, broken, {})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# -------------------------------------------------------------------------------------------- safetensors, damaged


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, 0.5, 0.9, -1])
def test_truncated_safetensors(tmp_path, keep):
    path = tmp_path / "x.safetensors"
    write_weights(path, state(), {})
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    for read in (read_weights, read_metadata):
        with pytest.raises(UserError, match=r"x.safetensors cannot be read, it may be cut short"):
            read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"just some text, far too long to be the length of anything", "cannot be read"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n", "`git lfs pull`"),
        (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "a web page"),
        (b"\xff" * 64, "cannot be read"),
        (b"PK\x03\x04" + b"\0" * 64, "cannot be read"),
    ],
)
@pytest.mark.parametrize("name", ["x.safetensors", *PICKLES])
def test_other_things_under_the_name_of_weights(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} .*{message}"):
        read_weights(tmp_path / name)


@pytest.mark.parametrize("name", ["x.safetensors", *PICKLES])
def test_folders_and_missing_files(tmp_path, name):
    with pytest.raises(UserError, match=rf"{name} is missing"):
        read_weights(tmp_path / name)
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=rf"{name} is a folder, not a file"):
        read_weights(tmp_path / name)


# --------------------------------------------------------------------------------------------------------- pickles


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before PyTorch 1.6"])
@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize("nested", [True, False])
def test_pickles_of_tensors(tmp_path, name, nested, zipped):
    content = {"state_dict": state(), "epoch": 3, "hyper_parameters": {"a": [1]}} if nested else state()
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert zipfile.is_zipfile(tmp_path / name) == zipped
    assert_equal(read_weights(tmp_path / name), state())
    assert read_metadata(tmp_path / name) == {}


def test_parameters_counters_and_ordered_dicts(tmp_path):
    content = collections.OrderedDict(state(), step=7, weight=torch.nn.Parameter(torch.ones(2)))
    torch.save({"state_dict": content}, tmp_path / "x.ckpt")
    found = read_weights(tmp_path / "x.ckpt")
    assert_equal(found, {**state(), "weight": torch.ones(2)})
    assert not found["weight"].requires_grad


@pytest.mark.parametrize("content", [[1, 2], {}, {"state_dict": {}}, {"state_dict": [1]}, {"a": 1}, torch.zeros(3), 5])
def test_pickles_without_weights(tmp_path, content):
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"x.ckpt holds no weights"):
        read_weights(tmp_path / "x.ckpt")


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_tensors_that_hold_no_numbers_are_no_weights(tmp_path):
    torch.save({"a": torch.zeros(2, device="meta"), "b": torch.eye(3).to_sparse()}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"x.ckpt holds no weights"):
        read_weights(tmp_path / "x.ckpt")


@pytest.mark.parametrize("keep", [0, 1, 30, 0.3, 0.7, -1])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_pickles(tmp_path, zipped, keep):
    path = tmp_path / "x.ckpt"
    torch.save(state(), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match=r"x.ckpt cannot be read, it may be cut short"):
        read_weights(path)


class Payload:
    """Touch a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def write_malicious(path: Path, marker: Path, kind: str) -> None:
    content = {"state_dict": {**state(), "evil": Payload(marker)}}
    if kind == "plain":
        path.write_bytes(pickle.dumps(Payload(marker), protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
@pytest.mark.parametrize("forced", [True, False], ids=["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", ""])
def test_a_pickle_that_wants_to_run_code_is_refused_and_not_run(tmp_path, kind, forced):
    path, marker = tmp_path / "x.ckpt", tmp_path / "owned"
    write_malicious(path, marker, kind)
    code = (
        "import sys; from pathlib import Path; from ldm.errors import UserError\n"
        "from ldm.weights.tensors import read_weights\n"
        "try: read_weights(Path(sys.argv[1]))\n"
        "except UserError as error: print(error)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(SRC)} | ({"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"} if forced else {})
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=env, capture_output=True, text=True, timeout=120)
    assert not marker.exists()
    assert "system" in done.stdout and "refused and nothing in it was run" in done.stdout, (done.stdout, done.stderr)
    assert "convert it to safetensors with a tool you trust" in done.stdout and "add_safe_globals" not in done.stdout
    torch.load(path, weights_only=False) if kind != "plain" else pickle.loads(path.read_bytes())
    assert marker.exists()  # the payload does work


class Callback:
    """Like those whose objects lie in the published checkpoints of Stable Diffusion."""


def test_a_checkpoint_with_objects_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "Callback", Callback, raising=False)
    Callback.__module__ = __name__
    torch.save({"state_dict": state(), "callbacks": {Callback: {"best": 1}}}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"asks Python for \S*Callback.*refused.*convert it to safetensors"):
        read_weights(tmp_path / "x.ckpt")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_plain_pickle_is_not_recommended_to_be_run(tmp_path):
    (tmp_path / "x.ckpt").write_bytes(pickle.dumps({"a": [1, 2]}, protocol=5))
    with pytest.raises(UserError) as caught:
        read_weights(tmp_path / "x.ckpt")
    assert "cannot be read" in str(caught.value)
    assert "weights_only" not in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_headers_are_plain_json(tmp_path):
    """The writer is ours: hold it to the letter of the format."""
    write_weights(tmp_path / "x.safetensors", state(), {"kind": "x"})
    content = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0 and content[8:9] == b"{"
    header = json.loads(content[8 : 8 + length])
    assert all(isinstance(text, str) for text in header.pop("__metadata__").values())
    spans = sorted(entry["data_offsets"] for entry in header.values())
    assert spans[0][0] == 0 and spans[-1][1] == len(content) - 8 - length
    assert all(one[1] == other[0] for one, other in pairwise(spans))


def test_a_file_of_the_library_is_read(tmp_path):
    save_file(state(), tmp_path / "x.safetensors", {"modelspec.title": "x"})
    assert_equal(read_weights(tmp_path / "x.safetensors"), state())
    assert read_metadata(tmp_path / "x.safetensors") == {"modelspec.title": "x"}
    save_file(state(), tmp_path / "y.safetensors")
    assert read_metadata(tmp_path / "y.safetensors") == {}
