"""The scripts as a user types them: in processes of their own where that matters, and bad input in this one."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.gallery import read_settings
from ldm.training import stages
from ldm.weights.folder import load_weights
from runs import ROOT, TINY, run_script, tiny_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run directory. Read it, do not write into it."""
    config = tiny_config(tmp_path_factory.mktemp("finished"))
    stages.run(config)
    return Path(config.run_dir)


def type_it(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS` somewhere else than in the repository, as after `cd`."""
    script, *rest = words
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, str(ROOT / script), *rest]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


# --------------------------------------------------------------------------------------------- what must be at once


@pytest.mark.parametrize("script", ["train.py", "sample.py", "evaluate.py"])
def test_help_is_at_once_and_imports_nothing_heavy(script, tmp_path):
    started = time.monotonic()
    done = type_it(script, "--help", cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    seconds = time.monotonic() - started
    assert done.returncode == 0 and script in done.stdout
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "ldm" in imported
    assert not imported & {"torch", "numpy", "hydra", "omegaconf", "pydantic", "pytorch_lightning", "transformers"}
    assert seconds < 3  # half a second where nothing else runs
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [
    ["train.py", "experiment=shapes"], ["train.py", "experiment=pokemon", "debug=fast"], ["sample.py", "ckpt=x"],
    ["evaluate.py"],
])  # fmt: skip
def test_the_composed_config_is_printed_without_torch(arguments, tmp_path):
    done = type_it(*arguments, "--cfg", "job", cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0, done.stderr
    assert "seed: 0\n" in done.stdout and "hydra:" not in done.stdout
    assert not re.search(r"\| +(torch|pytorch_lightning)$", done.stderr, re.MULTILINE)
    assert not list(tmp_path.iterdir())


def test_the_same_command_again_says_that_all_is_up_to_date_without_torch(finished, tmp_path):
    arguments = [*TINY, f"output_dir={finished.parent}"]
    done = type_it("train.py", *arguments, cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0].split() for line in done.stdout.splitlines()] == [
        [stage, "up", "to", "date"] for stage in ("autoencoder", "clip", "diffusion")
    ]
    assert not re.search(r"\| +(torch|pytorch_lightning)$", done.stderr, re.MULTILINE)


# --------------------------------------------------------------------------------------------------------- bad input

# What is typed, and what must be said. `{run}` is a finished run, `{tmp}` an empty folder, `{file}` a text file.
BAD_TRAIN = [
    ("optim.lrr=1", "unknown config key 'optim.lrr'; did you mean 'optim.lr'?"),
    ("experimnt=shapes", "did you mean 'experiment'?"),
    ("unet=tinny", "no option 'tinny' in group 'unet'; did you mean 'tiny'?"),
    ("unett=tiny", "did you mean 'unet'?"),
    ("+unet.dropuot=0.1", "did you mean 'unet.dropout'?"),
    ("unet.dropout=0.1", "to add it write +unet.dropout=0.1"),
    ("callbacks.samples.evry=1", "did you mean 'callbacks.samples.every'?"),
    ("optim.lr=-1", "optim.lr: Input should be greater than 0, not -1"),
    ("optim.lr=fast", "optim.lr: Input should be a valid number"),
    ("seed=99999999999999999999", "seed"),
    ("stages=[diffusoin]", "'diffusoin'"),
    ("data.resolution=18", "multiple of 4"),
    ("+unet.cross_attention_dim=17", "text_encoder.text.hidden_size=16"),
    ("stages=[diffusion]", "stage 'autoencoder'"),
    ("unet.attention_head_dim=3", "unet: "),
    ("optim._target_=torch.optim.Adamm", "torch.optim.Adamm"),
    ("+logger.x._target_=nowhere.Logger", "nowhere"),
    ("trainer.accelerator=gpu", "trainer: "),
    ("output_dir=", "output_dir"),
    ("name=", "name"),
    ("name=a/b", "'a/b'"),
    ("optim.lr=1e-3,2e-3", "--multirun"),
    ("data.num_train=[", "data.num_train=["),
    ("nonsense", "nonsense"),
    ("output_dir={file}", "cannot be written"),
]
BAD_DATA = [
    (["data.path={tmp}/nowhere"], "there is no such folder"),
    (["data.path={file}"], "is a file"),
    (["data.path={tmp}"], "cannot be opened"),
    (["data.path=some/set"], "data.path=<other/id>"),
    (
        ["data.path={pictures}", "data.caption_column=txet"],
        "no column 'txet' (data.caption_column); it has: file_name, text",
    ),
    (["data.path={pictures}", "data.image_column=picture"], "no column 'picture' (data.image_column)"),
    (["data.path={pictures}", "data.num_val=100"], "data.num_val=100"),
    ([], "'data.path' is missing"),
]
BAD_SAMPLE = [
    (["prompt=x"], "'ckpt' is missing"),
    (["ckpt={tmp}/nowhere", "prompt=x"], "there is no such folder"),
    (["ckpt={file}", "prompt=x"], "is a file"),
    (["ckpt={tmp}", "prompt=x"], "neither a run directory nor a model folder"),
    (["ckpt={run}/model/unet", "prompt=x"], "a single network"),
    (["ckpt={unfinished}", "prompt=x"], "no finished model yet"),
    (["ckpt={run}"], "either prompt="),
    (["ckpt={run}", "prompt=x", "prompt_file={file}"], "either prompt="),
    (["ckpt={run}", "prompt_file={tmp}/nowhere.txt"], "cannot be read"),
    (["ckpt={run}", "prompt_file={tmp}"], "cannot be read"),
    (["ckpt={run}", "prompt_file={empty}"], "holds no prompt"),
    (["ckpt={run}", "prompt_file={binary}"], "cannot be read"),
    (["ckpt={run}", "prompt=x", "guidance=3"], "did you mean 'guidance_scale'?"),
    (["ckpt={run}", "prompt=x", "sampler=eulr"], "'ddim', 'ddpm', 'euler'"),
    (["ckpt={run}", "prompt=x", "steps=0"], "steps"),
    (["ckpt={run}", "prompt=x", "steps=1001"], "1000"),
    (["ckpt={run}", "prompt=x", "height=15"], "divisible by 4"),
    (["ckpt={run}", "prompt=x", "guidance_scale=nan"], "guidance_scale"),
    (["ckpt={run}", "prompt=x", "device=cuda:77"], "device=cuda:77"),
    (["ckpt={run}", "prompt=x", "dtype=fp8"], "dtype"),
    (["ckpt={run}", "prompt=x", "num_images=0"], "num_images"),
    (["ckpt={run}", "prompt=x", "spacing=even"], "'leading', 'linspace'"),
    (["ckpt={run}", "prompt=x", "eta=0.5", "sampler=euler"], "eta=0.5: sampler=ddim takes"),
    (["ckpt={run}", "prompt=x", "eta=2"], "eta"),
    (["ckpt={run}", "prompt=x", "guidance_rescale=2"], "guidance_rescale"),
    (["ckpt={run}", "prompt=x", "guidance_interval=[5,1]"], "guidance_interval=[5.0, 1.0]"),
    (["ckpt={run}", "prompt=x", "guidance_interval=3"], "guidance_interval"),
    (["ckpt={run}", "prompt=x", "device=meta"], "device=meta"),
    (["ckpt={run}", "prompt=x", "height=100000"], "height"),
    (["ckpt={run}", "prompt=x", "clip_skip=1"], "this text encoder has 1 layers"),
    (["ckpt={run}", "prompt=x", "seed=[]"], "seed"),
    (["ckpt={run}", "prompt=x", "seed=[1,2]", "num_images=2"], "leave num_images out"),
    (["ckpt={run}", "prompt=x", "mask={file}"], "mask= belongs to init_image="),
    (["ckpt={run}", "prompt=x", "outpaint=left:8"], "outpaint= belongs to init_image="),
    (["ckpt={run}", "prompt=x", "strength=0.5"], "strength= belongs to init_image="),
    (["ckpt={run}", "prompt=x", "init_image={tmp}/nowhere.png"], "nowhere.png"),
    (["ckpt={run}", "prompt=x", "init_image={file}"], "init_image"),
    (["ckpt={run}", "prompt=x", "init_image={pictures}/0.png", "strength=0"], "strength"),
    (["ckpt={run}", "prompt=x", "init_image={pictures}/0.png", "strength=0.1", "steps=2"], "less than one step"),
    (["ckpt={run}", "prompt=x", "init_image={pictures}/0.png", "mask={pictures}/0.png"], "mask"),
    (["ckpt={run}", "prompt=x", "init_image={pictures}/0.png", "outpaint=up:8"], "outpaint"),
    (["ckpt={run}", "prompt=x", "init_image={pictures}/0.png", "outpaint=left:3"], "outpaint"),
    (["from_image={tmp}/nowhere.png"], "nowhere.png cannot be read"),
    (["from_image={pictures}/0.png"], "carries no settings"),
    (["from_image={file}"], "cannot be read as a picture"),
    (["ckpt={run}", "prompt=x", "vae={tmp}/nowhere"], "there is no"),
    (["ckpt={run}", "prompt=x", "out={file}"], "is a file"),
    (["ckpt={run}", "prompt=x", "out={file}/in/it"], "is a file"),
    (["ckpt={run}", "prompt=x", "out=/proc/nothing"], "cannot be written"),
]
BAD_EVALUATE = [
    ([], "'ckpt' is missing"),
    (["ckpt={tmp}"], "neither a run directory nor a model folder"),
    (["ckpt={unfinished}"], "no finished model yet"),
    (["ckpt={run}", "metrics=[fiid]"], "'fiid'"),
    (["ckpt={run}", "metrics=[]"], "metrics"),
    (["ckpt={run}", "num_prompts=0"], "num_prompts"),
    (["ckpt={run}", "out={tmp}/no/where.json"], "there is no folder"),
    (["ckpt={run}", "out={tmp}"], ".json"),
    (["ckpt={run}", "out={tmp}/picture.png"], ".json"),
    (["ckpt={run}", "sampler=eulr"], "'ddim', 'ddpm', 'euler'"),
    (["ckpt={foreign}"], "has no config.yaml"),
]


@pytest.fixture
def places(tmp_path, finished, monkeypatch) -> dict[str, Path]:
    """Folders and files that bad input names; the current directory is an empty one."""
    found = {
        name: tmp_path / name for name in ("file", "empty", "binary", "cwd", "tmp", "unfinished", "pictures", "foreign")
    }
    for name in ("cwd", "tmp", "pictures"):
        found[name].mkdir()
    found["file"].write_text("a line\n")
    found["empty"].write_text("\n  \n")
    found["binary"].write_bytes(b"\xff\xfe\x00\x80")
    (found["unfinished"] / "checkpoints").mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(found["pictures"] / f"{i}.png")
    lines = [f"{i}.png,a picture" for i in range(4)]
    (found["pictures"] / "metadata.csv").write_text("\n".join(["file_name,text", *lines]))
    shutil.copytree(finished / "model", found["foreign"])
    monkeypatch.chdir(found["cwd"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return {**found, "run": finished}


def files_under(*folders: Path) -> dict[Path, bytes | None]:
    """Return what lies in folders, but for locks and what was found out about a set, which is kept for the next try."""
    paths = [path for folder in folders for path in folder.rglob("*") if path.name != ".lock"]
    paths = [path for path in paths if "cache" not in path.parts and path.name != "outputs"]
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def check_refusal(script: str, arguments: list[str], says: str, places, capsys) -> None:
    """One clear message, exit code 2, nothing half-written."""
    watched = [place for place in places.values() if place.is_dir()]
    before = files_under(*watched)
    capsys.readouterr()
    assert run_script(script, *(argument.format(**places) for argument in arguments)) == 2
    said = capsys.readouterr()
    message = said.err[said.err.index("error: ") :]
    assert says.format(**places) in message
    assert "Traceback" not in said.err and "Error executing job" not in said.err and said.err.count("error: ") == 1
    assert files_under(*watched) == before
    assert not files_under(places["cwd"])


@pytest.mark.parametrize(("argument", "says"), BAD_TRAIN, ids=[typed for typed, _ in BAD_TRAIN])
def test_bad_input_to_train(argument, says, places, capsys):
    check_refusal("train", [*TINY, argument], says, places, capsys)


@pytest.mark.parametrize(("arguments", "says"), BAD_DATA, ids=[" ".join(typed) for typed, _ in BAD_DATA])
def test_bad_data(arguments, says, places, capsys):
    own = [item for item in TINY if "num_train" not in item and "num_val" not in item]
    check_refusal("train", [*own, "data=hub", "data.num_val=1", *arguments], says, places, capsys)


@pytest.mark.parametrize(("arguments", "says"), BAD_SAMPLE, ids=[" ".join(typed) for typed, _ in BAD_SAMPLE])
def test_bad_input_to_sample(arguments, says, places, capsys):
    check_refusal("sample", arguments, says, places, capsys)


@pytest.mark.parametrize(("arguments", "says"), BAD_EVALUATE, ids=[" ".join(typed) for typed, _ in BAD_EVALUATE])
def test_bad_input_to_evaluate(arguments, says, places, capsys):
    check_refusal("evaluate", arguments, says, places, capsys)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("optm: {lr: 1.0e-3}", "unknown config key 'optm'; did you mean 'optim'?"),
        ("optim: {lrr: 1.0e-3}", "unknown config key 'optim.lrr'; did you mean 'optim.lr'?"),
        ("unet: {block_out_chanels: [8, 16]}", "did you mean 'unet.block_out_channels'?"),
        ("optim: {lr: fast}", "optim.lr: Input should be a valid number"),
        ("defaults: [{override /unett: tiny}]", "unett"),
        ("defaults: [{override /unet: tinny}]", "no option 'tinny' in group 'unet'; did you mean 'tiny'?"),
        ("optim: [", "while parsing"),
        ("name: ${nowhere}", "nowhere"),
        ("optim: 3", "optim"),
    ],
)
def test_a_fault_inside_an_experiment_file(content, says, places, capsys):
    folder = places["tmp"] / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(f"# @package _global_\n{content}\n")
    arguments = ["--config-dir", str(places["tmp"] / "conf"), "experiment=mine", *TINY[1:]]
    if content.startswith("name"):
        arguments.append("run_dir=out")
    check_refusal("train", arguments, says, places, capsys)


def test_an_experiment_file_of_ones_own(places, capsys):
    folder = places["tmp"] / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("# @package _global_\nname: mine\noptim: {lr: 0.125}\n")
    arguments = ["--config-dir", str(places["tmp"] / "conf"), "experiment=mine", "--cfg", "job"]
    assert run_script("train", *arguments) == 0
    out = capsys.readouterr().out
    assert "name: mine\n" in out and "lr: 0.125\n" in out


def test_a_folder_that_may_not_be_written(places, capsys, monkeypatch):
    """As the file system says it: tests may run as root, who may write anywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != places["tmp"])
    check_refusal("sample", ["ckpt={run}", "prompt=x", "out={tmp}/out"], "no permission", places, capsys)
    check_refusal("evaluate", ["ckpt={run}", "out={tmp}/evaluation.json"], "no permission", places, capsys)


def test_bytes_that_are_no_text(finished, tmp_path):
    command = [sys.executable, str(ROOT / "sample.py"), f"ckpt={finished}".encode(), b"prompt=caf\xe9"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "is not valid UTF-8" in done.stderr
    assert "Traceback" not in done.stderr


def test_bad_input_in_a_process_of_its_own(tmp_path):
    done = type_it("train.py", "experiment=shapes", "optim.lrr=1", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: unknown config key 'optim.lrr'") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------- sampling


def test_prompts_are_typed_as_they_are(finished, tmp_path):
    """Through a real shell, in a real process; the picture carries the text."""
    prompt = "a red circle, (small) = 'one' \"two\" ${oc.env:HOME} $HOME {x} [y] #1 \\ pokémon 🙂\nsecond line"
    done = type_it(
        "sample.py", f"ckpt={finished}", f"prompt={prompt}", "negative_prompt=blue, ${seed}", "num_images=2", "seed=7",
        "steps=2", "out=my pictures, (new)", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out = tmp_path / "my pictures, (new)"
    names = sorted(path.name for path in out.iterdir())
    assert len(names) == 3 and names[2] == "grid.png"
    assert names[0].startswith("0000-7-a-red-circle-small") and names[1].startswith("0001-8-a-red-circle-small")
    for i, name in enumerate(names[:2]):
        with Image.open(out / name) as picture:
            settings = json.loads(picture.text["ldm"])
            assert settings["prompt"] == prompt and picture.text["parameters"].startswith(prompt)
            assert settings["negative_prompt"] == "blue, ${seed}" and settings["seed"] == 7 + i
            assert settings["steps"] == 2 and settings["sampler"] == "ddim" and settings["height"] == 16


def test_a_prompt_file_a_prompt_a_line(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\ufeffa red circle\n\n  ${oc.env:HOME}, 'x'  \n", encoding="utf-8")
    assert run_script("sample", f"ckpt={finished}", "prompt_file=prompts.txt", "num_images=2", "steps=1") == 0
    pictures = sorted(path for path in (tmp_path / "samples").iterdir() if path.name != "grid.png")
    texts = [read_settings(path)["prompt"] for path in pictures]
    assert texts == ["a red circle"] * 2 + ["${oc.env:HOME}, 'x'"] * 2
    assert [path.name.split("-")[1] for path in pictures] == ["0", "1", "2", "3"]


def test_one_picture_makes_no_grid_and_none_is_said_to_be_cut(finished, tmp_path, capsys):
    arguments = [f"ckpt={finished}", "steps=1", f"out={tmp_path}"]
    assert run_script("sample", *arguments, "prompt=a red circle") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["0000-0-a-red-circle.png"]
    assert "warning" not in capsys.readouterr().out
    assert run_script("sample", *arguments, "prompt=" + "a red circle " * 20) == 0
    assert "only the first 20 tokens are read" in capsys.readouterr().out


def test_a_size_of_its_own(finished, tmp_path):
    assert (
        run_script("sample", f"ckpt={finished}", "prompt=x", "height=20", "width=32", "steps=1", f"out={tmp_path}") == 0
    )
    [path] = tmp_path.iterdir()
    assert Image.open(path).size == (32, 20)


# ------------------------------------------------------------------------------------- real processes, real signals

LONG = [*TINY, "trainer.max_steps=30", "trainer.checkpoint_every=5", "trainer.val_every=10", "optim.warmup_steps=3"]


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path):
    """kill -9 in the middle of the last stage; then the same command."""
    kill = f"+callbacks.kill={{_target_: probes.KillAt, stage: diffusion, step: 17, marker: {tmp_path}/killed}}"
    arguments = [*LONG, f"output_dir={tmp_path}/a", kill]
    first = type_it("train.py", *arguments, cwd=tmp_path)
    assert first.returncode == -signal.SIGKILL and (tmp_path / "killed").exists()
    assert not (tmp_path / "a" / "shapes" / "model" / "model_index.json").exists()
    unfinished = type_it("sample.py", f"ckpt={tmp_path}/a/shapes", "prompt=x", cwd=tmp_path)
    assert unfinished.returncode == 2 and "no finished model yet" in unfinished.stderr
    second = type_it("train.py", *arguments, cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("up to date") == 2 and "going on from step 15" in second.stdout
    whole = type_it("train.py", *LONG, f"output_dir={tmp_path}/b", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    runs = [tmp_path / name / "shapes" for name in ("a", "b")]
    ours, theirs = (torch.load(run / "checkpoints/diffusion/last.ckpt", weights_only=True) for run in runs)
    for part in ("state_dict", "optimizer_states"):
        assert str(ours[part]) == str(theirs[part])
    assert all(torch.equal(ours["state_dict"][key], theirs["state_dict"][key]) for key in theirs["state_dict"])
    weights = [load_weights(run / "model" / "unet") for run in runs]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])
    figures = [[line.rpartition(",")[0] for line in (run / "metrics.csv").read_text().splitlines()] for run in runs]
    assert figures[0] == figures[1]


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_runs_say_so_and_can_go_on(signum, code, tmp_path):
    once = f"step: 2, marker: {tmp_path}/x, signum: {int(signum)}"
    kill = f"+callbacks.kill={{_target_: probes.KillAt, stage: clip, {once}}}"
    arguments = [*TINY, "stages=[clip]", "trainer.checkpoint_every=1", f"output_dir={tmp_path}/out", kill]
    done = type_it("train.py", *arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    done = type_it("train.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0 and "going on from step" in done.stdout


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path):
    """All stages on two ranks; what they learn is what one learns from the batches of both."""
    pair = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"]
    # An epsilon above the rounding of gradients: those that are zero in theory would be sign(rounding) in Adam.
    clip = ["clip.optim.clip_norm=null", "++clip.optim.arguments.eps=1e-3"]
    arguments = [*TINY, *pair, *clip, f"output_dir={tmp_path}/two"]
    done = type_it("train.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for stage in ("autoencoder", "clip", "diffusion"):
        assert done.stdout.count(f"{stage:12} training, 3 steps") == done.stdout.count(f"{stage:12} done") == 1
    run = tmp_path / "two" / "shapes"
    assert (run / "model" / "model_index.json").is_file()
    assert len(list((tmp_path / "two" / "stages").iterdir())) == 2
    rows = [line.split(",")[:2] for line in (run / "metrics.csv").read_text().splitlines()]
    assert len(rows) == len({tuple(row) for row in rows})  # one process writes
    again = type_it("train.py", *arguments, cwd=tmp_path)
    assert again.returncode == 0 and again.stdout.count("up to date") == 3
    longer = type_it("train.py", *arguments, "trainer.max_steps=5", cwd=tmp_path)
    assert longer.returncode == 0 and longer.stdout.count("going on from step 3") == 1

    # CLIP has no draws of its own: two ranks of 8 see the pictures of one of 16, and tell them apart from all 16.
    single = tiny_config(tmp_path / "one", "stages=[clip]", "clip.batch_size=16", *clip)
    stages.run(single)
    two, one = (
        torch.load(root / "shapes/checkpoints/clip/last.ckpt", weights_only=True)["state_dict"]
        for root in (tmp_path / "two", tmp_path / "one")
    )
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=2e-5)
    # Retrieval is among the held-out pictures of both ranks.
    retrieval = []
    for root in ("two", "one"):
        with (tmp_path / root / "shapes/metrics.csv").open(newline="") as file:
            retrieval.append({name: float(value) for name, _, value, _ in csv.reader(file) if "@" in name})
    assert len(retrieval[0]) == 4 and retrieval[0] == pytest.approx(retrieval[1], abs=1e-6)


@pytest.mark.slow
def test_bad_input_on_two_processes_ends_both(tmp_path):
    pair = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"]
    done = type_it("train.py", *TINY, *pair, "unet.attention_head_dim=3", "output_dir=out", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1
    assert not list(tmp_path.iterdir())
