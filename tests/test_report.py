"""The report of a run, from run directories written by hand; a real browser looks at it as well."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from ldm.errors import UserError
from ldm.gallery import grid, save_png
from ldm.report import curves, report, write_report
from ldm.report.html import esc
from ldm.report.metrics import images_a_step, panels, rates, read_metrics

HOSTILE = "</title><script>document.body.innerHTML='owned'</script><img src=x onerror=alert(1)>&\"'"
SIDE = 32
CONFIG = {
    "name": "tiny run", "output_dir": "outputs", "stages": ["autoencoder", "clip", "diffusion"],
    "data": {"kind": "shapes", "resolution": SIDE, "batch_size": 64},
    "autoencoder": {"max_steps": 100, "batch_size": 8, "optim": {"_target_": "torch.optim.AdamW", "lr": 1e-3}},
    "clip": {"max_steps": 100, "batch_size": 4},
    "optim": {"_target_": "torch.optim.AdamW", "lr": 2e-3, "schedule": "cosine"},
    "diffusion": {"prediction_type": "v_prediction"}, "unet": {"block_out_channels": [64, 128]},
    "trainer": {"accelerator": "cpu", "devices": 2, "num_nodes": 3, "accumulate_grad_batches": 5, "max_steps": 100},
}  # fmt: skip
EVALUATION = {
    "prompt_accuracy": {
        "num_prompts": 256, "steps": 20, "sampler": "ddim",
        "pairs": {"seen": {"guidance 1": {"shape": 0.5, "all": 0.25}, "guidance 3": {"shape": 0.75, "all": 0.625}}},
        "ceiling": {"shape": 0.99, "all": 0.875},
    },
    "clip_score": {"values": [{"steps": 20, "guidance_scale": 3.0, "value": 80.25}], "real": 81.5},
    "fid": {"values": [{"steps": 20, "guidance_scale": 3.0, "value": 12.5}], "floor": 4.5},
    "reconstruction": {"psnr": 30.25, "sheet": "evaluation-reconstruction.png"},
    "drawn": {"num_prompts": 64},
}  # fmt: skip


def metrics_rows() -> list[str]:
    rows = ["metric,step,value,unix_time"]
    for stage, start in (("autoencoder", 1000), ("diffusion", 2000)):
        for step in range(9, 100, 10):
            rows.append(f"{stage}/loss,{step},{1 / (step + 1):.6g},{start + step / 10}")
        for step in (49, 99):
            for name, value in (("val_loss", 0.5), ("val_loss_raw", 0.75)):
                rows.append(f"{stage}/{name},{step},{value / (step + 1):.6g},{start + step / 10}")
    rows += [f"autoencoder/val_psnr,{step},{20 + step / 10},1200" for step in (49, 99)]
    for step in (49, 99):
        rows += [f"diffusion/val_loss/t{band},{step},{0.1 + step / 1000},2200" for band in ("000-250", "250-500")]
        rows += [f"diffusion/prompt_accuracy{raw},{step},{step / 200},2200" for raw in ("", "_raw")]
        rows += [f"diffusion/prompt_accuracy/guidance {g},{step},{step / 200 / g},2200" for g in (1, 3)]
        rows.append(f"diffusion/fid,{step},{50 - step / 10},2200")
    return rows


def write_grid(path: Path, value: int, num: int = 4, side: int = SIDE) -> None:
    """Write a grid as training does, its first picture of one red."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [np.full((side, side, 3), (value, 40 * i, 90), np.uint8) for i in range(num)]
    save_png(path, grid(pictures, captions=[f"caption {i}" for i in range(num)], scale=max(1, 128 // side)))


def write_run(run_dir: Path, name: str = "tiny run") -> Path:
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "name": name}), encoding="utf-8")
    (run_dir / "overrides.txt").write_text("experiment=shapes\nname='tiny run'\nunet.train=[*]\n", encoding="utf-8")
    (run_dir / "env.json").write_text(json.dumps({"torch": "2.99", "platform": "Linux-of-tests"}), encoding="utf-8")
    (run_dir / "metrics.csv").write_text("\n".join(metrics_rows()) + "\n", encoding="utf-8")
    (run_dir / "evaluation.json").write_text(json.dumps(EVALUATION), encoding="utf-8")
    (run_dir / "quarantine.txt").write_text("broken.png: cannot be decoded\n", encoding="utf-8")
    (run_dir / "model").mkdir()
    (run_dir / "model" / ".text_encoder").write_text("clip-0123456789ab", encoding="utf-8")
    (run_dir / "model" / "model_index.json").touch()
    for stage in ("autoencoder", "diffusion"):
        for i, step in enumerate((50, 100)):
            write_grid(run_dir / "samples" / stage / f"step-{step:06d}.png", 100 + 50 * i)
    write_grid(run_dir / "evaluation.png", 250)
    return run_dir


class Tags(HTMLParser):
    """All tags of a page with their attributes, and its text; `<script>` would be among the tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    handle_startendtag = handle_starttag

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, name: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def page_of(run_dir: Path) -> str:
    return write_report(run_dir).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A run directory with all there may be, and its report. Read it, do not write into it."""
    run_dir = write_run(tmp_path_factory.mktemp("runs") / "tiny")
    write_report(run_dir)
    return run_dir


@pytest.fixture(scope="module")
def page(run_dir) -> str:
    return (run_dir / "report" / "index.html").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------- content


def test_the_page_tells_of_the_run(page, run_dir):
    text = Tags(page).text
    for told in (
        "tiny run", "shapes, 32 px", "cpu × 2 × 3 machines", "[64, 128], v_prediction", "Linux-of-tests", "torch2.99",
        "100 of 100", "AdamW 0.002 cosine", f'python sample.py ckpt={run_dir} prompt="…"',
        "python train.py experiment=shapes 'name=tiny run' 'unet.train=[*]'", "prediction_type: v_prediction",
        "broken.png: cannot be decoded", "Pictures left out: 1",
    ):  # fmt: skip
        assert told in text, told
    assert "missing" not in {attributes.get("class") for _, attributes in Tags(page).tags}


def test_the_figures_that_matter_are_on_top(page):
    tiles = re.findall(r'"name">([^<]*)</span><span class="number">([^<]*)<.*?"note">([^<]*)<', page)
    assert {name: (value, note) for name, value, note in tiles} == {
        "Prompt accuracy": ("62.5%", "guidance 3; ceiling 87.5%"),
        "VAE validation loss": ("0.005", "step 99"),
        "U-Net validation loss": ("0.005", "step 99"),
        "Reconstruction PSNR": ("29.9 dB", "held-out pictures"),
        "prompt accuracy in training": ("0.495", "guidance 1, step 99"),
        "FID in training": ("40.1", "step 99"),
        "VAE images/s": ("480", "median, in training"),  # 8 pictures, 2 devices, 3 nodes, 10 steps a second
        "U-Net images/s": ("19,200", "median, in training"),  # 64, and 5 micro-batches
    }


def test_what_was_measured_of_speed_is_told_in_place_of_what_the_losses_say(tmp_path):
    run_dir = write_run(tmp_path / "run")
    figures = {"images_per_second": 77, "gflops_per_image": 0.5, "utilization": 0.34, "data_wait": 0.002}
    with (run_dir / "metrics.csv").open("a", encoding="utf-8") as file:
        for step in (49, 99):
            file.writelines(f"diffusion/{name},{step},{value},{9000 + step}\n" for name, value in figures.items())
    report(run_dir)
    page = (run_dir / "report" / "index.html").read_text(encoding="utf-8")
    tiles = re.findall(r'"name">([^<]*)</span><span class="number">([^<]*)<.*?"note">([^<]*)<', page)
    note = "median, in training, 34.0% of the matmul rate, 0.2% waiting for data"
    assert ("U-Net images/s", "77", note) in tiles and ("VAE images/s", "480", "median, in training") in tiles
    titles = re.findall(r'<figure class="plot"><figcaption>([^<]*)', page)
    assert titles.count("images/s") == 2 and "utilization" not in titles
    assert "images/s over steps: 77 in the median" in page


def test_every_metric_has_its_plot_and_says_in_words_what_it_shows(page):
    titles = re.findall(r'<figure class="plot"><figcaption>([^<]*)', page)
    vae, unet = ["loss", "PSNR (dB)", "images/s"], ["loss", "loss by timestep", "images/s", "prompt accuracy", "FID"]
    assert titles == vae + unet
    labels = [attributes["aria-label"] for attributes in Tags(page).of("div") if attributes.get("role") == "img"]
    assert len(labels) == len(titles) and all("over steps: " in label for label in labels)
    assert "training from 0.1 to 0.01; validation from 0.01 to 0.005; validation, raw weights from" in labels[0]
    assert "guidance 1 from" in labels[6] and "guidance 3 from" in labels[6]
    assert page.count("<svg") == len(titles) and page.count("currentColor") > 100
    assert not {"id"} & {name for name in re.findall(r'<(?:g|svg)[^>]* (id)="', page)}  # ids say one thing each


def test_a_stage_that_was_taken_from_another_run_is_named_as_such(page):
    assert "taken from outputs/stages/clip-0123456789ab" in page


def test_the_tables_of_the_evaluation(page):
    rows = [re.findall(r"<t[hd][^>]*>([^<]*)", row) for row in re.findall(r"<tr>.*?</tr>", page)]
    assert ["(shape, color) pairs", "guidance", "shape", "all"] in rows
    assert ["seen", "3", "75.0%", "62.5%"] in rows and ["VAE reconstruction (ceiling)", "", "99.0%", "87.5%"] in rows
    assert ["20", "3", "80.25", "12.5"] in rows and ["held-out pictures", "", "81.5", ""] in rows
    assert ["other real pictures", "", "", "4.5"] in rows
    assert "<dt>psnr</dt><dd>30.25</dd>" in page


def pictures(page: str) -> list[tuple[str, np.ndarray]]:
    import io

    return [
        (image["alt"], np.asarray(Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2])))))
        for image in Tags(page).of("img")
    ]


def test_samples_over_time_are_the_same_cells_and_the_last_grid_is_whole(page, run_dir):
    found = [item for item in pictures(page) if "drawn from fixed noise" in item[0]]
    assert [alt.split()[-2] for alt, _ in found] == ["50", "100", "100"]
    early, late, whole = (pixels for _, pixels in found)
    assert early.shape == late.shape == (4 + 128, 4 + 2 * 132, 3)  # the first row, without captions
    assert early[4, 4].tolist() == [100, 0, 90] and late[4, 4].tolist() == [150, 0, 90]
    assert early[-1, 4].tolist() == [100, 0, 90] and early[4, 136].tolist() == [100, 40, 90]
    true = np.asarray(Image.open(run_dir / "samples" / "diffusion" / "step-000100.png"))
    assert np.array_equal(whole, true)


def test_nothing_is_fetched_and_nothing_runs(page):
    tags = Tags(page)
    assert not {tag for tag, _ in tags.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in tags.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:image/")), (tag, attributes)
    assert not re.search(r"https?://|@import", page)
    assert all(found.startswith("#") for found in re.findall(r"url\(['\"]?([^)]*)\)", page))
    assert any("default-src 'none'" in attributes.get("content", "") for attributes in tags.of("meta"))


def test_every_picture_has_an_alternative_and_every_column_a_heading(page):
    tags = Tags(page)
    assert tags.of("img") and all(attributes["alt"] for attributes in tags.of("img"))
    assert tags.of("th") and all(attributes["scope"] in ("col", "row") for attributes in tags.of("th"))


# ------------------------------------------------------------------------------------------------------ hostile text


def test_hostile_text_stays_text(tmp_path):
    run_dir = write_run(tmp_path / "run", HOSTILE)
    (run_dir / "overrides.txt").write_text(f"data.caption_prefix={HOSTILE}\n", encoding="utf-8")
    (run_dir / "env.json").write_text(json.dumps({HOSTILE: HOSTILE}), encoding="utf-8")
    (run_dir / "quarantine.txt").write_text(HOSTILE, encoding="utf-8")
    (run_dir / "model" / ".text_encoder").write_text(HOSTILE, encoding="utf-8")
    with (run_dir / "metrics.csv").open("a", encoding="utf-8") as file:
        quoted = HOSTILE.replace('"', '""').replace("/", "")
        for step in (1, 2):
            file.write(f'"diffusion/{quoted}",{step},1.5,0\n"diffusion/fid/guidance {quoted}",{step},1.5,0\n')
            file.write(f"diffusion/$\\frac,{step},1.5,0\n")
    evaluation = {
        HOSTILE: {HOSTILE: HOSTILE, "values of": 1.0},
        "clip_score": {"values": [{"steps": HOSTILE, "guidance_scale": 1.0, "value": 1.0}]},
        "prompt_accuracy": {**EVALUATION["prompt_accuracy"], "sampler": HOSTILE, "pairs": {
            "seen": {HOSTILE: {"shape": 0.5, "all": 0.9}}, HOSTILE: {HOSTILE: {"shape": 0.5, "all": 0.9}},
        }},
        "drawn": {HOSTILE: HOSTILE},
    }  # fmt: skip
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    page = page_of(run_dir)
    test_nothing_is_fetched_and_nothing_runs(page)
    assert "<script" not in page.lower() and "<img src=x" not in page
    assert f"<title>{esc(HOSTILE)}" in page and page.count(esc(HOSTILE)) > 10
    assert "cannot be shown" not in page


def test_a_name_that_is_no_text(tmp_path):
    run_dir = write_run(tmp_path / "run\udcff")
    assert write_report(run_dir).read_bytes().decode("utf-8").count("run?") > 1


# ----------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("metrics.csv", None, "metrics.csv is missing"),
        ("metrics.csv", "", "Nothing of this stage has been logged"),
        ("metrics.csv", "metric,step,value,unix_time\ndiffusion/loss,1,0.5,7\ndiffusion/loss,2,0.", "1 rows of"),
        ("metrics.csv", "metric,step,value,unix_time\nx\0,\xff\n,,,\nstep,one,2,3\na,1,b,c\n", "4 rows of metrics.csv"),
        ("metrics.csv", "metric,step,value,unix_time\ndiffusion/loss,7,nan,1\ndiffusion/loss,9,1,2", "not finite at 1"),
        ("config.yaml", None, "config.yaml is missing"),
        ("config.yaml", "a: [", "config.yaml cannot be read"),
        ("config.yaml", "- a", "config.yaml holds no settings"),
        ("config.yaml", "data: 3\nstages: 5\ntrainer: {devices: {}}", "cannot be shown|does not say how large"),
        ("evaluation.json", None, "Not evaluated yet"),
        ("evaluation.json", '{"fid": {"val', "evaluation.json cannot be read"),
        ("evaluation.json", "[]", "evaluation.json holds no JSON object"),
        ("evaluation.json", '{"prompt_accuracy": {"pairs": 3}, "cmmd": {"values": [{}]}}', "prompt_accuracy cannot be"),
        ("env.json", None, "env.json is missing"),
        ("env.json", "{", "env.json cannot be read"),
        ("overrides.txt", None, "overrides.txt cannot be read"),
        ("quarantine.txt", b"\xff\xfe broken", "Pictures left out: 1"),
        ("samples/diffusion/step-000050.png", b"no picture", "step-000050.png cannot be read as a picture"),
        ("samples/diffusion/step-000100.png", b"\x89PNG\r\n\x1a\n", "step-000100.png cannot be read as a picture"),
        ("samples/diffusion", None, "no pictures were saved"),
        ("evaluation.png", b"", "evaluation.png is there and cannot be read as a picture"),
        ("model", None, "The model is not finished yet"),
    ],
)
def test_damage_is_told_in_its_place_and_the_rest_is_shown(name, content, says, tmp_path):
    run_dir = write_run(tmp_path / "run")
    path = run_dir / name
    if content is None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    page = page_of(run_dir)
    assert re.search(says, page), Tags(page).text
    if "metrics" not in name and "config" not in name:
        assert page.count("<svg") == 8
    if name != "evaluation.json":
        assert "62.5%" in page
    assert page.rstrip().endswith("</html>")


def test_old_figures_are_said_to_be_old(tmp_path):
    run_dir = write_run(tmp_path / "run")
    (run_dir / "model" / "stage.json").touch()
    assert "trained again since" not in page_of(run_dir)
    os.utime(run_dir / "evaluation.json", (1, 1))
    assert "trained again since" in page_of(run_dir)


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"no run directory.*outputs/shapes"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_page_is_whole_or_as_it_was(tmp_path, monkeypatch):
    run_dir = write_run(tmp_path / "run")
    path = write_report(run_dir)
    before = path.read_bytes()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    (run_dir / "overrides.txt").write_text("seed=7\n")
    with pytest.raises(UserError, match=r"index.html cannot be written: No space left"):
        write_report(run_dir)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_report_never_ruins_a_run(tmp_path, capsys, monkeypatch):
    report(tmp_path)
    assert capsys.readouterr().out.startswith("there is no report: ")
    run_dir = write_run(tmp_path / "run")
    report(run_dir)
    assert capsys.readouterr().out == f"report: {run_dir / 'report' / 'index.html'}\n"
    monkeypatch.setattr("ldm.report.page.make_page", lambda _: 1 / 0)
    report(run_dir)
    assert capsys.readouterr().out == "there is no report: division by zero\n"


# ----------------------------------------------------------------------------------------------------------- curves


def test_lines_are_told_apart_by_their_names(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "metric,step,value,unix_time\n"
        + "".join(
            f"diffusion/{name},1,2.0,3.0\n"
            for name in (
                "fid", "loss", "val_loss", "val_loss_raw", "val_loss/t000-250", "val_loss_raw/t000-250", "kid",
                "prompt_accuracy", "prompt_accuracy_raw/guidance 3", "prompt_accuracy_unseen_raw",
            )
        )
    )  # fmt: skip
    found = panels(read_metrics(tmp_path / "metrics.csv").of("diffusion"))
    assert {key: [(line.split, line.label) for line in lines] for key, lines in found.items()} == {
        ("loss", False): [
            ("training", "training"),
            ("validation", "validation"),
            ("validation", "validation, raw weights"),
        ],
        ("loss", True): [("validation", "t000-250"), ("validation", "t000-250, raw weights")],
        ("fid", False): [("", "averaged weights")],
        ("kid", False): [("", "averaged weights")],
        ("prompt_accuracy", False): [("", "guidance 3, raw weights")],
        ("prompt_accuracy_unseen", False): [("", "raw weights")],
    }
    assert next(iter(found)) == ("loss", False)


def test_standing_still_is_no_throughput():
    marks = [(0, 0.0), (50, 10.0), (100, 20.0), (150, 9000.0), (200, 9010.0), (200, 9011.0), (150, 9020.0)]
    assert rates(marks, 4) == {50: 20.0, 100: 20.0, 200: 20.0}
    assert rates(marks[:1], 4) == {} == rates([], 4)


@pytest.mark.parametrize(("trainer", "expected"), [
    ({}, (4, False)), ({"devices": 2, "num_nodes": 3}, (24, False)), ({"devices": [0, 3]}, (8, False)),
    ({"devices": "auto", "accelerator": "cpu"}, (4, False)), ({"devices": "auto", "accelerator": "gpu"}, (4, True)),
    ({"accumulate_grad_batches": 5}, (20, False)),
])  # fmt: skip
def test_pictures_of_a_step(trainer, expected):
    config = {"data": {"batch_size": 4}, "clip": {"batch_size": 4}, "trainer": trainer}
    assert images_a_step(config, "diffusion") == expected
    accumulated = trainer.get("accumulate_grad_batches", 1)
    assert images_a_step(config, "clip") == (expected[0] / accumulated, expected[1])


def test_long_curves_are_thinned_by_means():
    steps, values = curves.thin({i: float(i % 2) for i in range(10_000)})
    assert len(steps) <= curves.MOST_POINTS and steps == sorted(steps)
    assert np.allclose(values, 0.5, atol=0.02)
    assert curves.thin({1: 2.0, 5: 3.0}) == ([1.0, 5.0], [2.0, 3.0])
    assert len(curves.draw([curves.Curve({i: 1 + i % 7 for i in range(10_000)}, "#123456")])) < 20_000


# ------------------------------------------------------------------------------------------------- the command line


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ldm.report", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_a_report_at_any_time_without_torch(tmp_path):
    run_dir = write_run(tmp_path / "run")
    done = command(str(run_dir), PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"report: {run_dir / 'report' / 'index.html'}\n"
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "matplotlib" in imported and not imported & {"torch", "pytorch_lightning", "transformers", "hydra"}
    done = command(str(tmp_path))
    assert done.returncode == 2 and done.stderr.startswith(f"error: {tmp_path} is no run directory")
    assert command().returncode == 2


# -------------------------------------------------------------------------------------------------------- a browser


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")
# A browser's window is 500 px wide at least: the page stands in frames of a page that measures it from outside.
OUTSIDE = """<!doctype html><style>body {{ margin: 0 }} iframe {{ border: 0; display: block }}</style>
<iframe id="frame" srcdoc="{page}" style="width: {width}px; height: 1600px"></iframe><pre id="seen"></pre><script>
addEventListener("load", () => {{
  const inside = document.getElementById("frame").contentDocument, root = inside.documentElement;
  const images = [...inside.images].map(image => image.complete ? image.naturalWidth : 0);
  const plots = [...inside.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect().width);
  const seen = {{ scroll: root.scrollWidth, inner: frame.contentWindow.innerWidth, images, plots,
                  height: root.scrollHeight, title: inside.title }};
  document.getElementById("seen").textContent = JSON.stringify(seen);
}});
</script>"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        reason = f"no browser found, one of {', '.join(BROWSERS)} is needed to look at the page"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return found


def browse(browser: str, path: Path, *flags: str) -> str:
    """Open a page in a browser of its own, without a network; return what it prints."""
    done = subprocess.run(
        [
            browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage",
            "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={path.parent / 'profile'}",
            *flags, path.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def seen_by(browser: str, page: str, width: int, tmp_path: Path) -> dict:
    outside = tmp_path / f"outside-{width}.html"
    outside.write_text(OUTSIDE.format(page=esc(page), width=width), encoding="utf-8")
    dom = browse(browser, outside, f"--window-size={max(width, 500)},1600", "--dump-dom")
    found = re.search(r'<pre id="seen">(\{.*?\})</pre>', dom)
    assert found, dom[-2000:]
    return json.loads(found[1])


@pytest.mark.parametrize("width", [1200, 400])
def test_a_browser_shows_every_picture_and_nothing_sticks_out(browser, page, width, tmp_path):
    seen = seen_by(browser, page, width, tmp_path)
    assert seen["title"] == "tiny run — report of a run"
    assert seen["inner"] == width >= seen["scroll"]
    assert len(seen["images"]) == page.count("<img ") == 7 and min(seen["images"]) > 100
    assert len(seen["plots"]) == 8 and min(seen["plots"]) > 250 and max(seen["plots"]) <= width


def test_a_browser_that_is_lied_to_would_see_it(browser, page, tmp_path):
    """The test above can fail: a picture that cannot be decoded, and a line that is too wide."""
    broken = re.sub(r'base64,[^"]*', "base64,AAAA", page, count=1).replace(
        "<main>", "<main><div style='width: 700px'>x"
    )
    seen = seen_by(browser, broken, 400, tmp_path)
    assert min(seen["images"]) == 0 and seen["scroll"] > seen["inner"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_plots_are_seen_in_light_and_dark(browser, run_dir, scheme, tmp_path):
    copy, shot = tmp_path / "page.html", tmp_path / "shot.png"
    shutil.copy(run_dir / "report" / "index.html", copy)
    flag = f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}"
    browse(browser, copy, "--window-size=1200,1600", flag, f"--screenshot={shot}")
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape == (1600, 1200, 3)
    assert (pixels[2, 2].mean() < 60) == (scheme == "dark")

    def num_of(color: str) -> int:
        wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        return int((np.abs(pixels - wanted).max(axis=2) < 24).sum())

    assert all(num_of(color) > 100 for color in curves.COLORS[:3]), list(map(num_of, curves.COLORS))
    assert num_of("#643c5a") + num_of("#64005a") > 5000  # and those of the samples
