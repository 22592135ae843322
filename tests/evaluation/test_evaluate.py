"""What `evaluate.py` writes and prints, of a tiny run: the figures are low, the form is that of any run."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.errors import UserError
from ldm.evaluation.evaluate import evaluate
from ldm.evaluation.table import print_table, show
from ldm.training import stages
from runs import compose_values, run_script, tiny_config

ATTRIBUTES = {"shape", "color", "background", "size", "position", "all"}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    config = tiny_config(tmp_path_factory.mktemp("run"), "data.resolution=32", "data.seed=3")
    stages.run(config)
    return Path(config.run_dir)


@pytest.fixture(scope="module")
def results(run_dir) -> dict:
    return evaluate(compose_values("evaluate", [f"ckpt={run_dir}", "num_prompts=6", "batch_size=4"]))


def test_what_is_written_is_what_is_returned(run_dir, results):
    assert json.loads((run_dir / "evaluation.json").read_text()) == results
    assert set(results) == {"ckpt", "prompt_accuracy", "seconds"} and results["ckpt"] == str(run_dir)
    assert "6 held-out prompts a row" in (run_dir / "report" / "index.html").read_text(encoding="utf-8")


def test_each_attribute_for_seen_and_unseen_pairs_with_and_without_guidance(results):
    found = results["prompt_accuracy"]
    assert found["num_prompts"] == 6 and found["resolution"] == 32 and found["seed"] == 0
    assert found["steps"] == 2 and found["sampler"] == "ddim"  # the model's own
    assert set(found["pairs"]) == {"seen", "unseen"}
    for rows in found["pairs"].values():
        assert list(rows) == ["guidance 1", "guidance 3"]
        for row in rows.values():
            assert set(row) == ATTRIBUTES and all(0 <= value <= 1 for value in row.values())
            assert row["all"] <= min(row.values())
            assert all(abs(value * 6 - round(value * 6)) < 1e-6 for value in row.values())  # of six pictures
    assert set(found["ceiling"]) == ATTRIBUTES


def test_the_sheet_shows_the_pictures(run_dir, results):
    picture = np.asarray(Image.open(run_dir / "evaluation.png"))
    assert picture.shape[1] > 8 * 128 and picture.std() > 1


def test_the_same_command_gives_the_same_figures(run_dir, results):
    values = compose_values(
        "evaluate", [f"ckpt={run_dir / 'model'}", "num_prompts=6", "batch_size=3", "out=again.json"]
    )
    again = evaluate({**values, "out": str(run_dir / "again.json")})
    assert again["prompt_accuracy"] == results["prompt_accuracy"]
    assert (run_dir / "again.png").is_file()


def test_the_prompts_are_held_out_and_of_the_world_of_the_run(run_dir, results, monkeypatch):
    from ldm.data import shapes
    from ldm.evaluation import prompt_accuracy

    asked, scored = [], []
    real_prompts, real_score = shapes.prompts, prompt_accuracy.score

    def prompts(split, num, **options):
        asked.append((split, num, options))
        return real_prompts(split, num, **options)

    def score(images, scenes):
        scored.append((len(images), [(o.shape, o.color) for scene in scenes for o in scene.objects]))
        return real_score(images, scenes)

    monkeypatch.setattr(shapes, "prompts", prompts)
    monkeypatch.setattr(prompt_accuracy, "score", score)
    values = compose_values("evaluate", [f"ckpt={run_dir}", "num_prompts=20", "guidance_scale=1", "steps=1"])
    found = evaluate({**values, "out": str(run_dir / "other.json")})["prompt_accuracy"]
    assert asked == [(split, 20, {"objects": 1, "seed": 3}) for split in ("val", "unseen")]
    assert [list(rows) for rows in found["pairs"].values()] == [["guidance 1"]] * 2  # asked for once, drawn once
    assert found["steps"] == 1
    unseen = shapes.unseen_pairs(3)
    assert not set(scored[0][1]) & unseen and set(scored[1][1]) <= unseen
    assert [num for num, _ in scored] == [20, 20, 40]  # the ceiling is of all scenes


def test_the_ceiling_is_that_of_the_vae(run_dir, results, monkeypatch):
    """A VAE that gave back what it got would have the reader's own figure."""
    from ldm.nn.autoencoder import AutoencoderKL

    monkeypatch.setattr(AutoencoderKL, "encode", lambda self, image: image)
    monkeypatch.setattr(AutoencoderKL, "latents", lambda self, moments, noise=None: moments)
    real = AutoencoderKL.decode
    monkeypatch.setattr(AutoencoderKL, "decode", lambda self, z: z if z.shape[1] == 3 else real(self, z))
    values = compose_values("evaluate", [f"ckpt={run_dir}", "num_prompts=20", "guidance_scale=1", "steps=1"])
    found = evaluate({**values, "out": str(run_dir / "perfect.json")})["prompt_accuracy"]
    assert found["ceiling"] == dict.fromkeys(found["ceiling"], 1.0)


def test_the_table_says_it_all(results, capsys):
    print_table(results["prompt_accuracy"])
    out = capsys.readouterr().out
    assert "6 held-out prompts a row, 2 steps" in out
    rows = [line for line in out.splitlines() if re.search(r"│.*%", line)]
    assert len(rows) == 5 and "ceiling" in rows[4]
    assert all(line.count("%") == len(ATTRIBUTES) for line in rows)
    assert all(len(line) <= 110 for line in out.splitlines())


def test_the_table_from_the_file_and_the_script(run_dir, results, capsys, monkeypatch):
    import runpy

    monkeypatch.setattr("sys.argv", ["table", str(run_dir / "evaluation.json")])
    monkeypatch.delitem(__import__("sys").modules, "ldm.evaluation.table")
    runpy.run_module("ldm.evaluation.table", run_name="__main__")
    table = capsys.readouterr().out
    arguments = [f"ckpt={run_dir}", "num_prompts=6", f"out={run_dir / 'script.json'}"]
    assert run_script("evaluate", *arguments) == 0
    assert table in capsys.readouterr().out


def test_a_model_without_a_run_has_no_prompt_accuracy(run_dir, tmp_path):
    (run_dir / "model").rename(tmp_path / "model")
    try:
        with pytest.raises(UserError, match=r"built-in shapes; .* has no config\.yaml"):
            evaluate(compose_values("evaluate", [f"ckpt={tmp_path / 'model'}"]))
        assert not list(tmp_path.glob("*.json"))
    finally:
        (tmp_path / "model").rename(run_dir / "model")


@pytest.mark.parametrize("content", [
    b"\xff", b"[1]", b"{", b'{"prompt_accuracy": 3}', b'{"prompt_accuracy": {"ceiling": {}}}',
    b'{"fid": {"values": [1]}}',
    b'{"fid": {"values": [{"steps": 1, "guidance_scale": "x", "value": 1}]}}', b'{"retrieval": 3}',
])  # fmt: skip
def test_results_of_anything_are_told(tmp_path, content):
    path = tmp_path / "evaluation.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"evaluation\.json "):
        show(path)
