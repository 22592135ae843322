"""What docs/performance.md shows is what the benchmarks measured."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
MACHINE = {
    "processor": "Chip",
    "cores": 2,
    "threads": 2,
    "torch": "9",
    "diffusers": "8",
    "commit": "abc",
    "date": "now",
}


@pytest.fixture(scope="module")
def render() -> Any:
    spec = importlib.util.spec_from_file_location("render_benchmarks", ROOT / "benchmarks" / "render.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def test_the_page_and_the_plot_are_those_of_the_results(render):
    page, plot = render.render(render.read(), render.PAGE.read_text(encoding="utf-8"))
    mend = "run: python benchmarks/render.py"
    assert page == render.PAGE.read_text(encoding="utf-8"), mend
    assert plot == render.PLOT.read_text(encoding="utf-8"), mend


def test_a_figure_is_held_against_its_goal_and_what_is_not_measured_is_open(render):
    step = {"preset": "tiny", "batch": 4, "latents": 8, "precision": "fp32"}
    found = {
        "train_step": {
            "machine": MACHINE,
            "results": [
                {
                    **step,
                    "ratio": 1.2,
                    "milliseconds": {"ldm": 10.0, "diffusers": 12.0, "diffusers channels_last": 14.0},
                },
                {**step, "preset": "small", "ratio": 1.1, "milliseconds": {"ldm": 10.0, "diffusers": 11.0}},
            ],
        },
        "memory": {
            "machine": MACHINE,
            "results": [
                {**step, "ratio": 0.95, "mebibytes": {"ldm": 95, "diffusers": 100, "diffusers channels_last": 120}}
            ],
        },
    }
    page, plot = render.render(found, f"before\n{render.BEGIN}\nold\n{render.END}\nafter\n")
    assert page.startswith("before\n") and page.endswith("\nafter\n") and "old" not in page
    assert "| training step | tiny, 4 × 8², fp32 | 10 ms | 12 ms | 1.20 | ≥ 1.15, met |" in page
    assert "| training step | small, 4 × 8², fp32 | 10 ms | 11 ms | 1.10 | ≥ 1.15, **short** |" in page
    assert "| memory of a step | tiny, 4 × 8² | 95 MiB | 100 MiB | 0.95 | ≤ 0.9, **short** |" in page
    assert "| training step | sd15, a GPU, bf16, compiled | open |  |  | ≥ 1.2, open |" in page
    assert "2 cores of Chip, 2 threads, torch 9, diffusers 8, commit abc, now" in page
    assert plot.count("<rect") == 4 and plot.count('fill="#c8773a"') == 2
    assert render.render(found, page) == (page, plot)


def test_a_page_without_its_marks_is_refused(render):
    with pytest.raises(ValueError, match="once each"):
        render.render({}, "no marks")
