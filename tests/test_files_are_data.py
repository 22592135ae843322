"""Nothing in a checkpoint, a model folder, a set or a run is executed, imported, interpolated or followed outside.

Whatever the environment says. `tests/fuzz.py` looks for what is not thought of here.
"""

import json
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

import fuzz_targets
import tiny
from damage import Payload
from ldm.config import load_run_config
from ldm.data.captions import Wording
from ldm.data.folder import FolderSource
from ldm.data.hub import HubSource
from ldm.data.images import decode
from ldm.errors import UserError
from ldm.evaluation.features import InceptionFeatures
from ldm.files import load_yaml
from ldm.nn.autoencoder import AutoencoderKL
from ldm.pipeline import LatentDiffusionPipeline
from ldm.report import write_report
from ldm.sweep import summarize
from ldm.training.checkpointing import AtomicCheckpointIO, newest_whole
from ldm.training.perceptual import load_backbone
from ldm.weights.folder import load_network, save_network
from ldm.weights.model import load_model, load_part
from ldm.weights.tensors import read_weights
from sets import folder_data, hub_data, picture_folder, png

SWITCHES = ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_WEIGHTS_ONLY_LOAD")


@pytest.fixture(params=[(), SWITCHES[:1], SWITCHES[1:], SWITCHES], ids=lambda names: "+".join(names) or "unset")
def environment(request, monkeypatch) -> tuple[str, ...]:
    """PyTorch's switches for an unsaid `weights_only`, which are a whole machine's."""
    for name in request.param:
        monkeypatch.setenv(name, "1")
    return request.param


def write_pickle(path: Path, marker: Path, kind: str) -> Path:
    """Write weights in which a call of `touch` stands; what else is there is as a loader wants it."""
    evil = Payload(Path.touch, (marker,))
    content = {"identity": {}, "global_step": 1, "state_dict": {"a": torch.ones(2), "evil": evil}, "callbacks": evil}
    if kind == "plain":
        path.write_bytes(pickle.dumps(content, 2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    return path


DOORS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "weights": ("x.ckpt", read_weights),
    "a model": ("x.ckpt", lambda path: load_model(str(path))),
    "a network": ("x.pt", lambda path: load_part(AutoencoderKL, str(path))),
    "a network's folder": ("pytorch_model.bin", lambda path: load_network(AutoencoderKL, path.parent)),
    "the way on": ("last.ckpt", lambda path: newest_whole(path.parent)),
    "the checkpoint": ("last.ckpt", lambda path: AtomicCheckpointIO().load_checkpoint(path, weights_only=False)),
    "LPIPS": ("vgg.pth", lambda path: load_backbone("vgg", str(path))),
    "Inception": ("inception.pth", lambda path: InceptionFeatures(str(path), torch.device("cpu"))),
}


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.filterwarnings("ignore:Environment variable TORCH_FORCE")
def test_a_pickle_runs_nothing_whatever_the_environment_says(tmp_path, environment, door, kind):
    name, load = DOORS[door]
    marker = tmp_path / "ran"
    save_network(tiny.vae(), tmp_path / "folder")
    (tmp_path / "folder" / "diffusion_pytorch_model.safetensors").unlink()
    path = write_pickle(tmp_path / "folder" / name, marker, kind)
    with pytest.raises((UserError, pickle.UnpicklingError)):
        load(path)
    assert not marker.exists()
    if environment == SWITCHES[:1]:
        pickle.loads(path.read_bytes()) if kind == "plain" else torch.load(path)
        assert marker.exists()  # it does bite where nothing is said


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_the_names_in_a_zip_are_no_names_on_the_disk(tmp_path, environment):
    torch.save({"a": torch.ones(2)}, tmp_path / "good.ckpt")
    with zipfile.ZipFile(tmp_path / "good.ckpt") as good, zipfile.ZipFile(tmp_path / "x.ckpt", "w") as bad:
        for name in good.namelist():
            for told in (name, f"../{name}", f"{tmp_path}/{name}", "../escaped"):
                bad.writestr(told, good.read(name))
    before = sorted(tmp_path.rglob("*"))
    try:
        read_weights(tmp_path / "x.ckpt")
    except UserError as error:
        assert "x.ckpt" in str(error)
    assert sorted(tmp_path.rglob("*")) == before and not (tmp_path.parent / "escaped").exists()


@pytest.mark.parametrize("name", ["../secret.safetensors", "{}/secret.safetensors", "a/../../secret.safetensors"])
def test_an_index_of_shards_names_files_beside_it_alone(tmp_path, name):
    save_network(tiny.vae(), tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "secret.safetensors")
    index = {"weight_map": {"a": name.format(tmp_path)}}
    for file in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        (tmp_path / "vae" / file).write_text(json.dumps(index))
        with pytest.raises(UserError, match="which is no file of weights beside it"):
            load_network(AutoencoderKL, tmp_path / "vae")


# ----------------------------------------------------------------------------------------------------- model folders

TRAP = "trap_for_tests"
CALLS = {
    "_target_": f"{TRAP}.run", "auto_map": {"AutoModel": f"{TRAP}.run", "AutoTokenizer": [f"{TRAP}.run", None]},
    "custom_pipeline": TRAP, "_commit_hash": "${oc.env:HOME}", "trust_remote_code": True,
}  # fmt: skip


@pytest.fixture
def trap(tmp_path, monkeypatch) -> Path:
    """A module that could be imported from anywhere, and would leave a mark."""
    place = tmp_path / "code"
    place.mkdir()
    marker = tmp_path / "ran"
    (place / f"{TRAP}.py").write_text(f"open({str(marker)!r}, 'w')\ndef run(*args, **kwargs): pass\n")
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.delitem(sys.modules, TRAP, raising=False)
    return marker


@pytest.mark.parametrize("where", [
    "model_index.json", "ldm.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
    "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json", "tokenizer/special_tokens_map.json",
])  # fmt: skip
def test_nothing_that_a_model_folder_names_is_imported(tmp_path, trap, where):
    folder = tiny.write_model_folder(tmp_path / "model")
    shutil.copy(trap.parent / "code" / f"{TRAP}.py", folder / where.partition("/")[0] if "/" in where else folder)
    path = folder / where
    content = json.loads(path.read_text()) if path.exists() else {}
    index = {"unet": [TRAP, "run"], "vae": [TRAP, "run"], "_class_name": f"{TRAP}.run"} if where[:5] == "model" else {}
    path.write_text(json.dumps({**content, **CALLS, **index}))
    try:
        LatentDiffusionPipeline.from_pretrained(folder, device="cpu")
    except UserError as error:  # refused is as good: what is not known is named
        assert "custom_pipeline" in str(error) or "trust_remote_code" in str(error)
    assert not trap.exists() and TRAP not in sys.modules


@pytest.mark.parametrize("name", ["tokenizer_file", "vocab_file", "merges_file", "added_tokens_file", "name_or_path"])
def test_a_tokenizer_s_config_names_no_other_files(tmp_path, name):
    folder = tiny.write_model_folder(tmp_path / "model")
    other = tmp_path / "other"
    tiny.train_tokenizer(["quite other words"], 520, 12).save_pretrained(other)
    path = folder / "tokenizer" / "tokenizer_config.json"
    file = {"tokenizer_file": "tokenizer.json", "name_or_path": ""}.get(name, "tokenizer.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), name: str(other / file)}))
    found = load_model(str(folder)).tokenizer
    assert found.get_vocab() == tiny.tokenizer().get_vocab()


# --------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("text", [
    "!!python/object/apply:os.system ['touch {0}']", "name: !!python/object/apply:pathlib.Path.touch ['{0}']",
    "!!python/object/new:trap_for_tests.run []", "name: !!python/name:trap_for_tests.run ''",
    "name: !!python/module:trap_for_tests", "name: !include /etc/passwd",
])  # fmt: skip
def test_a_tag_in_a_run_s_config_makes_nothing(tmp_path, trap, text):
    run = tmp_path / "run" / "job"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(text.format(trap))
    (run / "metrics.csv").write_text("metric,step,value,unix_time\n")
    for read in (load_run_config, lambda folder: summarize(folder.parent)):
        with pytest.raises(UserError, match=r"config\.yaml cannot be read"):
            read(run)
    assert "cannot be read" in write_report(run).read_text()
    assert not trap.exists() and TRAP not in sys.modules


def test_a_run_s_config_calls_and_interpolates_nothing(tmp_path, trap, monkeypatch):
    monkeypatch.setenv("A_SECRET", "s3cret")
    fuzz_targets.make_run(tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["name"] = "${oc.env:A_SECRET}"
    config["optim"]["_target_"] = f"{TRAP}.run"
    config["logger"] = {"x": {"_target_": f"{TRAP}.run"}}
    config["callbacks"]["x"] = {"_target_": f"{TRAP}.run"}
    path.write_text(yaml.safe_dump(config))
    found = load_run_config(tmp_path / "run")
    assert found is not None and found.name == "${oc.env:A_SECRET}"
    page = write_report(tmp_path / "run").read_text()
    assert "s3cret" not in page and "${oc.env:A_SECRET}" in page
    assert not trap.exists() and TRAP not in sys.modules


def test_ten_lines_of_yaml_do_not_stand_for_a_thousand_million_values(tmp_path):
    lines = ["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10))]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    with pytest.raises(UserError, match="stands for more than 100,000 values"):
        load_yaml(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text("a: &a [*a]")
    with pytest.raises(UserError, match="cannot be read"):
        load_yaml(tmp_path / "config.yaml")


# --------------------------------------------------------------------------------------------------------------- sets


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_metadata_bring_no_pictures_from_outside_and_interpolate_nothing(tmp_path, kind, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setenv("A_SECRET", "s3cret")
    (tmp_path / "private.png").write_bytes(png((200, 0, 0)))
    folder = picture_folder(tmp_path / "set", ["a.png"], None)
    names = [
        "a.png",
        "../private.png",
        str(tmp_path / "private.png"),
        "x/../../private.png",
        f"//{tmp_path}/private.png",
    ]
    rows = [{"file_name": name, "text": "${oc.env:A_SECRET} {0.__class__} %s {caption}"} for name in names]
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        lines = ["file_name,text", *(f'{row["file_name"]},"{row["text"]}"' for row in rows)]
        (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")
    source = FolderSource(folder_data(folder), decode, None)
    outside = {
        name: fault for name, fault in zip(source.index.names, source.index.faults, strict=True) if name != "a.png"
    }
    assert outside and all("outside the folder" in fault for fault in outside.values())
    for i in range(len(source)):
        assert source.texts[i] == ("${oc.env:A_SECRET} {0.__class__} %s {caption}",) * len(source.texts[i])
        if source.index.names[i] != "a.png":
            with pytest.raises(UserError, match="outside the folder"):
                source[i]


def test_a_caption_file_interpolates_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("A_SECRET", "s3cret")
    picture_folder(tmp_path, ["a.png"], None)
    (tmp_path / "a.txt").write_text("${oc.env:A_SECRET} {file_name} {0.__class__}")
    source = FolderSource(folder_data(tmp_path, caption_template="{caption} in {file_name}"), decode, None)
    assert source.texts == [("${oc.env:A_SECRET} {file_name} {0.__class__} in a.png",)]
    assert Wording("{caption} by {x}")({"x": "{caption}${oc.env:A_SECRET}"}, ["c"]) == [
        "c by {caption}${oc.env:A_SECRET}"
    ]


def test_a_set_of_the_hub_brings_no_code(tmp_path, trap):
    """A loading script beside the data, as sets used to have it."""
    fuzz_targets.make_parquet(tmp_path)
    (tmp_path / "set" / "set.py").write_text((trap.parent / "code" / f"{TRAP}.py").read_text())
    with pytest.raises(UserError, match=r"scripts are no longer supported, but found set\.py"):
        HubSource(hub_data(tmp_path / "set"), decode, None)
    assert not trap.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_what_a_file_s_text_says_is_not_looked_up(tmp_path, name, monkeypatch):
    monkeypatch.setenv("A_SECRET", "s3cret")
    tensors = {"${oc.env:A_SECRET}": torch.ones(2)}
    path = tmp_path / name
    save_file(tensors, path, {"ldm_version": "${oc.env:A_SECRET}"}) if name[-1] == "s" else torch.save(tensors, path)
    with pytest.raises(UserError) as error:
        load_model(str(path))
    assert os.environ["A_SECRET"] not in str(error.value)
