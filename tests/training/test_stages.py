"""An experiment is a list of stages: what is missing is run, what is there is not."""

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ldm.config import load_run_config
from ldm.errors import UserError
from ldm.sweep import last_values
from ldm.training import fit, stages
from ldm.training.jobs import sweep_name
from ldm.training.stages import is_done, result_folder, stage_key
from runs import ROOT, TINY, run_script, tiny_config, tiny_own_config

STAGES = ("autoencoder", "clip", "diffusion")


def keys(*overrides: str) -> dict[str, str]:
    config = tiny_config("out", *overrides)
    return {stage: stage_key(config, stage) for stage in STAGES}


# ------------------------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize(
    "override",
    [
        "data.num_workers=3",
        "data.cache=false",
        "logger=wandb",
        "~logger.tensorboard",
        "callbacks.samples.every=7",
        "name=other",
        "resume=never",
        "stages=[diffusion]",
        "trainer.devices=2",
        "trainer.strategy=ddp",
        "trainer.num_nodes=2",
        "trainer.val_every=7",
        "trainer.checkpoint_every=7",
        "sampling.steps=3",
    ],
)
def test_what_decides_nothing_changes_no_key(override):
    assert keys(override) == keys()


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("seed=1", "autoencoder clip diffusion"),
        ("data.num_train=65", "autoencoder clip diffusion"),
        ("data.resolution=32", "autoencoder clip diffusion"),
        ("data.seed=1", "autoencoder clip diffusion"),
        ("data.objects=2", "autoencoder clip diffusion"),
        ("trainer.overfit_batches=1", "autoencoder clip diffusion"),
        ("vae.latent_channels=3", "autoencoder diffusion"),
        ("autoencoder.max_steps=4", "autoencoder diffusion"),
        ("autoencoder.kl_weight=1", "autoencoder diffusion"),
        ("autoencoder.optim.lr=1", "autoencoder diffusion"),
        ("autoencoder.precision=bf16-mixed", "autoencoder diffusion"),
        ("text_encoder.text.num_hidden_layers=2", "clip diffusion"),
        ("text_encoder.max_length=19", "clip diffusion"),
        ("clip.batch_size=4", "clip diffusion"),
        ("clip.optim.weight_decay=0.5", "clip diffusion"),
        ("unet.layers_per_block=2", "diffusion"),
        ("+unet.dropout=0.1", "diffusion"),
        ("optim.lr=1", "diffusion"),
        ("++optim.arguments.eps=1e-5", "diffusion"),
        ("data.batch_size=4", "diffusion"),
        ("trainer.max_steps=4", "diffusion"),
        ("trainer.accumulate_grad_batches=2", "diffusion"),
        ("trainer.precision=bf16-mixed", "diffusion"),
        ("diffusion.caption_dropout=0.5", "diffusion"),
        ("diffusion.ema_decay=0.5", "diffusion"),
        ("diffusion=ddpm", "diffusion"),
    ],
)
def test_what_decides_a_result_changes_its_key_and_those_that_stand_on_it(override, changed):
    before, after = keys(), keys(override)
    assert {stage for stage in STAGES if before[stage] != after[stage]} == set(changed.split())


def test_a_pretrained_part_stands_in_the_key():
    pretrained = keys("+vae.pretrained=some/vae", "stages=[clip,diffusion]")
    assert pretrained["clip"] == keys()["clip"] and pretrained["diffusion"] != keys()["diffusion"]
    assert keys("+vae.pretrained=other/vae", "stages=[clip,diffusion]")["diffusion"] != pretrained["diffusion"]


def test_another_drawing_code_is_another_world(monkeypatch):
    before = keys()
    monkeypatch.setattr(stages, "SHAPES_VERSION", "another")
    assert not set(before.values()) & set(keys().values())


# --------------------------------------------------------------------------------------------------------- skipping


def test_what_exists_is_not_run_again(finished, capsys, monkeypatch):
    monkeypatch.setattr(fit, "FIT", {})
    before = {path: path.stat().st_mtime_ns for path in Path(finished.output_dir).rglob("*") if path.is_file()}
    assert stages.run(finished) == last_values(Path(finished.run_dir))["diffusion/val_loss"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in lines] == [[stage, "up", "to", "date:"] for stage in STAGES]
    after = {path: path.stat().st_mtime_ns for path in Path(finished.output_dir).rglob("*") if path.is_file()}
    assert {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)} <= {
        Path(finished.run_dir) / ".lock"
    }


@pytest.mark.parametrize("override", ["data.num_workers=1", "data.cache=false", "callbacks.samples.every=3"])
def test_what_decides_nothing_trains_nothing(finished, override, monkeypatch):
    monkeypatch.setattr(fit, "FIT", {})
    stages.run(tiny_config(finished.output_dir, override))


def test_the_model_folder_of_a_run_is_whole(run_dir, finished):
    model = run_dir / "model"
    index = json.loads((model / "model_index.json").read_text())
    parts = {name for name, value in index.items() if isinstance(value, list) and value[0]}
    assert parts == {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    assert all((model / part).is_dir() for part in parts)
    assert json.loads((model / "scheduler" / "scheduler_config.json").read_text())["prediction_type"] == "v_prediction"
    assert json.loads((model / "ldm.json").read_text()) == finished.sampling.model_dump()
    for stage, part in (("autoencoder", "vae"), ("clip", "text_encoder")):
        for file in (model / part).iterdir():
            assert file.read_bytes() == (result_folder(finished, stage) / part / file.name).read_bytes()


def test_the_run_directory_tells_what_was_run(run_dir, finished):
    assert load_run_config(run_dir) == finished
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["optim"]["_target_"] == "torch.optim.AdamW"
    environment = json.loads((run_dir / "env.json").read_text())
    assert {"ldm", "torch", "pytorch-lightning", "python", "platform", "command"} == set(environment)


def test_a_run_leaves_a_report_and_makes_a_missing_one(run_dir, finished, tmp_path, capsys):
    assert f"<h1>{finished.name}</h1>" in (run_dir / "report" / "index.html").read_text(encoding="utf-8")
    root = tmp_path / "copy"
    shutil.copytree(finished.output_dir, root)
    config = tiny_config(root)
    shutil.rmtree(Path(config.run_dir) / "report")
    for told in ([f"report: {root / 'shapes' / 'report' / 'index.html'}"], []):
        stages.run(config)
        assert [line for line in capsys.readouterr().out.splitlines() if "up to date" not in line] == told
    assert (root / "shapes" / "report" / "index.html").is_file()


def test_stages_may_be_picked_one_by_one(tmp_path, capsys):
    for stage in STAGES:
        stages.run(tiny_config(tmp_path, f"stages=[{stage}]"))
        assert [is_done(tiny_config(tmp_path), each) for each in STAGES] == [
            STAGES.index(each) <= STAGES.index(stage) for each in STAGES
        ]
        assert (tmp_path / "shapes" / "model" / "model_index.json").exists() == (stage == "diffusion")
    assert "up to date" not in capsys.readouterr().out


@pytest.mark.parametrize(("override", "missing", "group"), [
    ("stages=[diffusion]", "autoencoder", "vae"), ("stages=[autoencoder,diffusion]", "clip", "text_encoder"),
])  # fmt: skip
def test_a_u_net_without_what_it_stands_on(tmp_path, override, missing, group):
    with pytest.raises(UserError, match=rf"stage '{missing}'.*\+{group}\.pretrained="):
        stages.run(tiny_config(tmp_path / "out", override))
    assert not (tmp_path / "out").exists()


def test_a_result_whose_writing_was_cut_short_does_not_count(finished, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(finished.output_dir, root)
    config = tiny_config(root)
    for stage in STAGES:
        assert is_done(config, stage)
        record = result_folder(config, stage) / "stage.json"
        for content in ("", "[]", "{", '{"key": "other"}'):
            record.write_text(content)
            assert not is_done(config, stage)
        record.unlink()
        assert not is_done(config, stage)


def test_a_part_that_was_deleted_is_put_back(finished, tmp_path, capsys):
    root = tmp_path / "copy"
    shutil.copytree(finished.output_dir, root)
    config = tiny_config(root)
    model = Path(config.run_dir) / "model"
    shutil.rmtree(model / "vae")
    shutil.rmtree(model / "tokenizer")
    stages.run(config)
    assert (model / "vae" / "config.json").is_file() and (model / "tokenizer").is_dir()
    assert "training" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ changed configs


def test_another_config_in_the_same_directory_is_told_and_touches_nothing(finished, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(finished.output_dir, root)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(UserError) as error:
        stages.run(tiny_config(root, "optim.lr=0.123", "diffusion.ema_decay=0.5", "data.batch_size=4"))
    message = str(error.value)
    assert "optim.lr: " in message and "0.123 now" in message and "diffusion.ema_decay: 0.999 then, 0.5 now" in message
    assert "batch_size: 8 then, 4 now" in message and "name=…" in message and "resume=never" in message
    with pytest.raises(UserError, match=r"another config \(batch_size: 8 then, 4 now\)"):
        stages.run(tiny_config(root, "data.batch_size=4"))
    after = {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != ".lock"}
    assert before == after


def test_a_result_is_recorded_without_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("SET_KEY", "hidden-cats")
    config = tiny_own_config(tmp_path, "data.path=/sets/hidden-cats")
    stages.record_result(config, "clip", tmp_path, "pictures")
    record = (tmp_path / "stage.json").read_text()
    assert "hidden-cats" not in record and "/sets/${oc.env:SET_KEY}" in record
    monkeypatch.delenv("SET_KEY")
    assert stage_key(config, "clip") in record


def test_resume_never_trains_it_anew_over_the_old_one(finished, tmp_path, capsys):
    root = tmp_path / "copy"
    shutil.copytree(finished.output_dir, root)
    config = tiny_config(root, "optim.lr=0.123", "resume=never")
    stages.run(config)
    out = capsys.readouterr().out
    assert out.count("up to date") == 2 and "going on" not in out
    assert load_run_config(Path(config.run_dir)).optim.lr == 0.123 and is_done(config, "diffusion")
    assert not is_done(tiny_config(root), "diffusion")


def test_a_model_is_never_made_of_parts_that_do_not_belong_together(finished, tmp_path):
    """A new VAE in a finished run: until its own U-Net is trained there is no model, rather than a broken one."""
    root = tmp_path / "copy"
    shutil.copytree(finished.output_dir, root)
    config = tiny_config(root, "autoencoder.max_steps=5", "stages=[autoencoder]")
    model = Path(config.run_dir) / "model"
    assert (model / "model_index.json").exists()
    stages.run(config)
    assert not (model / "model_index.json").exists() and not (model / "stage.json").exists()
    stages.run(tiny_config(root, "autoencoder.max_steps=5", "resume=never"))
    assert (model / "model_index.json").exists()


@pytest.mark.parametrize(
    "override",
    [
        "unet.attention_head_dim=3",
        "optim._target_=torch.optim.Nothing",
        "++optim.arguments.nothing=1",
        "text_encoder.vision.num_attention_heads=3",
        "vae.norm_num_groups=3",
        "+callbacks.x._target_=nowhere.Callback",
        "+callbacks.samples.nothing=1",
        "trainer.strategy=nothing",
    ],
)
def test_what_a_later_stage_would_stumble_over_is_found_before_the_first(override, tmp_path, capsys):
    with pytest.raises(UserError):
        stages.run(tiny_config(tmp_path / "out", override))
    assert not (tmp_path / "out").exists()
    assert "training" not in capsys.readouterr().out


def test_a_user_error_late_in_a_run_keeps_what_was_trained(tmp_path, monkeypatch):
    monkeypatch.setitem(fit.FIT, "diffusion", lambda *args: (_ for _ in ()).throw(UserError("late")))
    with pytest.raises(UserError, match="late"):
        stages.run(tiny_config(tmp_path))
    assert is_done(tiny_config(tmp_path), "autoencoder") and is_done(tiny_config(tmp_path), "clip")
    assert (tmp_path / "shapes" / "metrics.csv").is_file()


def test_a_result_that_another_run_finished_first_is_left_alone(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, "stages=[clip]")
    real = fit._fit

    def slower(*args, **kwargs):
        trainer = real(*args, **kwargs)
        place = result_folder(config, "clip")
        place.mkdir(parents=True)
        for name in ("text_encoder", "tokenizer"):
            (place / name).mkdir()
        (place / "theirs").touch()
        stages.record_result(config, "clip", place, "")
        return trainer

    monkeypatch.setattr(fit, "_fit", slower)
    stages.run(config)
    assert (result_folder(config, "clip") / "theirs").exists()


def test_all_of_a_result_is_on_the_disk_when_it_is_done(finished, tmp_path, monkeypatch):
    """Those of our own stages are linked; a pretrained text encoder's tokenizer is written by another library."""
    flushed, fsync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (flushed.add(os.fstat(number).st_ino), fsync(number)))
    model = Path(finished.run_dir) / "model"
    for overrides in ([], [f"+text_encoder.pretrained={model}", "stages=[autoencoder,diffusion]", "name=other"]):
        config = tiny_config(tmp_path, *overrides)
        stages.run(config)
        files = [path for path in (Path(config.run_dir) / "model").rglob("*") if path.is_file()]
        files += [path for path in (tmp_path / "stages").rglob("*") if path.is_file()]
        assert {"tokenizer.json", ".vae", "stage.json"} <= {path.name for path in files}
        assert [path for path in files if path.stat().st_ino not in flushed] == []


def test_a_link_that_was_cut_short_is_made_again(finished, tmp_path):
    result, model = result_folder(finished, "autoencoder"), tmp_path / "model"
    (model / ".vae.x.tmp").mkdir(parents=True)
    stages._link_result(result, model, "vae")
    stages._link_result(result, model, "vae")
    assert sorted(path.name for path in model.iterdir()) == [".vae", "vae"]
    assert (model / ".vae").read_text() == result.name


# ----------------------------------------------------------------------------------------------------- one at a time


def hold(run_dir: str, ready, release) -> None:
    with stages.held(Path(run_dir)):
        ready.set()
        release.wait(30)


def test_a_directory_in_use_by_another_process(tmp_path, capsys):
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    process = context.Process(target=hold, args=(str(tmp_path / "shapes"), ready, release))
    process.start()
    try:
        assert ready.wait(30)
        arguments = [*TINY, f"output_dir={tmp_path}"]
        assert run_script("train", *arguments) == 2
        err = capsys.readouterr().err
        assert f"in use by process {process.pid} on " in err and "name=…" in err
        assert [path.name for path in (tmp_path / "shapes").iterdir()] == [".lock"]
        with stages.held(tmp_path / "another"):  # other directories are free
            pass
    finally:
        release.set()
        process.join(30)
    with stages.held(tmp_path / "shapes"):  # and this one when its process is gone
        pass


def test_a_killed_process_holds_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    process = context.Process(target=hold, args=(str(tmp_path / "run"), ready, release))
    process.start()
    assert ready.wait(30)
    process.kill()
    process.join(30)
    with stages.held(tmp_path / "run"):
        assert f"process {os.getpid()} " in (tmp_path / "run" / ".lock").read_text()


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written: Not a directory"), stages.held(tmp_path / "file" / "run"):
        pass
    with pytest.raises(UserError, match="cannot be written"), stages.held(tmp_path / ("x" * 300)):
        pass
    with pytest.raises(UserError, match="cannot be written"):
        stages.run(tiny_config(tmp_path, f"name={'x' * 300}"))


def test_only_what_a_failed_run_made_itself_is_removed(tmp_path):
    (tmp_path / "there").mkdir()
    for run_dir in (tmp_path / "there", tmp_path / "a" / "b" / "c"):
        with pytest.raises(UserError, match="no"), stages.held(run_dir):
            raise UserError("no")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="no"), stages.held(tmp_path / "a" / "b" / "c"):
        (tmp_path / "a" / "b" / "shared").mkdir()
        raise UserError("no")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["shared"]
    with pytest.raises(RuntimeError), stages.held(tmp_path / "bug"):
        raise RuntimeError
    assert (tmp_path / "bug").is_dir()  # what a crash left may be looked at


@pytest.mark.parametrize("name", ["LOCAL_RANK", "RANK", "NODE_RANK", "SLURM_PROCID"])
def test_other_ranks_neither_hold_nor_write(name, tmp_path, monkeypatch):
    monkeypatch.setenv(name, "1")
    with stages.held(tmp_path / "run"):
        assert not (tmp_path / "run").exists()
    monkeypatch.setenv(name, "0")
    with stages.held(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").exists()


# ----------------------------------------------------------------------------------------------------------- sweeps


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["experiment=shapes", "optim.lr=1e-3", "stages=[diffusion]"], "optim.lr-1e-3"),
        (["unet=small", "+unet.dropout=0.1"], "unet-small_+unet.dropout-0.1"),
        (["experiment=shapes"], "job"),
        (["unet.block_out_channels=[8,16]"], "unet.block_out_channels-8,16"),
        (["data.path=../a/b c"], "data.path-..-a-b-c"),
        (["name=x", "output_dir=y", "debug=fast"], "debug-fast"),
    ],
)
def test_jobs_are_named_by_what_sets_them_apart(overrides, name):
    assert sweep_name(overrides) == name


def test_names_of_jobs_are_file_names_that_ckpt_can_take():
    long = [f"unet.block_out_channels=[{i},{i}]" for i in range(40)]
    names = {sweep_name([*long, f"optim.lr={rate}"]) for rate in (1, 2, 3)}
    assert len(names) == 3
    for name in (*names, sweep_name(["a='x=y'", 'b="é 中"', "c={d: [1, 2]}"])):
        assert re.fullmatch(r"[\w.,+-]+", name) and len(name.encode()) < 255
        assert "=" not in name and not name.startswith("..")


@pytest.mark.slow
def test_a_sweep_trains_one_vae_and_one_clip(tmp_path, capsys):
    arguments = ["-m", *TINY, f"output_dir={tmp_path}", "optim.lr=1e-3,2e-3"]
    assert run_script("train", *arguments) == 0
    out = capsys.readouterr().out
    assert sum("training," in line for line in out.splitlines()) == 4  # VAE, CLIP, two U-Nets
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "stages").iterdir()) == ["autoencoder", "clip"]
    jobs = sorted(path.parent.parent for path in (tmp_path / "shapes").glob("*/model/model_index.json"))
    assert len(jobs) == 2
    weights = [(job / "model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() for job in jobs]
    assert weights[0] != weights[1]
    assert {load_run_config(job).optim.lr for job in jobs} == {1e-3, 2e-3}
    assert run_script("train", *arguments) == 0
    assert "training," not in capsys.readouterr().out
    assert not (tmp_path / "shapes" / "model").exists()
    for job in jobs:
        assert run_script("sample", f"ckpt={job}", "prompt=a red circle", f"out={tmp_path / 'out'}") == 0


def test_a_sweep_returns_the_validation_loss_for_sweepers(finished):
    config = tiny_config(finished.output_dir, "name=loss", "stages=[diffusion]")
    loss = stages.run(config)
    lines = (Path(config.run_dir) / "metrics.csv").read_text().splitlines()
    assert loss == pytest.approx(
        float(next(line.split(",")[2] for line in lines if "diffusion/val_loss" in line)), rel=1e-4
    )


def test_a_run_shorter_than_the_way_to_validation_is_validated_at_its_end(finished):
    config = tiny_config(finished.output_dir, "name=short", "stages=[diffusion]", "trainer.val_every=1000")
    assert stages.run(config) is not None


def test_that_all_is_up_to_date_is_found_without_torch(finished):
    code = (
        "import sys; sys.path.insert(0, 'tests'); import runs; from ldm.training import stages\n"
        f"stages.run(runs.tiny_config({str(finished.output_dir)!r}))\n"
        "print(sorted({'torch', 'pytorch_lightning', 'transformers', 'datasets'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all("up to date" in line for line in lines[:3]) and lines[3] == "[]"


@pytest.mark.parametrize("content", ["", "[1]", "{", "[" * 100_000, '{"key": ["x"]}', "\0"])
def test_a_result_that_says_anything_is_none(tmp_path, content):
    config = tiny_config(tmp_path)
    folder = result_folder(config, "clip")
    folder.mkdir(parents=True)
    (folder / "stage.json").write_text(content)
    assert not is_done(config, "clip")
