"""Metrics in the course of training: what is logged, that nothing else changes, and what is refused."""

import csv
import errno
import json
import os
from pathlib import Path

import pytest
import torch

from ldm.errors import UserError
from ldm.evaluation.evaluate import evaluate
from ldm.training import measuring, stages
from ldm.training.measuring import by_setting
from probes import Stopped
from runs import TINY_OWN, compose_values, run_script, tiny_config

MEASURED = (
    "evaluation.metrics=[prompt_accuracy,cmmd]", "evaluation.every=2", "evaluation.weights=[ema,raw]",
    "evaluation.num_prompts=6", "evaluation.guidance_scale=[1,3]", "trainer.max_steps=3", "sampling.steps=2",
)  # fmt: skip


def rows(run_dir: Path) -> dict[tuple[str, int], float]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        found = [(row[0], int(row[1]), float(row[2])) for row in list(csv.reader(file))[1:]]
    assert len({row[:2] for row in found}) == len(found), "logged twice"
    return {row[:2]: row[2] for row in found}


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("measured")
    stages.run(tiny_config(output_dir, *MEASURED))
    return output_dir / "shapes"


def test_every_metric_is_logged_for_each_setting_and_both_weights_when_due_and_at_the_end(measured):
    found = rows(measured)
    for step in (1, 2):  # after two optimizer steps, and after the last
        for name, best in (("prompt_accuracy", max), ("prompt_accuracy_unseen", max), ("cmmd", min)):
            for weights in ("", "_raw"):
                key = f"diffusion/{name}{weights}"
                each = [found[f"{key}/guidance {scale}", step] for scale in (1, 3)]
                assert found[key, step] == best(each)
    assert not any(step == 0 and "accuracy" in name for name, step in found)
    sheets = {path.name for path in (measured / "evaluation").glob("*.png")}
    assert {"step-000002.png", "step-000002_raw.png", "step-000003.png", "step-000003_raw.png"} <= sheets


def test_the_last_figures_are_those_of_evaluate(measured):
    asked = [
        f"ckpt={measured}", "metrics=[prompt_accuracy,cmmd]", "num_prompts=6", "guidance_scale=[1,3]",
        f"out={measured}/again.json",
    ]  # fmt: skip
    evaluate(compose_values("evaluate", asked))
    again = json.loads((measured / "again.json").read_text())
    found = rows(measured)
    for metric in ("prompt_accuracy", "cmmd"):
        for kind, by in by_setting(metric, again[metric]).items():
            for setting, value in by.items():
                assert found[f"diffusion/{kind}/{setting}", 2] == pytest.approx(value, rel=1e-5)
    # and the two weights are two
    assert found["diffusion/cmmd/guidance 3", 2] != found["diffusion/cmmd_raw/guidance 3", 2]


def test_measuring_changes_nothing_that_is_trained(measured, tmp_path):
    stages.run(tiny_config(tmp_path, *MEASURED, "evaluation.metrics=[]"))
    ours, plain = (
        torch.load(run / "checkpoints/diffusion/last.ckpt", weights_only=True)
        for run in (measured, tmp_path / "shapes")
    )
    assert all(torch.equal(ours["state_dict"][key], plain["state_dict"][key]) for key in plain["state_dict"])
    assert rows(tmp_path / "shapes").items() <= rows(measured).items()


def test_a_resumed_run_measures_what_an_uninterrupted_one_does(measured, tmp_path, monkeypatch):
    config = tiny_config(tmp_path, *MEASURED)
    measure = measuring.Measure.on_train_batch_end

    def interrupted(self, trainer, *args):
        if trainer.global_step == 3:
            raise Stopped
        measure(self, trainer, *args)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(measuring.Measure, "on_train_batch_end", interrupted)
        stages.run(config)
    stages.run(config)
    assert rows(tmp_path / "shapes") == rows(measured)


def test_the_optimized_metric_is_returned_again_and_again(measured):
    def returned(*overrides: str) -> float | None:
        return stages.run(tiny_config(measured.parent, *MEASURED, *overrides))

    found = rows(measured)
    assert returned() == found["diffusion/val_loss", 1]
    assert returned("optimized_metric=diffusion/cmmd") == found["diffusion/cmmd", 2]
    with pytest.raises(UserError, match=r"val_los is not in .*did you mean 'diffusion/val_loss'"):
        returned("optimized_metric=diffusion/val_los")


def test_half_precision_and_accumulation_are_measured_too(tmp_path):
    """As on a GPU: the frozen parts are halves, and two batches make a step."""
    stages.run(tiny_config(tmp_path, *MEASURED, "trainer.precision=bf16-mixed", "trainer.accumulate_grad_batches=2"))
    assert {step for name, step in rows(tmp_path / "shapes") if "accuracy" in name} == {1, 2}


def test_an_inpainting_unet_draws_all_of_a_white_picture(tmp_path):
    stages.run(tiny_config(tmp_path, *MEASURED, "+unet.in_channels=9", "data.cache=false", "trainer.max_steps=1"))
    assert ("diffusion/prompt_accuracy/guidance 3", 0) in rows(tmp_path / "shapes")


def test_what_goes_wrong_in_drawing_does_not_end_training(tmp_path, monkeypatch, capsys):
    def broken(subject):
        raise UserError("the latents are not finite")

    monkeypatch.setitem(measuring.METRICS, "prompt_accuracy", broken)
    stages.run(tiny_config(tmp_path, "evaluation.metrics=[prompt_accuracy]"))
    assert "not measured after step 3: the latents are not finite" in capsys.readouterr().out
    assert (tmp_path / "shapes" / "model" / "model_index.json").exists()


def test_a_full_disk_ends_the_run_and_the_one_that_goes_on_measures_again(measured, tmp_path, monkeypatch):
    config = tiny_config(tmp_path, *MEASURED)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):

        def full(subject):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setitem(measuring.METRICS, "cmmd", full)
        stages.run(config)
    stages.run(config)
    assert rows(tmp_path / "shapes") == rows(measured)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["optimized_metric=diffusion/cmmd"], r"ask for it with evaluation.metrics=\[cmmd\]"),
        (["optimized_metric=unet/val_loss"], "begins with one of the stages, as in diffusion/val_loss"),
        (["diffusion.weighting=min_snr", "diffusion.zero_terminal_snr=true"], "would never be trained"),
        (["evaluation.metrics=[retrieval]"], "retrieval does not change as the U-Net learns"),
        (["evaluation.metrics=[clip_score]", "+text_encoder.pretrained=x", "stages=[diffusion]"], "evaluation.clip="),
        (["evaluation.metrics=[fid]", "evaluation.num_prompts=1"], "needs two"),
        (["evaluation.metrics=[prompt_accuracy]", "evaluation.guidance_scale=[3,3]"], "twice"),
        (["evaluation.weights=[]"], "evaluation.weights"),
    ],
)
def test_what_cannot_be_measured_is_refused(overrides, told, tmp_path):
    with pytest.raises(UserError, match=told):
        tiny_config(tmp_path, *overrides)


def test_prompt_accuracy_is_for_the_built_in_pictures(tmp_path, capsys):
    arguments = [*TINY_OWN, "data=folder", f"data.path={tmp_path}", f"output_dir={tmp_path / 'out'}"]
    assert run_script("train", *arguments, "evaluation.metrics=[prompt_accuracy]") == 2
    assert "prompt_accuracy reads pictures of the built-in shapes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_feature_network_that_cannot_be_had_is_known_before_the_first_stage(tmp_path):
    missing = f"evaluation.inception={tmp_path}/none.pth"
    with pytest.raises(UserError, match=r"none\.pth"):
        stages.run(tiny_config(tmp_path, "evaluation.metrics=[fid]", missing))
    assert not (tmp_path / "shapes" / "checkpoints").exists()
