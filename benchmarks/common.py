"""What every benchmark says of itself: the machine it ran on, and where its figures go."""

import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ldm.config import TrainConfig, check

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def load_preset(name: str, sample_size: int, context_dim: int) -> dict[str, Any]:
    """Return the options of a U-Net of `conf/unet`, whole."""
    import yaml

    options = yaml.safe_load((ROOT / "conf" / "unet" / f"{name}.yaml").read_text(encoding="utf-8"))
    return {"sample_size": sample_size, "cross_attention_dim": context_dim, **options}


def load_config(*overrides: str) -> TrainConfig:
    """Return the checked config that `train.py` has for these overrides."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        values: Any = OmegaConf.to_container(compose("train", list(overrides)), resolve=True)
    return check(TrainConfig, values)


class Clocks:
    """Seconds on the wall, and seconds of processors that this process and its children take, from now on."""

    def __init__(self) -> None:
        self.begun = self._now()

    def read(self) -> tuple[float, float]:
        wall, processor = (now - then for now, then in zip(self._now(), self.begun, strict=True))
        return wall, processor

    def _now(self) -> tuple[float, float]:
        children = (child.cpu_times() for child in psutil.Process().children(recursive=True))
        return time.perf_counter(), time.process_time() + sum(each.user + each.system for each in children)


def memory_held() -> tuple[int, int]:
    """Return bytes of this process and its children: resident, and taken.

    Resident is what each has mapped, so that what they share counts several times and what one of them copies for
    itself not at all. Taken is what they have together that lies in no file.
    """
    process = psutil.Process()
    resident = taken = 0
    for each in (process, *process.children(recursive=True)):
        fields = dict(re.findall(r"(\w+):\s+(\d+) kB", Path(f"/proc/{each.pid}/smaps_rollup").read_text()))
        resident += 1024 * int(fields["Rss"])
        taken += 1024 * (int(fields["Pss_Anon"]) + int(fields["Pss_Shmem"]))
    return resident, taken


def run_alternately(
    work: Mapping[str, Callable[[], Any]], rounds: int, warmup: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Return the seconds of each piece of work in each round, so that whatever else the machine does hits all."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for i in range(rounds + warmup):
        for name, run in work.items():
            started = clock()
            run()
            if i >= warmup:
                times[name].append(clock() - started)
    return times


def summary(times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return medians, quartiles, and the ratio of the best peer's median to the best of ours."""
    median = {name: statistics.median(values) for name, values in times.items()}
    ours = min(value for name, value in median.items() if name.startswith("ldm"))
    best_peer = min(value for name, value in median.items() if not name.startswith("ldm"))
    return {
        "ratio": round(best_peer / ours, 3),
        "milliseconds": {name: round(value * 1e3, 1) for name, value in median.items()},
        "quartiles": {
            name: [round(q * 1e3, 1) for q in statistics.quantiles(values, n=4)] for name, values in times.items()
        },
    }


def machine() -> dict[str, Any]:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    return {
        "processor": next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.machine()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("diffusers", "torchvision", "pytorch-lightning", "pillow")},
        "commit": git("rev-parse", "--short", "HEAD"),
        "date": time.strftime("%Y-%m-%d"),
    }


def write(path: Path, results: Sequence[Mapping[str, Any]], **facts: Any) -> None:
    """Write results, with the machine and what else is to be known of the run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": {**machine(), **facts}, "results": list(results)}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"written: {path}")
