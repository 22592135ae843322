"""Interrupt training at random moments for some minutes, and count what was kept: `make torture MINUTES=30`.

Each round draws a kind of run, interrupts it some times in ways drawn at random, lets it come to its end and compares
it with one that nothing interrupted. The counts go to a JSON file and, as a table, to the terminal.
"""

import argparse
import collections
import json
import os
import random
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from crash_probes import OUTSIDE, TRAINING, WRITING
from crashes import PARENT_DIES, SCENARIOS, STAGES, Crash, Outcome, Run, interrupted, make_sets, reference, small_disk


@dataclass
class Counts:
    """What came of all rounds so far."""

    rounds: int = 0
    events: collections.Counter[str] = field(default_factory=collections.Counter)
    phases: collections.Counter[str] = field(default_factory=collections.Counter)
    stages: collections.Counter[str] = field(default_factory=collections.Counter)
    scenarios: collections.Counter[str] = field(default_factory=collections.Counter)
    lost: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def add(self, scenario: str, seed: int, outcome: Outcome) -> None:
        self.rounds += 1
        for crash in outcome.crashes:
            self.events[crash.event] += 1
            self.phases[crash.phase or "any moment"] += 1
            self.stages[crash.stage or "any"] += 1
            self.scenarios[scenario] += 1
        where = f"{scenario}, seed {seed}, {'; '.join(map(str, outcome.crashes))}: "
        self.lost += [where + each for each in outcome.lost]
        self.differing += [where + each for each in outcome.differing[:3]]
        self.wrong += [where + each for each in outcome.wrong]

    @property
    def num_interruptions(self) -> int:
        return sum(self.events.values())

    def table(self) -> str:
        lines = []
        for title in ("events", "phases", "stages", "scenarios"):
            told = ", ".join(f"{name} {count}" for name, count in getattr(self, title).most_common())
            lines.append(f"{title:14}{told}")
        lines.append(
            f"{self.num_interruptions} interruptions in {self.rounds} runs: {len(self.lost)} lost checkpoints, "
            f"{len(self.differing)} differing traces, {len(self.wrong)} wrong ends"
        )
        return "\n".join(lines)


def draw_crash(rng: random.Random, scenario: str, has_small_disk: bool, duration: float) -> Crash:
    """Draw an interruption that can happen to a scenario.

    Args:
        rng: source of the draws.
        scenario: one of `SCENARIOS`.
        has_small_disk: whether the run's disk may be filled.
        duration: seconds that a whole run takes.
    """
    if rng.random() < 0.2:
        return Crash("from outside", after=rng.uniform(0.3, 1.2 * duration))
    events = [*PARENT_DIES, "SIGKILL", "SIGKILL", "corrupted"]
    if has_small_disk:
        events += ["full disk"] * 3
    if SCENARIOS[scenario].workers:
        events += ["worker killed"]
    event = rng.choice(events)
    phases: tuple[str, ...] = (*TRAINING, *WRITING, *OUTSIDE)
    if event == "worker killed":
        phases = ("batch", "gradient", "stepped", "validation")
    stage = rng.choice(STAGES)
    phase = rng.choice(phases)
    everywhere = phase in TRAINING and phase != "sampling"  # which only the first rank does
    rank = rng.randrange(SCENARIOS[scenario].ranks) if everywhere and event in PARENT_DIES else 0
    return Crash(event, phase, stage, step=rng.randrange(3 if phase in OUTSIDE else 6), rank=rank)


def place_in_run(crash: Crash) -> tuple[int, int]:
    """Return about when in a run an interruption happens; those that may happen at any moment come first."""
    if not crash.phase:
        return 0, 0
    step = {"caching": -1, "exporting": 10}.get(crash.phase, crash.step)
    return 1 + STAGES.index(crash.stage), step


def one_round(seed: int, folder: Path, whole: dict[str, tuple[Run, float]], sets: Path) -> tuple[str, Outcome]:
    rng = random.Random(seed)
    scenario = rng.choice(list(whole))
    run, duration = whole[scenario]
    place = folder / f"round-{seed}"
    with small_disk(place / "disk") as mounted:
        crashes = [draw_crash(rng, scenario, mounted, duration) for _ in range(rng.randint(3, 8))]
        crashes.sort(key=place_in_run)  # else most would come too late to happen
        outcome = interrupted(Run(scenario, place, sets, disk=place / "disk"), run, crashes)
    if outcome.kept:
        shutil.rmtree(place)
    return scenario, outcome


def torture(minutes: float, seed: int, jobs: int, folder: Path) -> Counts:
    sets = make_sets(folder / "sets")
    whole: dict[str, tuple[Run, float]] = {}
    for scenario in SCENARIOS:
        started = time.monotonic()
        whole[scenario] = reference(scenario, folder / f"whole-{scenario}", sets), time.monotonic() - started
        print(f"{scenario:10} a whole run takes {whole[scenario][1]:.0f} s", flush=True)
    counts = Counts()
    deadline = time.monotonic() + 60 * minutes
    seeds = iter(range(seed, seed + 10**6))

    def rounds() -> None:
        while time.monotonic() < deadline:
            drawn = next(seeds)
            try:
                counts.add(*_with_seed(drawn, one_round(drawn, folder, whole, sets)))
            except Exception as error:
                counts.wrong.append(f"seed {drawn}: {type(error).__name__}: {error}")
            left = max(0.0, deadline - time.monotonic()) / 60
            print(f"\n{counts.table()}, {left:.1f} min left", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        for lane in [pool.submit(rounds) for _ in range(jobs)]:
            lane.result()
    return counts


def _with_seed(seed: int, done: tuple[str, Outcome]) -> tuple[str, int, Outcome]:
    return done[0], seed, done[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--jobs", type=int, default=max(1, min(8, os.cpu_count() or 1)))
    parser.add_argument("--out", type=Path, help="JSON file for the counts")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    counts = torture(options.minutes, options.seed, options.jobs, folder)
    for fault in [*counts.lost, *counts.differing, *counts.wrong]:
        print(f"\n{fault}")
    if options.out:
        options.out.write_text(json.dumps({"seed": options.seed, **vars(counts)}, indent=1) + "\n")
    kept = not (counts.lost or counts.differing or counts.wrong)
    print("" if kept else f"\nwhat is left of these runs: {folder}")
    if kept:
        shutil.rmtree(folder)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
