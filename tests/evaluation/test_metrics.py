"""Every metric by `evaluate.py`, on a tiny run: what is drawn, compared, written, and refused at the door."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import tiny
from ldm.config import DRAWING, EvaluateConfig, check, load_run_config
from ldm.errors import UserError
from ldm.evaluation import features, real, subject
from ldm.evaluation.distances import cmmd, frechet_distance, kernel_distance
from ldm.evaluation.evaluate import METRICS, evaluate
from ldm.pipeline import LatentDiffusionPipeline
from ldm.training import stages
from ldm.weights.folder import save_network
from runs import ROOT, compose_values, run_script, tiny_config
from sets import folder_data, sidecar_folder

BY_CLIP = "[clip_score,clip_frechet,cmmd,memorization,retrieval,reconstruction]"
NUM = 6


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    config = tiny_config(tmp_path_factory.mktemp("run"))
    stages.run(config)
    return Path(config.run_dir)


@pytest.fixture
def drawings(monkeypatch) -> list:
    """What was asked of the pipeline, a (number of prompts, steps, guidance scale) for each call that drew."""
    calls = []
    real = LatentDiffusionPipeline.generate

    def generate(self, prompts, seeds, *args, **options):
        if len(prompts):
            calls.append((list(prompts), list(seeds), options["steps"], options["guidance_scale"]))
        return real(self, prompts, seeds, *args, **options)

    monkeypatch.setattr(LatentDiffusionPipeline, "generate", generate)
    return calls


def values(ckpt: Path, *overrides: str, **more) -> dict:
    return {**compose_values("evaluate", [f"ckpt={ckpt}", f"num_prompts={NUM}", *overrides]), **more}


def another_run(run_dir: Path, place: Path, data: dict | None = None) -> Path:
    """Copy a run, that says it was trained on other data."""
    shutil.copytree(run_dir, place)
    config = yaml.safe_load((place / "config.yaml").read_text())
    config["output_dir"] = str(run_dir.parent)
    config["data"] = data or config["data"]
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    return place


@pytest.fixture
def folder_run(run_dir, tmp_path) -> Path:
    rng = np.random.default_rng(0)
    images = [tiny_png(rng) for _ in range(12)]
    captions = [f"picture {i // 2}" for i in range(12)]  # each caption twice
    pictures = sidecar_folder(tmp_path / "pictures", images, captions)
    return another_run(run_dir, tmp_path / "run", folder_data(pictures, resolution=16, num_val=4).model_dump())


def tiny_png(rng) -> bytes:
    import io

    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


# ------------------------------------------------------------------------------------------------ one call, all metrics


def test_a_sweep_draws_once_for_all_metrics(run_dir, tmp_path, drawings, capsys):
    out = tmp_path / "e.json"
    metrics = BY_CLIP.replace("[", "[prompt_accuracy,")
    results = evaluate(values(run_dir, f"metrics={metrics}", "guidance_scale=[1,3]", "steps=[1,2]", out=str(out)))
    assert json.loads(out.read_text()) == results
    drawn = [(call[2], call[3]) for call in drawings]
    assert sorted(drawn) == sorted([(steps, scale) for steps in (1, 2) for scale in (1.0, 3.0)] * 2)  # val and unseen
    assert all(seeds == list(range(NUM)) for _, seeds, *_ in drawings)
    for metric in ("clip_score", "clip_frechet", "cmmd", "memorization"):
        rows = results[metric]["values"]
        assert [(row["steps"], row["guidance_scale"]) for row in rows] == [(1, 1), (1, 3), (2, 1), (2, 3)]
        assert all(np.isfinite(row["value"]) for row in rows)
    assert list(results["prompt_accuracy"]["pairs"]["seen"]) == [
        "guidance 1, 1 steps", "guidance 3, 1 steps", "guidance 1, 2 steps", "guidance 3, 2 steps"
    ]  # fmt: skip
    assert results["plots"] == ["e-guidance.png", "e-steps.png", "e-clip_frechet-over-clip_score.png"]
    sheets = [row["sheet"] for row in results["memorization"]["values"]] + [results["reconstruction"]["sheet"]]
    assert len(set(sheets)) == 5
    for name in (*results["plots"], *sheets, "e.png"):
        assert np.asarray(Image.open(tmp_path / name)).std() > 1
    assert {path.name for path in tmp_path.iterdir()} == {"e.json", "e.png", *results["plots"], *sheets}
    capsys.readouterr()
    from ldm.evaluation.table import print_figures, print_table

    print_table(results["prompt_accuracy"])
    print_figures(results)
    printed = capsys.readouterr().out
    assert "1, 2 steps" in printed and "clip_frechet" in printed and "retrieval: image_to_text@1" in printed
    assert all(len(line) <= 110 for line in printed.splitlines() if "│" in line)


def test_figures_are_those_of_their_functions(run_dir, tmp_path):
    """The distances are between drawn pictures and held-out ones that no prompt speaks of; `floor` is training's."""
    config = check(EvaluateConfig, values(run_dir, f"metrics={BY_CLIP}", "guidance_scale=2"))
    mine = subject.Subject(config, run_dir / "model", run_dir, tmp_path / "e.json")
    results = evaluate(values(run_dir, f"metrics={BY_CLIP}", "guidance_scale=2", out=str(tmp_path / "e.json")))
    drawn = mine.clip.images(mine.drawn_rgb(mine.settings[0]))
    fresh = mine.clip.images(mine.real("fresh").rgb(range(NUM)))
    train = mine.clip.images(mine.real("train").rgb(np.linspace(0, 63, NUM).astype(int)))
    assert results["clip_frechet"]["values"][0]["value"] == pytest.approx(frechet_distance(fresh, drawn), abs=1e-4)
    assert results["clip_frechet"]["floor"] == pytest.approx(frechet_distance(fresh, train), abs=1e-4)
    assert results["cmmd"]["values"][0]["value"] == pytest.approx(cmmd(fresh, drawn), abs=1e-4)
    from ldm.data.shapes import Shapes

    held_out = Shapes("val", 2 * NUM, 16)
    assert np.array_equal(mine.real("fresh").rgb([1])[0], held_out[NUM + 1]["image"])
    assert np.array_equal(mine.real("val").rgb([1])[0], held_out[1]["image"])
    assert mine.scenes("val")[1][1] == held_out.scene(1)  # prompt and held-out picture show the same
    texts = mine.clip.texts(mine.prompts())
    cosines = torch.cosine_similarity(drawn.double(), texts.double()).clamp(min=0)
    assert results["clip_score"]["values"][0]["value"] == pytest.approx(float(100 * cosines.mean()), abs=1e-4)
    assert results["retrieval"]["num_images"] == results["reconstruction"]["num_images"] == NUM
    assert 0 < results["reconstruction"]["psnr"] < 100 and "rfid" not in results["reconstruction"]
    assert results["memorization"]["num_train"] == 64


def test_compared_with_the_training_pictures(run_dir, tmp_path):
    asked = ("metrics=[clip_frechet,memorization]", "real=train", "num_train=10")
    results = evaluate(values(run_dir, *asked, out=str(tmp_path / "e.json")))
    found = results["clip_frechet"]
    assert (found["split"], found["num_real"], found["num_drawn"]) == ("train", 10, NUM)
    assert results["memorization"]["num_train"] == 10
    assert "plots" not in results


def test_planted_copies_are_found_and_named(run_dir, tmp_path, monkeypatch):
    """Half of the "drawn" pictures are training pictures."""
    real = subject.Subject.drawn

    def drawn(self, setting, split="val"):
        pictures = np.array(real(self, setting, split))
        pictures[::2] = self.real("train").rgb([5, 17, 40])
        return pictures

    monkeypatch.setattr(subject.Subject, "drawn", drawn)
    results = evaluate(values(run_dir, "metrics=[memorization]", out=str(tmp_path / "e.json")))
    [row] = results["memorization"]["values"]
    assert row["pixel_rate"] >= 0.5 and row["feature_rate"] >= 0.5
    nearest = row["nearest"][:3]
    assert {line["picture"]: line["feature"]["train"] for line in nearest} == {0: 5, 2: 17, 4: 40}
    assert all(line[by]["distance"] < 1e-3 for line in nearest for by in ("feature", "pixel"))
    assert (tmp_path / row["sheet"]).is_file()


def test_a_folder_of_pictures(folder_run, tmp_path, drawings):
    """Few held-out captions are asked for again, with other seeds; training pictures are told by their files."""
    results = evaluate(values(folder_run, f"metrics={BY_CLIP}", out=str(tmp_path / "e.json")))
    [(prompts, seeds, *_)] = drawings
    assert prompts[:2] == prompts[4:] and seeds == list(range(6))
    assert results["retrieval"]["num_images"] == results["memorization"]["num_held_out"] == 4
    assert results["memorization"]["values"][0]["nearest"][0]["pixel"]["train"].endswith(".png")
    assert results["clip_frechet"]["num_real"] == 4


def test_metrics_that_draw_nothing_draw_nothing(run_dir, tmp_path, drawings):
    results = evaluate(values(run_dir, "metrics=[retrieval,reconstruction]", out=str(tmp_path / "e.json")))
    assert drawings == [] and set(results) == {"ckpt", "retrieval", "reconstruction", "seconds"}


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_transparent_pictures(channels, run_dir, tmp_path):
    place = another_run(run_dir, tmp_path / "run")
    shutil.rmtree(place / "model" / "vae")
    save_network(tiny.vae(in_channels=channels, out_channels=channels), place / "model" / "vae")
    results = evaluate(values(place, f"metrics={BY_CLIP}", out=str(tmp_path / "e.json")))
    assert np.isfinite(results["clip_score"]["values"][0]["value"])
    asked = values(place, "metrics=[prompt_accuracy]", out=str(tmp_path / "p.json"))
    if channels == 1:
        with pytest.raises(UserError, match=r"reads colours, and the VAE .* works in grey"):
            evaluate(asked)
    else:
        assert set(evaluate(asked)["prompt_accuracy"]["ceiling"]) >= {"color", "all"}


def test_transparency_is_seen_over_the_background():
    pictures = np.zeros((1, 2, 2, 4), np.uint8)
    pictures[0, 0, 0] = (10, 20, 30, 255)
    shown = real.to_rgb(pictures, (1, 2, 3))
    assert shown[0, 0, 0].tolist() == [10, 20, 30] and shown[0, 1, 1].tolist() == [1, 2, 3]
    assert real.to_rgb(np.full((1, 2, 2, 1), 7, np.uint8), (1, 2, 3)).tolist() == np.full((1, 2, 2, 3), 7).tolist()


# --------------------------------------------------------------------------------------------------------- Inception


class SmallEye:
    """In Inception's place: 12 features."""

    def __init__(self, weights, device):
        self.weights = weights

    def images(self, pictures):
        return torch.from_numpy(pictures[:, ::8, ::8].reshape(len(pictures), -1)).float() / 255


def test_fid_and_kid_by_what_looks(run_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(subject, "InceptionFeatures", SmallEye)
    asked = values(run_dir, "metrics=[fid,kid,reconstruction]", "inception=some.pth", out=str(tmp_path / "e.json"))
    results = evaluate(asked)
    mine = subject.Subject(check(EvaluateConfig, asked), run_dir / "model", run_dir, tmp_path / "e.json")
    eye = SmallEye(None, None)
    drawn = eye.images(mine.drawn_rgb(mine.settings[0]))
    fresh = eye.images(mine.real("fresh").rgb(range(NUM)))
    assert results["fid"]["values"][0]["value"] == pytest.approx(frechet_distance(fresh, drawn), abs=1e-6)
    assert results["kid"]["values"][0]["value"] == pytest.approx(kernel_distance(fresh, drawn)[0], abs=1e-6)
    assert results["reconstruction"]["rfid"] > 0
    assert "FID over 6 pictures is far too large" in capsys.readouterr().out


@pytest.fixture
def hub_dir(tmp_path, monkeypatch) -> Path:
    """PyTorch's hub cache, empty, and no network."""

    def download(url, path, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


def test_inception_that_cannot_be_had(run_dir, tmp_path, hub_dir, drawings):
    with pytest.raises(
        UserError,
        match=rf"download https://github.com\S+ to {hub_dir}/weights-inc\S+ or name .*inception=…; .*clip_frechet",
    ):
        evaluate(values(run_dir, "metrics=[clip_score,fid]", out=str(tmp_path / "e.json")))
    with pytest.raises(UserError, match=r"inception=nowhere\.pth: there is no such file"):
        evaluate(values(run_dir, "metrics=[kid]", "inception=nowhere.pth"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth does not hold torch-fidelity's weights"):
        evaluate(values(run_dir, "metrics=[fid]", f"inception={tmp_path / 'other.pth'}"))
    assert drawings == [] and not (tmp_path / "e.json").exists()


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def test_weights_that_are_code_are_not_run(run_dir, tmp_path, hub_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (features.INCEPTION, "alexnet-owt-7be5be79.pth"):
        torch.save({"a": Payload()}, hub_dir / name)
    for metric in ("fid", "reconstruction"):
        with pytest.raises(UserError, match=r"refused and nothing in it was run"):
            evaluate(values(run_dir, f"metrics=[{metric}]", out=str(tmp_path / "e.json")))
    assert not (tmp_path / "ran").exists()


def test_inception_from_the_hub_cache(hub_dir):
    """Random weights of the right names and shapes, each output channel's as one number, so that the file is small."""
    from unittest import mock

    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    generator = torch.Generator().manual_seed(0)
    with (
        mock.patch.object(theirs, "load_state_dict_from_url", return_value={}),
        mock.patch.object(torch.nn.Module, "load_state_dict"),
        mock.patch.object(theirs.nn.Conv2d, "reset_parameters"),
        mock.patch.object(theirs.nn.Linear, "reset_parameters"),
    ):
        network = theirs.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    state = {}
    for name, tensor in network.state_dict().items():
        if tensor.ndim > 1:  # the same for all inputs
            value = torch.rand(len(tensor), *[1] * (tensor.ndim - 1), generator=generator)
            state[name] = (value * 2 / tensor[0].numel()).expand_as(tensor)
        else:
            state[name] = torch.ones_like(tensor) if name.endswith(("weight", "var")) else torch.zeros_like(tensor)
    torch.save(state, hub_dir / features.INCEPTION)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    found = features.InceptionFeatures(None, torch.device("cpu")).images(pictures)
    network.load_state_dict(state)
    with torch.inference_mode():
        expected = network(torch.from_numpy(pictures).movedim(-1, 1))[0]
    assert found.shape == (2, 2048) and found.std() > 0 and torch.allclose(found, expected, rtol=1e-4)


def test_lpips_where_alexnet_is_at_hand(hub_dir):
    from torchvision.models import alexnet

    from ldm.evaluation.reconstruction import ALEXNET, load_lpips

    assert load_lpips(torch.device("cpu")) is None
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in alexnet().state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    small = {
        name: torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes.items() if "features" in name
    }
    torch.save(
        {name: small.get(name, torch.zeros(1).expand(shape)) for name, shape in shapes.items()}, hub_dir / ALEXNET
    )
    lpips = load_lpips(torch.device("cpu"))
    image = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    assert float(lpips(image, image)) == pytest.approx(0, abs=1e-6) and float(lpips(image, -image)) > 0.01


# ----------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["metrics=[retrieval]", "guidance_scale=[1,2]"],
            r"guidance_scale=\[…\] compares how pictures are drawn, and re",
        ),
        (["metrics=[cmmd]", "inception=a.pth"], r"inception= is what fid, kid and reconstruction look with"),
        (["metrics=[cmmd,cmmd]"], r"metrics=\['cmmd', 'cmmd'\] names something twice"),
        (["metrics=[cmmd]", "steps=[2,2]"], r"steps=\[2, 2\] names something twice"),
        (["metrics=[cmmd]", "num_prompts=1"], r"num_prompts=1: cmmd compares how pictures vary"),
        (["metrics=[fvd]"], r"metrics\.0: "),
        (["metrics=[fid]", "guidance_scale=[-1]"], r"guidance_scale"),
        (["metrics=[fid]", "steps=[]"], r"steps"),
    ],
)
def test_what_cannot_work_is_refused_at_the_door(overrides, message):
    with pytest.raises(UserError, match=message):
        check(EvaluateConfig, compose_values("evaluate", ["ckpt=x", *overrides]))


def test_a_setting_that_does_not_fit_is_refused_before_the_first_is_drawn(run_dir, tmp_path, drawings):
    with pytest.raises(UserError, match="steps=5000"):
        evaluate(values(run_dir, "metrics=[clip_score]", "steps=[1,5000]", out=str(tmp_path / "e.json")))
    assert drawings == []


def test_a_model_without_a_run_has_no_real_pictures(run_dir, tmp_path, drawings):
    shutil.copytree(run_dir / "model", tmp_path / "model")
    for metric in ("clip_score", "reconstruction", "memorization"):
        with pytest.raises(UserError, match=r"has no config\.yaml beside it: evaluate a run directory"):
            evaluate(values(tmp_path / "model", f"metrics=[{metric}]"))
    assert drawings == []


def test_a_run_without_its_clip_needs_one(run_dir, tmp_path):
    place = tmp_path / "elsewhere" / "run"
    shutil.copytree(run_dir, place)
    config = yaml.safe_load((place / "config.yaml").read_text())
    (place / "config.yaml").write_text(yaml.safe_dump({**config, "output_dir": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match=r"no CLIP to look with: .*clip=<folder or hub id>"):
        evaluate(values(place, "metrics=[retrieval]"))
    [clip] = run_dir.parent.glob("stages/clip-*")
    found = evaluate(values(place, "metrics=[retrieval]", f"clip={clip}", out=str(tmp_path / "e.json")))
    assert found["retrieval"]["clip"] == str(clip)
    assert "clip_frechet" not in evaluate(values(place, "metrics=[reconstruction]"))["reconstruction"]


def test_pictures_that_come_out_of_code_are_not_opened(run_dir, tmp_path):
    data = load_run_config(run_dir).data.model_dump()
    source = {"_target_": "pathlib.Path.touch", "self": "ran"}
    kept = {name: value for name, value in data.items() if name not in ("objects", "num_train", "seed")}
    place = another_run(run_dir, tmp_path / "run", {**kept, "kind": "custom", "source": source})
    with pytest.raises(UserError, match="data=custom, whose pictures come out of code"):
        evaluate(values(place, "metrics=[clip_score]"))


def test_every_metric_of_the_schema_is_there():
    assert set(METRICS) == set(EvaluateConfig.model_fields["metrics"].annotation.__args__[0].__args__) > set(DRAWING)


def test_the_script_shows_it_all(run_dir, tmp_path, capsys):
    arguments = [f"ckpt={run_dir}", "num_prompts=4", "metrics=[clip_score,cmmd]", "guidance_scale=[1,2]"]
    assert run_script("evaluate", *arguments, f"out={tmp_path / 'e.json'}") == 0
    out = capsys.readouterr().out
    assert f"written: {tmp_path / 'e.json'}" in out and "plotted:" in out and "clip_score" in out
    assert run_script("evaluate", f"ckpt={run_dir}", "metrics=[nonsense]") == 2


def commands() -> list[str]:
    """Return the commands that docs/evaluation.md tells a reader to type."""
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    return re.findall(r"^python (evaluate\.py .*?)(?:\s{2,}#.*)?$", page, re.MULTILINE)


@pytest.mark.parametrize("command", commands())
def test_the_commands_of_the_page(command, run_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subject, "InceptionFeatures", SmallEye)
    (tmp_path / "outputs").mkdir()
    shutil.copytree(run_dir, tmp_path / "outputs" / "shapes")
    _, *arguments = command.split()
    few = [re.sub(r"(num_prompts=|steps=)\d+$", lambda found: f"{found[1]}2", argument) for argument in arguments]
    assert run_script("evaluate", *few, *([] if "num_prompts" in command else ["num_prompts=2"])) == 0
    assert list((tmp_path / "outputs" / "shapes").glob("*.json"))


def test_the_page_has_commands():
    assert len(commands()) >= 4
