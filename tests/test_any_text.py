"""Whatever text a person types or a data set holds arrives as it is, or is refused by name."""

import csv
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from ldm import cli
from ldm.cli import FREE_TEXT_KEYS, PART_KEYS
from ldm.config import SCHEMAS, known_keys
from ldm.data.captions import clean
from ldm.data.folder import FolderSource
from ldm.data.hub import HubSource
from ldm.data.images import decode
from ldm.data.shards import TarSource
from ldm.errors import UserError
from ldm.gallery import slug
from ldm.training.jobs import sweep_name
from runs import ROOT, TINY_OWN, run_script
from sets import folder_data, hub_data, png, shards_data
from tiny import write_model_folder

# Letters that mean something to a shell, a parser, a file system or a terminal, and any other.
TROUBLE = st.sampled_from(
    list("'\"`$\\{}[](),;:=&|<>*?!#%~^@+-. \t\n\r\x00\x1b\x85\u2028\u202e\ufeff\udce9e\u0301é中🙂")
)
ANY = st.lists(st.one_of(TROUBLE, st.characters(exclude_categories=())), max_size=24).map("".join)
TYPED = ANY.filter(lambda text: "\0" not in text and not re.search("[\ud800-\udfff]", text))
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)

# ------------------------------------------------------------------------------------------------- the command line

# The groups that each script needs to have all its keys of free text.
GROUPS = {"train": ["data=hub", "perceptual=lpips"]}
ELSEWHERE = {"data.caption_key": "data=shards"}


def free_keys(script: str) -> list[str]:
    """Return the keys of a script that hold free text; `clip` is a section of train.py, and the parts are groups."""
    apart = ("clip", *PART_KEYS, *ELSEWHERE) if script == "train" else ()
    return [key for key in (*FREE_TEXT_KEYS, *PART_KEYS) if key in known_keys(script) and key not in apart]


def composed(script: str, *arguments: str) -> Any:
    """Return what reaches a script's `main` of arguments as they are typed."""
    got: list[Any] = []
    with mock.patch.object(sys, "argv", [f"{script}.py", *arguments]):
        cli.run(lambda cfg: got.append(OmegaConf.to_container(cfg, resolve=True)), script, "")
    return got[0]


def at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


@pytest.mark.parametrize("script", SCHEMAS)
@given(text=TYPED)
@example("${oc.env:HOME}${name}")
@example("a\\'b\\\\${x}\\")
@settings(unhurried, max_examples=10)
def test_any_text_for_every_free_key_reaches_the_program(script, text):
    if (len(text) > 1 and text[0] == text[-1] and text[0] in "'\"") or re.fullmatch(r"\[.*\]", text, re.DOTALL):
        text = f" {text}"  # quoted already, or a list
    keys = free_keys(script)
    values = composed(
        script, *GROUPS.get(script, []), *(f"{'+' * key.endswith('.pretrained')}{key}={text}" for key in keys)
    )
    assert {key: at(values, key) for key in keys} == dict.fromkeys(keys, text)


def test_every_free_key_is_tried():
    tried = {key for script in SCHEMAS for key in free_keys(script)} | {*ELSEWHERE}
    assert tried == {*FREE_TEXT_KEYS, *PART_KEYS}
    for key, group in ELSEWHERE.items():
        assert at(composed("train", group, f"{key}=a, 'b' ${{c}}"), key) == "a, 'b' ${c}"


# ------------------------------------------------------------------------------------------------- names of our files


@given(ANY)
@example("../../etc/passwd")
@example("/" * 300)
@example("..")
@example("CON\x00.png")
@unhurried
def test_no_prompt_is_a_path(text):
    name = slug(text)
    assert re.fullmatch(r"[\w-]+", name) and len(name.encode()) <= 40 and os.path.basename(name) == name


@given(st.lists(st.tuples(st.sampled_from(["prompt", "data.path", "a.b"]), ANY).map("=".join), max_size=4))
@example(["data.path=../.."])
@example(["a.b=" + "x" * 500])
@unhurried
def test_no_override_leads_a_job_out_of_its_sweep(overrides):
    name = sweep_name(overrides)
    assert re.fullmatch(r"[\w.,+-]+", name) and len(name.encode()) <= 200 and name not in (".", "..")


PROMPTS = [
    "../../up", "/etc/passwd", "a\\..\\b", "${oc.env:HOME}", "`id` $(id) ; rm -rf ~ | cat > x", "\x1b[31m", 
    "\u202e rtl", "." * 300, "'quoted' \"twice\"", "-rf", "<script>alert(1)</script>", "CON", "é e\u0301 中 🙂",
]  # fmt: skip
SPOKEN = ["../../up", "two\nlines\r and ${oc.env:HOME}"]


def test_prompts_never_lead_out_of_the_folder(tmp_path, monkeypatch):
    """All that is written lies in `out`, under names that need no quotes; the prompt is in the picture as typed."""
    from PIL import Image

    from ldm.gallery import read_settings

    place = tmp_path / "place" / "deep"
    place.mkdir(parents=True)
    write_model_folder(tmp_path / "model")
    before = set(tmp_path.rglob("*"))
    monkeypatch.chdir(place)
    (place / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    for prompt in ("prompt_file=prompts.txt", *(f"prompt={each}" for each in SPOKEN)):
        arguments = [f"ckpt={tmp_path}/model", prompt, "out=pictures", "steps=1", "height=16", "width=16"]
        assert run_script("sample", *arguments) == 0
    made = set(tmp_path.rglob("*")) - before - {place / "prompts.txt"}
    assert {path.parent for path in made} == {place, place / "pictures"}
    pictures = sorted(path for path in made if re.fullmatch(r"\d{4}-\d+-[\w-]+\.png", path.name))
    assert made == {place / "pictures", place / "pictures" / "grid.png", *pictures}
    assert [read_settings(path)["prompt"] for path in pictures] == [*PROMPTS, *SPOKEN]
    with Image.open(pictures[0]) as picture:
        assert picture.info["parameters"].startswith(PROMPTS[0])


# ------------------------------------------------------------------------------------------------- names of pictures

NAMES = st.binary(min_size=1, max_size=40).filter(lambda name: b"/" not in name and b"\0" not in name)
PICTURE = png()


@given(names=st.sets(st.one_of(NAMES, ANY.map(lambda text: text.encode("utf-8", "ignore")).filter(
    lambda name: name and b"/" not in name and b"\0" not in name)), min_size=1, max_size=8))  # fmt: skip
@example(names={b"two\nlines", b"'quoted'", b'"', b"caf\xe9", b"\\", b"-rf", b"~", b"a.png", b"x\r", b"\xff\xfe", b" "})
@unhurried
def test_any_name_of_a_picture(names, tmp_path_factory):
    folder = tmp_path_factory.mktemp("names")
    shown = {name + b".png" for name in names if not name.startswith(b".")}
    for name in shown | {b"z.png"}:
        (folder / os.fsdecode(name)).write_bytes(PICTURE)
    for _ in range(2):  # what was found out is kept, and read again
        source = FolderSource(folder_data(folder), decode, folder.parent / f"{folder.name}-cache")
        assert {os.fsencode(name) for name in source.index.names} == shown | {b"z.png"}
        assert not any(source.index.faults) and all(source[i]["image"].shape == (8, 8, 3) for i in range(len(source)))
        assert all(text == clean(text) for texts in source.captions() for text in texts)


def test_a_run_on_names_of_any_kind(tmp_path):
    """The whole of it in a process of its own, whose output is no terminal and knows ASCII alone."""
    folder = tmp_path / 'it\'s "a set"\n[bold]{x}, ${HOME} 中'
    folder.mkdir()
    names = [
        b"two\nlines",
        b"caf\xe9",
        b'"',
        b"'",
        b"${HOME}",
        b"[red]",
        b"\x1b[31m",
        b"%s{}",
        b"-rf",
        "é中🙂".encode(),
    ]
    for i, name in enumerate(names):
        (folder / os.fsdecode(name + b".png")).write_bytes(png((i, 0, 0), (16, 16)))
    (folder / os.fsdecode(b"broken \xff\n.png")).write_bytes(b"no picture")
    arguments = [*TINY_OWN, "data=folder", f"data.path={folder}", f"output_dir={tmp_path}/out", "stages=[autoencoder]"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    command = [sys.executable, ROOT / "train.py", *arguments, "data.max_bad=0.5", "autoencoder.max_steps=1"]
    done = subprocess.run(command, capture_output=True, env=environment, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert b"1 of 11 pictures" in done.stdout and b"\x1b" not in done.stdout


def test_a_folder_whose_name_is_no_text_is_refused_by_name(tmp_path):
    write_model_folder(tmp_path / "model")
    for key in ("out", "ckpt", "prompt"):
        arguments = {"ckpt": "model", "prompt": "a star", "out": "out", key: "caf\udce9"}
        command = [sys.executable, ROOT / "sample.py", *(f"{name}={value}" for name, value in arguments.items())]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
        assert key in done.stderr and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------ captions


def jsonl(folder: Path, texts: list[str]) -> Any:
    rows = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(texts)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return FolderSource(folder_data(folder), decode, None)


def table(folder: Path, texts: list[str]) -> Any:
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows(
            [("file_name", "text"), *((f"{i}.png", text) for i, text in enumerate(texts))]
        )
    return FolderSource(folder_data(folder), decode, None)


def sidecars(folder: Path, texts: list[str]) -> Any:
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_bytes(text.encode("utf-8", "surrogateescape"))
    return FolderSource(folder_data(folder), decode, None)


def columns(folder: Path, texts: list[str]) -> Any:
    names = [f"{i}.png" for i in range(len(texts))]
    pq.write_table(pa.table({"file_name": names, "text": texts}), folder / "metadata.parquet")
    return FolderSource(folder_data(folder), decode, None)


def rows_of_the_hub(folder: Path, texts: list[str]) -> Any:
    own = folder / "own"
    own.mkdir()
    images = [{"bytes": PICTURE, "path": None}] * len(texts)
    pq.write_table(pa.table({"image": images, "text": texts}), own / "train.parquet")
    return HubSource(hub_data(own), decode, None)


def shard(folder: Path, texts: list[str]) -> Any:
    with tarfile.open(folder / "0.tar", "w") as tar:
        for i, text in enumerate(texts):
            for suffix, content in (("png", PICTURE), ("txt", text.encode("utf-8", "surrogateescape"))):
                member = tarfile.TarInfo(f"{i:04d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return TarSource(shards_data(folder / "0.tar"), decode, None)


@pytest.mark.parametrize("write", [jsonl, table, sidecars, columns, rows_of_the_hub, shard], ids=lambda f: f.__name__)
@given(texts=st.lists(ANY, min_size=1, max_size=4))
@example(
    texts=["two\nlines\r\nand three", "\ufeffe\u0301", 'a "quote", and\x00', "\udce9 half", "", "[1", '["a", "b"]']
)
@example(texts=["nan"])
@unhurried
def test_any_caption_comes_as_clean_text_or_is_refused_by_name(write, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("captions")
    texts = [*texts, "a plain one"]
    for i in range(len(texts)):
        (folder / f"{i}.png").write_bytes(PICTURE)
    try:
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        source = write(folder, texts)
    except UnicodeEncodeError:
        return  # no such file can be written
    except UserError as error:
        assert any(name in str(error) for name in (str(folder), "0.tar")), error
        assert not all(_is_utf8(text) for text in encoded) or "\0" in "".join(texts), error
        return
    found = source.captions()
    for text, captions in zip(texts, found, strict=True):
        assert captions and all(caption == clean(caption) for caption in captions)
        if write in (jsonl, columns) and not text.lstrip().startswith("["):
            assert list(captions) == [clean(text)]
        elif not text.lstrip().startswith("["):  # each line is one, or all of them together
            assert " ".join(captions).split() == clean(text).split() or _is_odd(text)


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_odd(text: str) -> bool:
    """Whether a text has letters that join, or vanish, where lines are taken apart first."""
    return re.search("[\x00-\x1f\x7f-\x9f\u0300\u0301\ufeff\ud800-\udfff]", text) is not None or not text.isascii()
