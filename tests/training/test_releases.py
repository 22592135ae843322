"""What other releases have left: it is gone on from, or it is said what to do."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ldm.config import load_run_config
from ldm.errors import UserError
from ldm.training import fit, stages
from ldm.training.checkpointing import VERSION, AtomicCheckpointIO, newest_whole, read_header
from probes import Stopped
from runs import TINY, run_script, tiny_config
from training_checks import assert_equal

FIVE = ["stages=[clip]", "clip.max_steps=5", "trainer.checkpoint_every=2"]


def rewrite(path: Path, **changed: Any) -> dict[str, Any]:
    """Give a checkpoint other content; None takes a key out."""
    content = {**torch.load(path, weights_only=True), **changed}
    torch.save({key: value for key, value in content.items() if value is not None}, path)
    return content


@pytest.fixture
def stopped(tmp_path) -> Path:
    """The checkpoint of step 4 of a run that crashed there."""
    with pytest.raises(Stopped):
        stop = "+callbacks.x={_target_: probes.StopAt, stage: clip, step: 4}"
        stages.run(tiny_config(tmp_path / "out", *FIVE, stop))
    return fit.checkpoint_path(tiny_config(tmp_path / "out", *FIVE), "clip")


def go_on(folder: Path, *overrides: str) -> int:
    return run_script("train", *TINY, *FIVE, f"output_dir={folder / 'out'}", *overrides)


def test_a_checkpoint_says_its_version(stopped):
    assert torch.load(stopped, weights_only=True)["version"] == VERSION == read_header(stopped).version


def test_one_without_a_version_is_gone_on_from_to_the_bit(stopped, tmp_path, capsys):
    """As releases before the first version wrote them."""
    whole = tiny_config(tmp_path / "whole", *FIVE)
    stages.run(whole)
    rewrite(stopped, version=None, num_skipped=None)
    assert read_header(stopped).version == 0
    capsys.readouterr()
    assert go_on(tmp_path) == 0
    assert "going on from step 4" in capsys.readouterr().out
    ours, theirs = (torch.load(path, weights_only=True) for path in (stopped, fit.checkpoint_path(whole, "clip")))
    for part in ("state_dict", "optimizer_states", "version"):
        assert_equal(ours[part], theirs[part], part)


def test_one_of_an_earlier_release_with_another_config_says_what_to_do(stopped, tmp_path, capsys):
    identity = torch.load(stopped, weights_only=True)["identity"]
    before = {key: value for key, value in identity.items() if key != "data.flip"} | {"clip.gone": 3}
    rewrite(stopped, version=VERSION - 1, identity=before)
    content = stopped.read_bytes()
    assert go_on(tmp_path) == 2
    err = capsys.readouterr().err
    assert "clip.gone: 3 then, not there now; data.flip: not there then, False now" in err
    assert (
        "It is of an earlier release of ldm, which can go on with it. Give this run a name of its own (name=…)" in err
    )
    assert stopped.read_bytes() == content
    assert go_on(tmp_path, "resume=never") == 0


def test_one_that_does_not_say_what_it_is_of(stopped, tmp_path, capsys):
    for path in stopped.parent.iterdir():
        rewrite(path, identity=None, version=None)
    assert go_on(tmp_path) == 2
    err = capsys.readouterr().err
    assert "last.ckpt cannot be read: it does not say which config it was trained with" in err
    assert "previous.ckpt cannot be read" in err and "to start anew over it: resume=never" in err
    assert "Traceback" not in err


def test_one_of_a_later_release_is_not_gone_back_behind(tmp_path):
    """Though the one before it could be read: hours of training would be written over."""
    io, content = AtomicCheckpointIO(), {"identity": {"seed": 0}, "global_step": 3, "version": VERSION}
    io.save_checkpoint(content, tmp_path / "last.ckpt")
    io.save_checkpoint({**content, "version": VERSION + 1}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"a later release of ldm .*go on with that release"):
        newest_whole(tmp_path)


# ------------------------------------------------------------------------------------------------------ model folders


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """A copy of a finished run, to be changed."""
    shutil.copytree(finished.output_dir, tmp_path / "out")
    return tmp_path / "out" / "shapes"


def draw(copy: Path) -> int:
    return run_script("sample", f"ckpt={copy}", "prompt=a red circle", f"out={copy.parents[1] / 'drawn'}")


@pytest.mark.parametrize(
    "settings", [None, {}, {"sampler": "ddim", "steps": 2, "guidance_scale": 3.0, "of_later": [1]}, {"steps": 2}]
)
def test_other_sampling_defaults_in_a_model_folder(settings, copy):
    path = copy / "model" / "ldm.json"
    path.unlink() if settings is None else path.write_text(json.dumps(settings))
    assert draw(copy) == 0


def test_a_sampler_that_is_not_known_any_more(copy, capsys):
    (copy / "model" / "ldm.json").write_text('{"sampler": "gone"}')
    assert draw(copy) == 2
    assert "sampler=gone is unknown; there are: ddim" in capsys.readouterr().err


@pytest.mark.parametrize("record", [None, {"key": "of before"}, {"key": "of before", "inputs": {}, "of_later": 1}])
def test_a_model_whose_result_was_recorded_otherwise(record, copy, capsys):
    """It draws as before; its training, which has ended, goes on from its checkpoint to write the record anew."""
    path = copy / "model" / "stage.json"
    path.unlink() if record is None else path.write_text(json.dumps(record))
    weights = (copy / "model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert draw(copy) == 0
    assert run_script("train", *TINY, f"output_dir={copy.parent}") == 0
    assert "going on from step 3" in capsys.readouterr().out
    assert json.loads(path.read_text())["key"] == stages.stage_key(tiny_config(copy.parent), "diffusion")
    assert (copy / "model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == weights


def test_a_run_config_of_another_release(copy, capsys):
    """Younger keys get their defaults; one that is unknown is named with the file."""
    values = yaml.safe_load((copy / "config.yaml").read_text())
    del values["data"]["flip"], values["trainer"]["max_skipped"]
    (copy / "config.yaml").write_text(yaml.safe_dump(values))
    assert load_run_config(copy) == tiny_config(values["output_dir"])
    (copy / "config.yaml").write_text(yaml.safe_dump({**values, "of_later": 1}))
    assert draw(copy) == 0
    assert run_script("evaluate", f"ckpt={copy}", "metrics=[reconstruction]") == 2
    err = capsys.readouterr().err
    assert f"{copy}/config.yaml, which another release of ldm or a person wrote: unknown config key 'of_later'" in err
