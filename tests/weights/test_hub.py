"""Where weights come from: local paths, run directories and the hub, which is played by a folder."""

import fnmatch
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from ldm.errors import UserError
from ldm.nn.autoencoder import AutoencoderKL
from ldm.nn.clip import CLIP, TextTower
from ldm.nn.unet import UNet
from ldm.weights.folder import save_network
from ldm.weights.hub import check_source, find_model, find_part, weight_files
from ldm.weights.model import load_model, load_part
from ldm.weights.tokenizer import load_text_tokenizer

SRC = Path(__file__).parents[2] / "src"


def refusal(check, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        check(*arguments)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------ local paths


def test_a_model_is_found_by_its_folder_and_by_its_run(tmp_path, monkeypatch):
    model = tiny.write_model_folder(tmp_path / "run" / "model")
    assert find_model(str(tmp_path / "run")) == model == find_model(str(model))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_model("~/run") == model


@pytest.mark.parametrize("check", [find_model, check_source])
def test_ckpt_of_another_kind_says_what_it_is(tmp_path, check):
    def told(path) -> str:
        message = refusal(check, str(path))
        assert message.startswith(f"ckpt={path}")
        return message

    assert "there is no such folder" in told(tmp_path / "nothing")
    save_network(tiny.vae(), tmp_path / "vae")
    assert "is a single network, not a whole model" in told(tmp_path / "vae")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "this run has no finished model yet" in told(tmp_path / "run")
    (tmp_path / "new run").mkdir()
    (tmp_path / "new run" / "config.yaml").touch()
    assert "this run has no finished model yet" in told(tmp_path / "new run")
    (tmp_path / "empty.safetensors").mkdir()
    assert "is neither a run directory nor a model folder" in told(tmp_path / "empty.safetensors")
    (tmp_path / "notes.txt").touch()
    assert "is a file" in told(tmp_path / "notes.txt")


def test_what_may_be_a_model_passes_the_door(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.write_model_folder(Path("outputs/run/model"))
    Path("a.ckpt").touch()
    Path("b.safetensors").touch()
    for source in ("outputs/run", "outputs/run/model", "./outputs/run/", "a.ckpt", "b.safetensors", "someone/model"):
        check_source(source)


@pytest.mark.parametrize("source", ["", "./a/b", "/a/b", "~/a/b", "nothing", "a/b/c", "a/b.safetensors", "a\\b", "é/b"])
def test_what_can_be_no_hub_id_is_looked_for_at_once(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"src={source}: there is no such" in refusal(check_source, source, "src")


def test_the_door_is_no_heavy_one(tmp_path):
    code = "import sys; from ldm.weights.hub import check_source; check_source('a/b'); print('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(SRC)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("part", ["vae", "text_encoder", "unet", "tokenizer", "scheduler"])
def test_parts_are_found_in_all_their_homes(tmp_path, part):
    model = tiny.write_model_folder(tmp_path / "run" / "model")
    for source in (tmp_path / "run", model, model / part):
        assert find_part(str(source), part) == model / part


def test_parts_that_are_not_there(tmp_path):
    assert "vae=./nothing: there is no such folder or file" in refusal(find_part, "./nothing", "vae")
    model = tiny.write_model_folder(tmp_path / "model")
    shutil.rmtree(model / "vae")
    message = refusal(find_part, str(model), "vae", None, "vae.pretrained")
    assert message.startswith(f"vae.pretrained={model} holds no vae in diffusers' or transformers' format")


def test_a_local_path_goes_before_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_network(tiny.vae(), Path("someone/vae"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    load_part(AutoencoderKL, "someone/vae")


# ----------------------------------------------------------------------------------------------------------- shards


@pytest.mark.parametrize("index", ["{}", '{"weight_map": 3}', '{"weight_map": {}}', "x"])
def test_damaged_indices(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert "index.json" in refusal(weight_files, tmp_path)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "config.json", "./x.safetensors", 3]
)
def test_an_index_reaches_no_other_file(tmp_path, name):
    (tmp_path / "part").mkdir()
    index = {"weight_map": {"x": "model-00001-of-00002.safetensors", "y": name}}
    (tmp_path / "part" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"names {str(name)!r}, which is no file of weights beside it" in refusal(weight_files, tmp_path / "part")


def test_a_missing_shard_is_named(tmp_path):
    import diffusers

    theirs = diffusers.UNet2DConditionModel.from_config(tiny.unet().config)
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    last.unlink()
    assert f"{last} is missing" in refusal(load_part, UNet, str(tmp_path))


OLD_INDEX = "model.fp16.safetensors.index.json"
NEW_INDEX = "model.safetensors.index.fp16.json"


@pytest.mark.parametrize(
    ("names", "variant", "chosen"),
    [
        (["model.safetensors", "pytorch_model.bin"], None, "model.safetensors"),
        (["model.safetensors", "model.fp16.safetensors"], None, "model.safetensors"),
        (["model.safetensors", "model.fp16.safetensors"], "fp16", "model.fp16.safetensors"),
        (["model.fp16.safetensors", "pytorch_model.bin"], None, "pytorch_model.bin"),
        (["model.fp16.safetensors", "pytorch_model.fp16.bin"], None, "model.fp16.safetensors"),
        (["pytorch_model.fp16.bin"], None, "pytorch_model.fp16.bin"),
        (["model.safetensors", "pytorch_model.fp16.bin"], "fp16", "pytorch_model.fp16.bin"),
        (["model.non_ema.safetensors", "model.safetensors"], None, "model.safetensors"),
        (["model.non_ema.safetensors", "model.safetensors"], "non_ema", "model.non_ema.safetensors"),
        (["diffusion_pytorch_model.bin"], "fp16", "diffusion_pytorch_model.bin"),
        (["diffusion_pytorch_model.fp16.bin", "diffusion_pytorch_model.safetensors"], None,
         "diffusion_pytorch_model.safetensors"),
        ([NEW_INDEX, "model.safetensors"], "fp16", "shard.safetensors"),
        ([OLD_INDEX, "model.safetensors"], "fp16", "shard.safetensors"),
        ([NEW_INDEX, "model.safetensors"], None, "model.safetensors"),
        (["pytorch_model.bin.index.json"], None, "shard.safetensors"),
    ],
)  # fmt: skip
def test_which_of_several_weights_are_taken(tmp_path, names, variant, chosen):
    for name in names:
        (tmp_path / name).write_text('{"weight_map": {"x": "shard.safetensors"}}')
    assert [path.name for path in weight_files(tmp_path, variant)[0]] == [chosen]


# ---------------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose repositories are folders of `tmp_path/hub`; `hub.asked` are the files that were downloaded."""

    class Hub:
        root = tmp_path / "hub"
        asked: set[str]

    def snapshot_download(repo_id: str, allow_patterns: list[str]) -> str:
        repository, cache = Hub.root / repo_id, tmp_path / "cache" / repo_id
        for path in sorted(repository.rglob("*")):
            name = path.relative_to(repository).as_posix()
            if path.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                hub.asked.add(name)
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, cache / name)
        return str(cache)

    hub = Hub()
    hub.asked = set()
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return hub


def add_clutter(folder: Path) -> None:
    """Put beside a model what lies in published repositories."""
    for part in ("unet", "vae", "text_encoder"):
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        for name in (f"{stem}.fp16.safetensors", f"{stem}.non_ema.safetensors", f"{stem}.bin", "pytorch_model.bin",
                     "flax_model.msgpack", "openvino_model.bin"):  # fmt: skip
            (folder / part / name).write_bytes(b"no")
    (folder / "safety_checker").mkdir()
    for name in ("safety_checker/config.json", "safety_checker/model.safetensors", "v1-5-pruned.safetensors",
                 "v1-5-pruned.ckpt", "README.md", "trainer_state.json"):  # fmt: skip
        (folder / name).write_bytes(b"no")


def test_only_what_a_model_needs_is_downloaded(hub):
    model = tiny.write_model_folder(hub.root / "someone" / "model")
    before = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
    add_clutter(model)
    loaded = load_model("someone/model")
    assert hub.asked == before
    assert loaded.settings["steps"] == 5 and loaded.unet_file.name == "diffusion_pytorch_model.safetensors"


def test_parts_that_are_given_are_not_downloaded(hub, tmp_path):
    model = tiny.write_model_folder(hub.root / "someone" / "model")
    add_clutter(model)
    save_network(tiny.unet(), tmp_path / "unet")
    save_network(tiny.vae(), hub.root / "other" / "vae")
    load_model("someone/model", unet=str(tmp_path / "unet"), vae="other/vae")
    assert not any(name.startswith(("unet/", "vae/")) for name in hub.asked)
    assert {"config.json", "diffusion_pytorch_model.safetensors"} <= hub.asked  # of the other VAE


@pytest.mark.parametrize("part", ["vae", "unet"])
def test_one_part_of_a_model(hub, part):
    model = tiny.write_model_folder(hub.root / "someone" / "model")
    add_clutter(model)
    load_part({"vae": AutoencoderKL, "unet": UNet}[part], "someone/model")
    assert hub.asked == {"model_index.json", "ldm.json", f"{part}/config.json",
                         f"{part}/diffusion_pytorch_model.safetensors"}  # fmt: skip


def write_theirs(folder: Path, **options) -> Path:
    """Write a VAE as diffusers does."""
    import diffusers

    diffusers.AutoencoderKL.from_config(tiny.vae().config).save_pretrained(folder, **options)
    return folder


def test_variants_shards_and_pickles_on_the_hub(hub):
    variant = {"variant": "fp16"}
    shards = {"max_shard_size": "20KB"}
    write_theirs(hub.root / "a" / "fp16", **variant)
    write_theirs(hub.root / "a" / "both")
    write_theirs(hub.root / "a" / "both2", **variant)
    shutil.copytree(hub.root / "a" / "both2", hub.root / "a" / "both", dirs_exist_ok=True)
    write_theirs(hub.root / "a" / "shards", **shards)
    write_theirs(hub.root / "a" / "shards16", **shards, **variant)
    write_theirs(hub.root / "a" / "bin", safe_serialization=False)
    write_theirs(hub.root / "a" / "bins", safe_serialization=False, **shards)

    def asked(name: str, variant: str | None = None) -> set[str]:
        hub.asked.clear()
        load_part(AutoencoderKL, f"a/{name}", variant=variant)
        return {name for name in hub.asked if not name.endswith("json")}

    stem = "diffusion_pytorch_model"
    assert asked("both") == {f"{stem}.safetensors"}
    assert asked("both", "fp16") == asked("fp16", "fp16") == asked("fp16") == {f"{stem}.fp16.safetensors"}
    assert asked("bin") == asked("bin", "fp16") == {f"{stem}.bin"}
    for name, wanted in (("shards", None), ("shards16", "fp16"), ("bins", None)):
        files = {path.name for path in (hub.root / "a" / name).iterdir() if path.suffix != ".json"}
        assert len(files) > 1 and asked(name, wanted) == files


def test_a_clip_repository_serves_as_clip_text_encoder_and_tokenizer(hub):
    folder = hub.root / "openai" / "clip"
    save_network(tiny.clip(), folder)
    tiny.tokenizer().save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"no")
    tower = load_part(TextTower, "openai/clip")
    assert tower.config == load_part(CLIP, "openai/clip").text_model.config
    assert len(load_text_tokenizer("openai/clip", tower, "text_encoder")) == len(tiny.tokenizer())
    assert "pytorch_model.bin" not in hub.asked
    hub.asked.clear()
    load_text_tokenizer("openai/clip", tower, "text_encoder")
    assert "model.safetensors" not in hub.asked and "tokenizer.json" in hub.asked


def test_a_repository_without_a_model(hub):
    write_theirs(hub.root / "a" / "vae")
    assert refusal(load_model, "a/vae").startswith("ckpt=a/vae is a single network, not a whole model")
    (hub.root / "a" / "empty").mkdir()
    (hub.root / "a" / "empty" / "README.md").touch()
    Path(hub.root.parent / "cache" / "a" / "empty").mkdir(parents=True)
    assert "vae=a/empty holds no vae" in refusal(load_part, AutoencoderKL, "a/empty")
    (hub.root / "a" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    shutil.rmtree(hub.root.parent / "cache")
    assert "holds no weights" in refusal(load_part, AutoencoderKL, "a/vae")


def test_a_hub_out_of_reach_says_how_to_mend_it():
    code = (
        "from ldm.weights.model import load_model, load_part; from ldm.nn.autoencoder import AutoencoderKL\n"
        "from ldm.errors import UserError\n"
        "for load in (lambda: load_part(AutoencoderKL, 'stabilityai/sd-vae-ft-mse', option='vae.pretrained'),\n"
        "             lambda: load_model('outputs/typo')):\n"
        "    try: load()\n"
        "    except UserError as error: print(error)\n"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(SRC)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    vae, model = run.stdout.splitlines()
    assert vae.startswith(
        "vae.pretrained=stabilityai/sd-vae-ft-mse is no local folder and cannot be had from the hub: "
    )
    assert vae.endswith("a mirror (vae.pretrained=<other/id>) or a local folder (vae.pretrained=./folder)")
    assert model.startswith("ckpt=outputs/typo is no local folder and cannot be had from the hub: ")


def test_what_the_hub_says_is_told_in_one_line(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("\n  no route to host\nand more\n")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    message = refusal(load_part, AutoencoderKL, "a/b")
    assert "no route to host; name a mirror" in message and len(message.splitlines()) == 1


def test_weights_of_the_wrong_part_are_refused(tmp_path):
    save_network(tiny.unet(), tmp_path / "unet")
    assert "holds a UNet2DConditionModel; a vae must be" in refusal(load_part, AutoencoderKL, str(tmp_path / "unet"))
