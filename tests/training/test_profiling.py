"""`python -m ldm.profile`: time goes to whom it belongs, and the flame graph shows what called what."""

import json
import re
import runpy
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock
from xml.etree import ElementTree

import pytest
import torch

from ldm.training import profiling
from ldm.training.flame import Frame, flame_graph
from runs import TINY


def run_profile(*arguments: str) -> int:
    """Run it as typed."""
    with mock.patch.object(sys, "argv", ["ldm.profile", *arguments]):
        try:
            runpy.run_module("ldm.profile", run_name="__main__", alter_sys=False)
        except SystemExit as exit:
            return int(exit.code or 0)
    return 0


def test_a_step_is_taken_apart_from_the_cache_and_without_it(tmp_path, capsys):
    assert run_profile(*TINY, f"output_dir={tmp_path}") == 0
    folder = tmp_path / "shapes" / "profile"
    kinds = ("cached", "uncached")
    assert {path.name for path in folder.iterdir()} == {
        "diffusion.txt", *(f"diffusion-{kind}.{suffix}" for kind in kinds for suffix in ("svg", "json")),
    }  # fmt: skip
    lines = (folder / "diffusion.txt").read_text().splitlines()
    assert (folder / "diffusion.txt").read_text() in capsys.readouterr().out
    rows = {match[1]: [float(x) for x in match[2].split()] for line in lines[2:]
            if (match := re.match(r"(\S.*?)  +([\d. ]+)", line.replace("%", " ")))}  # fmt: skip
    phases = ["data", "VAE", "text", "U-Net forward", "loss", "backward", "clipping", "optimizer", "EMA", "other"]
    assert [name for name in rows if name in phases] == phases
    for i, kind in enumerate(kinds):
        assert sum(rows[name][2 * i] for name in phases) == pytest.approx(rows["whole step"][2 * i], abs=0.1), kind
        seldom = ("VAE", "text") if kind == "cached" else ()
        assert all((rows[name][2 * i] > 0) == (name not in seldom) for name in phases if name != "data")
        svg = ElementTree.parse(folder / f"diffusion-{kind}.svg").getroot()
        told = [title.text or "" for title in svg.iter("{http://www.w3.org/2000/svg}title")]
        assert any(text.startswith("down_blocks.0 (DownBlock): ") for text in told)
        assert any("convolution" in text for text in told) and told[0].startswith("step: ")
        assert any(text.startswith("VAE: ") for text in told) == (kind == "uncached")
        assert json.loads((folder / f"diffusion-{kind}.json").read_text())["traceEvents"]
    assert not list(tmp_path.rglob("*.ckpt")) and not (tmp_path / "shapes" / "metrics.csv").exists()


@pytest.mark.parametrize(("stage", "phase"), [("autoencoder", "decoder forward"), ("clip", "image tower forward")])
def test_the_other_stages_have_phases_of_their_own(tmp_path, stage, phase):
    assert run_profile(*TINY, f"output_dir={tmp_path}", f"stages=[{stage}]") == 0
    text = (tmp_path / "shapes" / "profile" / f"{stage}.txt").read_text()
    assert phase in text and "U-Net" not in text and (tmp_path / "shapes" / "profile" / f"{stage}.svg").exists()


def test_what_is_wrong_is_said_in_one_line(capsys):
    assert run_profile(*TINY, "optim.lrr=1") == 2
    assert "unknown config key 'optim.lrr'; did you mean 'optim.lr'?" in capsys.readouterr().err


def test_help_comes_without_torch(capsys):
    loaded = dict(sys.modules)
    with mock.patch.dict(sys.modules, {**{name: None for name in ("torch", "pytorch_lightning", "hydra")}}):  # type: ignore[dict-item]
        assert run_profile("--help") == 0
    assert "flame graph" in capsys.readouterr().out and loaded.keys() <= sys.modules.keys()


def test_time_is_that_of_the_phase_that_was_entered_last(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(profiling, "time", SimpleNamespace(perf_counter=lambda: now.seconds))

    class Work:
        def inner(self) -> None:
            now.seconds += 2

        def outer(self) -> str:
            now.seconds += 3
            self.inner()
            now.seconds += 4
            return "done"

    clock, outer = profiling.Clock(torch.device("cpu")), Work.outer
    with clock.over([(Work, "outer", "a"), (Work, "inner", "b")]):
        now.seconds += 1
        assert Work().outer() == "done"
    assert clock.seconds == {"other": 1, "a": 7, "b": 2} and Work.outer is outer


def test_frames_are_as_wide_as_what_they_took_and_called():
    root = Frame("step")
    for names, seconds in (
        (["a"], 0.1),
        (["a", "b<c>"], 0.2),
        (["d", "e"], 0.7),
        (["a", "b<c>"], 0.0),
        (["tiny"], 1e-9),
    ):
        root.add(names, seconds)
    svg: Any = ElementTree.fromstring(flame_graph(root, "a title"))
    space = "{http://www.w3.org/2000/svg}"
    frames = {group.find(f"{space}title").text: group.find(f"{space}rect").attrib for group in svg.iter(f"{space}g")}
    widths = {told.split(":")[0]: (float(at["x"]), float(at["width"]), float(at["y"])) for told, at in frames.items()}
    assert widths == {
        "step": (0, 1200, 36), "d": (0, 840, 54), "a": (840, 360, 54), "b<c>": (840, 240, 72),
        "e": (0, 840, 72),
    }  # fmt: skip
    assert "d: 700.00 ms, 70.0%" in frames
