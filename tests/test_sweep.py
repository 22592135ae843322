"""What a sweep found: ranked, seeds together, as table, plot and JSON; and a real one from end to end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from ldm.errors import UserError
from ldm.sweep import last_values, summarize
from runs import ROOT, TINY, run_script

RECIPES = {"v": (0.5, 0.7), "flow": (0.9,), "epsilon": (0.1, 0.3)}


def job(folder: Path, recipe: str, seed: int, accuracy: float, **config) -> None:
    run = folder / f"seed-{seed}_recipe-{recipe}"
    run.mkdir(parents=True)
    told = {"seed": seed, "stages": ["clip", "diffusion"], "optimized_metric": "diffusion/prompt_accuracy", **config}
    (run / "config.yaml").write_text(yaml.safe_dump(told))
    (run / "overrides.txt").write_text(f"experiment=shapes\nsweep=recipes\nseed={seed}\nrecipe={recipe}\n")
    lines = ["metric,step,value,unix_time"]
    for step in (9, 19):
        value = accuracy * (step + 1) / 20
        lines += [f"diffusion/prompt_accuracy,{step},{value},1", f"diffusion/val_loss,{step},{1 - value},1"]
        lines += [f"diffusion/prompt_accuracy/guidance {scale},{step},{value / scale},1" for scale in (1, 3)]
    (run / "metrics.csv").write_text("\n".join([*lines, "diffusion/prompt_acc"]))


@pytest.fixture
def sweep(tmp_path) -> Path:
    for recipe, values in RECIPES.items():
        for seed, value in enumerate(values):
            job(tmp_path, recipe, seed, value)
    return tmp_path


def test_seeds_stand_together_and_the_best_comes_first(sweep):
    found = summarize(sweep)
    assert [row["told"] for row in found["jobs"]] == ["recipe=flow", "recipe=v", "recipe=epsilon"]
    assert found["metric"] == "diffusion/prompt_accuracy"
    assert found["jobs"][1]["seeds"] == [0, 1]
    assert found["jobs"][1]["runs"] == ["seed-0_recipe-v", "seed-1_recipe-v"]
    assert found["jobs"][1]["values"]["diffusion/prompt_accuracy"] == [0.5, 0.7]  # the last of each, not the first
    assert json.loads((sweep / "sweep.json").read_text()) == found
    assert "| `recipe=v` | 2 | 0.6 ± 0.14 |\n" in (sweep / "sweep.md").read_text()
    with Image.open(sweep / "sweep.png") as picture:
        assert picture.width > 2 * picture.height  # with guidance beside


def test_columns_are_those_asked_for_and_the_first_ranks(sweep):
    job(sweep, "none", 0, 0.0)
    (sweep / "seed-0_recipe-none" / "metrics.csv").unlink()  # died before it measured anything
    job(sweep, "broken", 0, float("nan"))
    found = summarize(sweep, ["diffusion/val_loss", "diffusion/prompt_accuracy/guidance 3"])
    assert [row["told"] for row in found["jobs"]] == [
        "recipe=flow", "recipe=v", "recipe=epsilon", "recipe=broken", "recipe=none",
    ]  # fmt: skip
    table = (sweep / "sweep.md").read_text().splitlines()
    assert table[2] == "| `recipe=flow` | 1 | 0.1 | 0.3 |"  # the lowest loss first
    assert table[-2:] == ["| `recipe=broken` | 0 | – | – |", "| `recipe=none` | 0 | – | – |"]


def test_without_a_named_metric_the_last_stage_s_loss_ranks(sweep):
    for path in sweep.glob("*/config.yaml"):
        path.write_text(path.read_text().replace("diffusion/prompt_accuracy", "null"))
    assert summarize(sweep)["metric"] == "diffusion/val_loss"


def test_a_sweep_over_nothing_but_seeds_is_one_row(tmp_path):
    for seed in range(3):
        job(tmp_path, "v", seed, 0.5)
    assert [(row["told"], row["seeds"]) for row in summarize(tmp_path)["jobs"]] == [("as it is", [0, 1, 2])]


def test_what_cannot_be_summed_up_is_told(sweep, tmp_path):
    with pytest.raises(UserError, match=r"no job of .* has the metric x; there are: diffusion/prompt_accuracy, "):
        summarize(sweep, ["x"])
    with pytest.raises(UserError, match="holds no jobs of a sweep"):
        summarize(tmp_path / "seed-0_recipe-v")
    assert last_values(tmp_path / "nothing") == {}
    done = subprocess.run([sys.executable, "-m", "ldm.sweep", tmp_path / "none"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_recipes_are_one_sweep_that_ends_in_a_ranking(tmp_path, capsys):
    """As typed, but two recipes of a tiny model: each is trained by its own objective, and ranked."""
    tiny = [item for item in TINY if item != "evaluation.metrics=[]"]
    arguments = [
        "-m", "sweep=recipes", *tiny, f"output_dir={tmp_path}", "seed=0", "recipe=flow,min_snr",
        "evaluation.num_prompts=2", "evaluation.steps=2", "evaluation.guidance_scale=[1,4]",
        "evaluation.weights=[ema]", "trainer.val_every=3",
    ]  # fmt: skip
    assert run_script("train", *arguments) == 0
    found = json.loads((tmp_path / "recipes" / "sweep.json").read_text())
    assert {name for row in found["jobs"] for name in row["values"]} >= {
        "diffusion/prompt_accuracy/guidance 4", "diffusion/prompt_accuracy_unseen", "diffusion/val_loss",
    }  # fmt: skip
    configs = {
        path.parent.name: yaml.safe_load(path.read_text())["diffusion"]
        for path in tmp_path.glob("recipes/*/config.yaml")
    }
    trained = sorted((config["prediction_type"], config["weighting"]) for config in configs.values())
    assert trained == [("flow_prediction", "uniform"), ("v_prediction", "min_snr")]
    assert all("recipe-" in name and "sweep" not in name.replace("sweep=", "") for name in configs)
    out = capsys.readouterr().out
    assert "draw with the best: python sample.py ckpt=" in out
    assert run_script("train", *arguments) == 0  # and again trains nothing
    assert "diffusion    training" not in capsys.readouterr().out


def test_every_recipe_composes(monkeypatch):
    """Each option of conf/recipe, so that none of the sweep fails after an hour."""
    from runs import tiny_config

    named = yaml.safe_load((ROOT / "conf/sweep/recipes.yaml").read_text())["hydra"]["sweeper"]["params"]["recipe"]
    options = {path.stem for path in (ROOT / "conf/recipe").glob("*.yaml")}
    assert set(named.split(",")) == options
    for option in options:
        tiny_config("out", "sweep=recipes", f"recipe={option}", "evaluation.metrics=[prompt_accuracy]")


def test_damaged_rows_and_overrides_are_passed_over(sweep):
    run = sweep / "seed-0_recipe-v"
    before = summarize(sweep)
    with (run / "metrics.csv").open("ab") as file:
        file.write(b'\ndiffusion/val_loss,9,null,1\ndiffusion/val_loss,nine,0.1,1\na,b,\xff\n"open,1,0.3,1\n\0,,,\n')
    assert last_values(run) == last_values(sweep / "seed-0_recipe-v") and summarize(sweep)["jobs"] == before["jobs"]
    (run / "overrides.txt").write_bytes(b"\xff\n")
    assert len(summarize(sweep)["jobs"]) == 4
    (run / "overrides.txt").unlink()
    assert "as it is" in {row["told"] for row in summarize(sweep)["jobs"]}


@pytest.mark.parametrize("text", [
    "", "[1]", "\xff", "seed: 1", "{seed: x, stages: [clip]}", "{seed: 1, stages: 3}", "{seed: 1, stages: []}",
    "{seed: 1, stages: [sleep]}", "{seed: 1, stages: [[clip]]}", "{seed: 1, stages: [clip], optimized_metric: [a]}",
    "opton\nseed: 1", "[" * 2000, "seed: 2001-02-30",
])  # fmt: skip
def test_a_job_s_config_of_anything_is_told(sweep, text):
    (sweep / "seed-0_recipe-v" / "config.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"seed-0_recipe-v/config\.yaml"):
        summarize(sweep)
