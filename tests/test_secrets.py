"""Secrets of the environment are in nothing that the scripts write or say; nothing listens to other machines."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from ldm.config import load_run_config
from ldm.redact import fingerprinted, is_same, printable, redacted
from ldm.training.stages import stage_key
from probes import listening
from runs import ROOT, TINY, TINY_OWN, run_script, tiny_own_config
from sets import sidecar_folder

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_PlantedForATest000000000000",
    "AWS_SECRET_ACCESS_KEY": "aws+Planted/ForATest/1111111111111111111",
    "MY_DB_PASSWORD_2": "correct horse battery",
}
TEMPTING = " ".join(f"${{oc.env:{name}}}" for name in SECRETS)


@pytest.fixture
def planted(monkeypatch, tmp_path) -> dict[str, str]:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return SECRETS


def betrayed(content: bytes) -> list[str]:
    return [name for name, value in SECRETS.items() if value.encode() in content]


def texts(folder: Path) -> dict[Path, bytes]:
    """Return all that can be read in the files of a folder, their names and the texts in pictures among it."""
    found = {path: os.fsencode(path) + path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for path in found:
        if path.suffix == ".png":  # its texts may be compressed
            with Image.open(path) as picture:
                found[path] += repr(picture.info).encode()
    return found


def test_what_is_a_secret(planted, monkeypatch):
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "perhaps so")
    monkeypatch.setenv("LONGER_KEY", SECRETS["HF_TOKEN"] + "more")
    text = f"abc perhaps so {SECRETS['HF_TOKEN']}more {SECRETS['HF_TOKEN']} {SECRETS['MY_DB_PASSWORD_2']}"
    told = "abc perhaps so ${oc.env:LONGER_KEY} ${oc.env:HF_TOKEN} ${oc.env:MY_DB_PASSWORD_2}"
    assert redacted(text) == told
    assert redacted({"a": [text, 1, None], "b": (text,)}) == {"a": [told, 1, None], "b": [told]}


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("PGPASSWORD", True), ("SSHPASS", True), ("MYSQL_PWD", True), ("GITHUB_PAT", True), ("APIKEY", True),
        ("AZURE_STORAGE_CONNECTION_STRING", True), ("AWS_SECRET_ACCESS_KEY_2", True), ("PWD", False),
        ("OLDPWD", False), ("COMPASS", False), ("MONKEY", False), ("PAT", False), ("GIT_PATH", False),
    ],
)  # fmt: skip
def test_names_of_secrets(name, secret, monkeypatch):
    monkeypatch.setenv(name, "of this test alone")
    assert redacted("of this test alone") == (f"${{oc.env:{name}}}" if secret else "of this test alone")


def test_what_a_terminal_would_obey_is_shown():
    assert printable("é 中 🙂 \x1b[31m\u202e\r\udce9") == "é 中 🙂 \\x1b[31m\\u202e\\r\\udce9"


def test_they_are_in_nothing_that_is_written_or_said(planted, tmp_path, capfd):
    """Free text, config values and shells offer them; what asks for one in its config gets it."""
    sidecar_folder(tmp_path / "set", *zip(*[(picture(i), f"a star {TEMPTING}") for i in range(12)], strict=True))
    arguments = [
        *TINY_OWN, "data=folder", "data.path=set", f"data.caption_prefix={TEMPTING}", f"name=run {TEMPTING}",
        "output_dir=out", "logger=wandb", "logger.wandb.offline=true", "trainer.val_every=1",
        f"+callbacks.told={{_target_: probes.Told, path: {tmp_path}/told.json}}",
        "+callbacks.told.asked=${oc.env:WANDB_API_KEY}", f"+callbacks.told.typed='Bearer {SECRETS['HF_TOKEN']}'",
    ]  # fmt: skip
    assert run_script("train", *arguments) == 0
    run_dir = tmp_path / "out" / f"run {TEMPTING}"
    assert run_script("sample", f"ckpt={run_dir}", f"prompt={TEMPTING}", f"negative_prompt={TEMPTING}", "out=a") == 0
    assert run_script("sample", f"ckpt={run_dir}", f"prompt={SECRETS['HF_TOKEN']}", "out=b") == 0
    assert run_script("evaluate", f"ckpt={run_dir}", "metrics=[reconstruction,retrieval]", "batch_size=4") == 0
    assert run_script("convert", f"src={run_dir}", f"dst={tmp_path}/{TEMPTING}.safetensors") == 0
    assert run_script("train", *arguments, "trainer.strategy=${oc.env:HF_TOKEN}", "name=other") == 2
    assert run_script("train", *arguments, "trainer.precision=${oc.env:AWS_SECRET_ACCESS_KEY}") == 2
    said = capfd.readouterr()
    assert "${oc.env:HF_TOKEN}" in said.err and "${oc.env:AWS_SECRET_ACCESS_KEY}" in said.err
    assert not betrayed((said.out + said.err).encode())
    content = texts(tmp_path)
    assert not {str(path): found for path, text in content.items() if (found := betrayed(text))}
    names = {path.name for path in content}
    assert names > {"config.yaml", "overrides.txt", "env.json", "index.html", "evaluation.json", "stage.json"}
    assert any(name.endswith(".wandb") for name in names) and any("tfevents" in name for name in names)

    got = json.loads((tmp_path / "told.json").read_text())
    whole = {"asked": SECRETS["WANDB_API_KEY"], "typed": f"Bearer {SECRETS['HF_TOKEN']}"}
    assert got == {name: hashlib.sha256(value.encode()).hexdigest() for name, value in whole.items()}
    told = yaml.safe_load((run_dir / "config.yaml").read_text())["callbacks"]["told"]
    assert (told["asked"], told["typed"]) == ("${oc.env:WANDB_API_KEY}", "Bearer ${oc.env:HF_TOKEN}")
    assert load_run_config(run_dir) is not None
    assert set(json.loads((run_dir / "env.json").read_text())) == {
        "ldm", "torch", "pytorch-lightning", "python", "platform", "command",
    }  # fmt: skip


def picture(i: int) -> bytes:
    from sets import png

    return png((20 * i, 0, 0), (16, 16))


def test_another_secret_is_another_result_where_it_decides_one(planted, monkeypatch, tmp_path):
    """In a path it names another set; a logger's token is renewed."""

    def keys(*named: str) -> list[str]:
        return [stage_key(tiny_own_config(tmp_path, *named), stage) for stage in ("autoencoder", "clip", "diffusion")]

    def of_set() -> list[str]:
        return keys("data.path=/sets/${oc.env:HF_TOKEN}")

    def of_logger() -> list[str]:
        return keys("data.path=set", "++logger.csv.token=${oc.env:HF_TOKEN}")

    before, logged = of_set(), of_logger()
    monkeypatch.setenv("HF_TOKEN", "hf_AnotherThatIsNewer")
    assert not set(of_set()) & set(before) and of_logger() == logged


def test_the_environment_does_not_name_a_result(planted, monkeypatch, tmp_path):
    """What was typed as it is stays what it is with a variable that holds it, and without."""
    config = tiny_own_config(tmp_path, f"data.path=/sets/{SECRETS['HF_TOKEN']}")
    with_it = stage_key(config, "clip")
    monkeypatch.delenv("HF_TOKEN")
    assert stage_key(config, "clip") == with_it


def test_what_is_kept_to_compare_with_betrays_nothing(planted, monkeypatch):
    values = [f"/sets/{SECRETS['HF_TOKEN']}", [SECRETS["HF_TOKEN"], 1], "\udce9" + SECRETS["HF_TOKEN"]]
    kept = [fingerprinted(value) for value in values]
    assert not betrayed(repr(kept).encode()) and kept[0].startswith("/sets/${oc.env:HF_TOKEN} sha256:")
    others = [f"/other/{SECRETS['HF_TOKEN']}", [SECRETS["HF_TOKEN"], 2], SECRETS["HF_TOKEN"]]
    for _ in range(2):
        assert all(map(is_same, kept, values)) and not any(map(is_same, kept, others))
        assert all(map(is_same, values, values))
        monkeypatch.delenv("HF_TOKEN", raising=False)
    for value in (None, 3, 0.1, "text", [1, "a"], True):
        assert fingerprinted(value) == value and is_same(value, value) and not is_same(value, "other")


def test_a_sweep_leaves_none(planted, tmp_path):
    """Typed into the command, they come to Hydra, which keeps the config of a sweep: nothing of it stays."""
    token = f"++optim.arguments.token={SECRETS['HF_TOKEN']}"
    said = ["-m", "experiment=shapes", f"output_dir={tmp_path}/out", "name=sweep", "seed=1,2", token]
    fake = subprocess.run([sys.executable, ROOT / "tests/fake_train.py", *said], capture_output=True, timeout=120)
    assert fake.returncode == 0, fake.stderr
    content = texts(tmp_path)
    assert not {str(path): found for path, text in content.items() if (found := betrayed(text))}
    assert not betrayed(fake.stdout + fake.stderr)
    names = {path.name for path in (tmp_path / "out/sweep").iterdir()}
    assert {"sweep.json", "sweep.md"} < names and "multirun.yaml" not in names


def test_a_sweep_that_never_comes_to_a_job_leaves_none(planted, tmp_path):
    token = f"++optim.arguments.token={SECRETS['HF_TOKEN']}"
    said = ["-m", f"output_dir={tmp_path}/out", "name=sweep", "seed=1,2", "data=shapes,nothing", token]
    done = subprocess.run([sys.executable, ROOT / "tests/fake_train.py", *said], capture_output=True, timeout=120)
    assert done.returncode == 2 and b"nothing" in done.stderr
    assert (tmp_path / "out/sweep").is_dir() and not betrayed(b"".join(texts(tmp_path).values()))


def test_jobs_of_a_sweep_are_not_named_by_secrets(planted, tmp_path):
    from ldm.training.jobs import sweep_name

    overrides = redacted([f"logger.wandb.notes={SECRETS['HF_TOKEN']}"])
    assert sweep_name(overrides) == "logger.wandb.notes-oc.env-HF_TOKEN"


# ----------------------------------------------------------------------------------------------------------- listening


def loopback(address: str) -> bool:
    """Tell whether an address as /proc/net has it, in hexadecimal words of the machine's own order, is this machine."""
    return address == "0100007F" or address in ("0" * 24 + "01000000", "0" * 16 + "FFFF00000100007F")


def test_what_is_this_machine():
    with socket.create_server(("127.0.0.1", 0)) as here, socket.create_server(("0.0.0.0", 0)) as everywhere:
        told = {str(each.getsockname()[1]): listening()[each.getsockname()[1]] for each in (here, everywhere)}
    assert [loopback(address) for address in told.values()] == [True, False]


def test_a_run_listens_to_nobody(tmp_path):
    """With its loader processes."""
    assert where_a_run_listens(tmp_path, "data.cache=false", "data.num_workers=1") == set()


@pytest.mark.slow
def test_ranks_listen_to_this_machine_alone(tmp_path):
    pair = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"]
    found = where_a_run_listens(tmp_path, *pair)
    assert found and all(map(loopback, found)), found


def where_a_run_listens(folder: Path, *overrides: str) -> set[str]:
    """Return the addresses at which a run and its processes listen in the middle of training."""
    probe = f"+callbacks.listens={{_target_: probes.Listens, path: {folder}/listens}}"
    command = [sys.executable, ROOT / "train.py", *TINY, "stages=[clip]", f"output_dir={folder}/out", probe, *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=folder)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (folder / "listens").read_text().splitlines()]
    assert rows
    return {address for row in rows for address in row}
