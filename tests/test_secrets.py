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
from ldm.redact import printable, redacted
from ldm.training.stages import stage_inputs
from probes import listening
from runs import ROOT, TINY, TINY_OWN, run_script, tiny_config
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


def test_another_secret_is_no_other_result(planted, monkeypatch, tmp_path):
    """Tokens are renewed; and what names a result is kept with it."""

    def inputs() -> list[dict]:
        named = ["++optim.arguments.token=${oc.env:HF_TOKEN}", "+unet.pretrained='${oc.env:HF_TOKEN}/x'"]
        asked = tiny_config(tmp_path, *named)
        return [stage_inputs(asked, stage) for stage in ("autoencoder", "clip", "diffusion")]

    before = inputs()
    assert not betrayed(repr(before).encode()) and "${oc.env:HF_TOKEN}/x" in repr(before)
    monkeypatch.setenv("HF_TOKEN", "hf_AnotherThatIsNewer")
    assert inputs() == before


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
