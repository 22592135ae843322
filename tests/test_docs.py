"""Every command of the pages that take a reader through something, typed as it stands there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from peers import write_hub
from runs import ROOT, SMALL, TINY, TINY_OWN, run_script
from sets import parquet_folder, picture_folder, png, shard_folder, texts

NUM = 14
# Steps are what a test has no time for; all else is run as it is written.
FEW = ["autoencoder.max_steps=1", "clip.max_steps=1", "trainer.max_steps=1", "data.num_val=2", "resume=never"]


def blocks(page: str) -> list[list[str]]:
    """Return the commands of each code block of a page."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    fenced = re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [found for block in fenced if (found := re.findall(r"^python .*", block, re.MULTILINE))]


def images(num: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    return [png(tuple(rng.integers(0, 256, 3).tolist()), (20 + i % 3 * 8, 20)) for i in range(num)]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """The folders and hub ids that the pages name."""
    root = tmp_path_factory.mktemp("world")
    picture_folder(root / "pictures", [f"{i:02d}.png" for i in range(NUM)])
    artists = [f"artist {i % 3}" for i in range(NUM)]
    for name in ("parquet", "openmoji-128", "reach-vb/pokemon-blip-captions", "lambdalabs/naruto-blip-captions"):
        parquet_folder(root / name, images=images(NUM), artist=artists)  # found here before it is sought on the hub
    shard_folder(root / "shards", images(NUM), texts(NUM), size=5)
    for hub_id, folder in write_hub(root / "models").items():
        (root / hub_id).parent.mkdir(parents=True, exist_ok=True)
        (root / hub_id).symlink_to(folder)
    (root / "sd-vae").symlink_to(root / "models" / "vae")
    (root / "clip").symlink_to(root / "models" / "clip")
    Image.new("RGB", (4, 4)).save(root / "a.png")
    return root


def overrides(arguments: list[str]) -> list[str]:
    """Return what makes a training command small, of what it has."""
    experiment = next((item for item in arguments if item.startswith("experiment=")), arguments[0])
    if experiment == "experiment=pokemon":
        return [*SMALL, *FEW]
    if experiment == "experiment=pokemon_finetune":  # its U-Net is loaded
        return [*(item for item in SMALL if not item.lstrip("+").startswith("unet")), *FEW]
    if experiment == "experiment=pokemon_vae":  # there is no network to have LPIPS' weights from
        vae = [f"++{item}" for item in TINY if item.startswith("vae.") and "vae=sd" not in arguments]
        return ["autoencoder.perceptual=null", "trainer=cpu", "data.resolution=16", "autoencoder.batch_size=4", *vae,
                "++autoencoder.discriminator.num_layers=2", "data.num_workers=0", *FEW]  # fmt: skip
    if experiment.startswith("experiment=shapes"):
        said = {"experiment", *(item.partition("=")[0] for item in arguments if item.startswith("evaluation."))}
        few = ["data.num_val=8", "evaluation.num_prompts=2"]
        return [*(item for item in TINY if item.partition("=")[0] not in said), *FEW, *few]
    return [*TINY_OWN, *FEW]


@pytest.mark.parametrize(
    "commands", [*blocks("data.md"), *blocks("training.md"), *blocks("openmoji.md")], ids=lambda found: found[0][7:60]
)
def test_the_commands_of_a_page(commands, world, tmp_path, monkeypatch, capfd):
    for path in world.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    for command in commands:
        _, script, *arguments = shlex.split(re.sub(r"\s{2,}#.*", "", command))
        if script == "-m":
            assert subprocess.run([sys.executable, "-m", *arguments]).returncode == 0, capfd.readouterr().err
            continue
        if script == "train.py":
            arguments += overrides(arguments)
        else:
            arguments += ["steps=1"]
        assert run_script(script.removesuffix(".py"), *arguments) == 0, capfd.readouterr().err


def test_the_pages_have_commands():
    assert sum(map(len, blocks("data.md"))) >= 15 and sum(map(len, blocks("training.md"))) >= 6


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_pages_are_finished_and_their_pictures_are_there(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"^[A-Z]{5,}$", text, re.MULTILINE)  # a word that stands for what is still to come
    for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        assert (page.parent / target).is_file(), target
