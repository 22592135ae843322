"""The crash harness: real `train.py` processes, interrupted at chosen moments and started again, and what must hold.

A run leaves a trace (`crash_probes.Trace`). However often it was interrupted, every line of its trace must be that of a
run that never was, none may be missing, what it leaves on the disk must be the same, and it must have gone on from the
last checkpoint that was written.
"""

import collections
import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from crash_probes import TRAINING, WRITING
from ldm.report.metrics import SPEED
from runs import ROOT, TINY, TINY_OWN
from sets import parquet_folder, png, shard_folder, texts

STAGES = ("autoencoder", "clip", "diffusion")
PARENT_DIES = ("SIGKILL", "SIGTERM", "SIGUSR1", "SIGINT", "segfault", "exception")
SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")
# What the process that was interrupted exits with.
CODES = {
    "SIGKILL": -signal.SIGKILL, "corrupted": -signal.SIGKILL, "from outside": -signal.SIGKILL,
    "SIGTERM": 143, "SIGUSR1": 143, "SIGINT": 130,
    "segfault": -signal.SIGSEGV, "exception": 1, "full disk": 2, "worker killed": 2,
}  # fmt: skip
HANGS = -1000
NUM = 24
# Six steps a stage; validation, grids and checkpoints at steps of their own and together.
SHORT = [
    "autoencoder.max_steps=6", "clip.max_steps=6", "trainer.max_steps=6", "trainer.val_every=3",
    "trainer.val_batches=1", "trainer.checkpoint_every=2", "callbacks.samples.every=4",
    "autoencoder.optim.warmup_steps=2", "clip.optim.warmup_steps=2", "optim.warmup_steps=2",
    "~logger.tensorboard",
]  # fmt: skip


@dataclass(frozen=True)
class Scenario:
    """A kind of run.

    Attributes:
        overrides: on the command line; `{sets}` is the folder of the sets.
        resumed: more of them from the second start on, which may not change anything.
        ranks: processes.
        workers: whether it has loader processes from the first start on.
    """

    overrides: Sequence[str]
    resumed: Sequence[str] = ()
    ranks: int = 1
    workers: bool = False


_OWN = [item for item in TINY_OWN if not item.startswith(("data.batch_size", "data.num_val"))]
_SET = ["data.batch_size=4", "data.num_val=4", "data.cache=false"]
SCENARIOS = {
    # an epoch is 20 pictures, so that it ends within a batch; every step of the U-Net takes two batches
    "shapes": Scenario([*TINY, *SHORT, "data.num_train=20", "trainer.accumulate_grad_batches=2", "data.batch_size=4"]),
    "workers": Scenario(
        [*TINY, *SHORT, "data.num_train=20", "data.cache=false", "data.num_workers=1"], ["data.num_workers=2"],
        workers=True,
    ),
    "buckets": Scenario(
        [
            *_OWN, *SHORT, *_SET, "data=hub", "data.path={sets}/parquet", "data.caption_column=words",
            "data.buckets=true", "data.crop=random", "data.flip=true",
        ],
        ["data.num_workers=1"],
    ),
    "stream": Scenario(
        [*_OWN, *SHORT, *_SET, "data=shards", "data.path={sets}/shards", "data.streaming=true"],
        ["data.num_workers=1"],
    ),
    "ranks": Scenario(
        [*TINY, *SHORT, "data.num_train=20", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2",
         "trainer.precision=32-true", "data.batch_size=4"],
        ranks=2,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Crash:
    """An interruption: see `crash_probes.Act`; `after` seconds are for those that come from outside."""

    event: str
    phase: str = ""
    stage: str = ""
    step: int = 0
    rank: int = 0
    after: float = 0.0

    def __str__(self) -> str:
        if self.event == "from outside":
            return f"SIGKILL after {self.after:.1f} s"
        return f"{self.event} in {self.stage}, {self.phase} {self.step}" + (f", rank {self.rank}" if self.rank else "")


@dataclass
class Outcome:
    """What an interrupted run came to."""

    crashes: list[Crash] = field(default_factory=list)  # those that happened
    lost: list[str] = field(default_factory=list)  # checkpoints
    differing: list[str] = field(default_factory=list)  # lines of the trace, files
    wrong: list[str] = field(default_factory=list)  # exit codes, messages, hangs

    @property
    def kept(self) -> bool:
        return not (self.lost or self.differing or self.wrong)


def make_sets(root: Path) -> Path:
    """Write the sets that scenarios read."""
    rng = torch.Generator().manual_seed(0)
    colors = torch.randint(0, 256, (NUM, 3), generator=rng).tolist()
    sizes = [(20, 20), (40, 20), (20, 30)]
    images = [png(tuple(color), sizes[i % 3]) for i, color in enumerate(colors)]
    parquet_folder(root / "parquet", images=images, words=[[text, f"{text} again"] for text in texts(NUM)])
    shard_folder(root / "shards", images, texts(NUM), size=4)
    return root


@dataclass
class Kept:
    """Which checkpoints of a stage there must be, by what its trace says.

    Attributes:
        last, previous: their steps; 0 for none.
        damaged: whether the last is.
        writing: of one that is being written.
    """

    last: int = 0
    previous: int = 0
    damaged: bool = False
    writing: Any = None

    @property
    def step(self) -> int:
        """The step to go on from."""
        return self.previous if self.damaged else self.last

    def follow(self, row: str, step: int) -> None:
        if row == "saving":
            self.writing = step
        elif row == "saved" or (row == "begin" and step == self.writing):  # it was all there but for the word of it
            self.last, self.previous, self.damaged, self.writing = step, self.step, False, None
        elif row == "begin":
            self.writing = None
        elif row == "damaged":
            self.damaged = True


class Run:
    """A run of a scenario in a folder of its own, started as often as it takes.

    Args:
        scenario: one of `SCENARIOS`.
        folder: of its trace and what it says.
        sets: folder of `make_sets`.
        sabotage: of `crash_probes.Sabotage`, from the second start on.
        disk: where the run itself lies, which may be a small file system; None for `folder`.
        timeout: seconds after which a process counts as hanging.
    """

    def __init__(
        self,
        scenario: str,
        folder: Path,
        sets: Path,
        sabotage: str | None = None,
        disk: Path | None = None,
        timeout: float = 240.0,
    ) -> None:
        self.scenario, self.folder, self.sabotage, self.timeout = SCENARIOS[scenario], folder, sabotage, timeout
        self.disk = disk or folder
        self.arguments = [item.format(sets=sets) if "{sets}" in item else item for item in self.scenario.overrides]
        self.num_starts = 0
        self.said, self.left_behind = "", False

    @property
    def out(self) -> Path:
        return self.disk / "out"

    @property
    def ballast(self) -> Path:
        """What takes the room of a full disk."""
        return self.disk / "ballast"

    @property
    def marker(self) -> Path:
        return self.folder / f"acted-{self.num_starts}"

    def start(self, crash: Crash | None = None) -> int:
        """Start `train.py`, wait for its end and return its exit code."""
        self.num_starts += 1
        arguments = [*self.arguments, f"output_dir={self.out}", "name=run", self._callback("Trace", path=self._trace)]
        if self.num_starts > 1:
            arguments += self.scenario.resumed
        if self.sabotage and (self.num_starts > 1 or self.sabotage.startswith("writing")):
            arguments.append(self._callback("Sabotage", what=self.sabotage))
        if crash and crash.phase:
            event = "SIGKILL" if crash.event == "corrupted" else crash.event
            act = {"phase": crash.phase, "stage": crash.stage, "step": crash.step, "event": event, "rank": crash.rank}
            arguments.append(self._callback("Act", marker=self.marker, ballast=self.ballast, **act))
        paths = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "TMPDIR": str(self.folder)}
        command = [sys.executable, str(ROOT / "train.py"), *arguments]
        log = self.folder / "said.txt"
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            code = process.wait(crash.after if crash and crash.after else self.timeout)
        except subprocess.TimeoutExpired:
            process.kill()  # the first process alone: the others must find out
            process.wait()
            code = -signal.SIGKILL if crash and crash.after else HANGS
        self.left_behind = not _gone(process.pid, 60)
        if self.left_behind:
            os.killpg(process.pid, signal.SIGKILL)
        self.said = log.read_text(encoding="utf-8", errors="replace")
        return code

    @property
    def _trace(self) -> Path:
        return self.folder / "trace"

    def _callback(self, name: str, **options: Any) -> str:
        told = ", ".join(f"{key}: {value}" for key, value in options.items())
        return f"+callbacks.{name.lower()}={{_target_: crash_probes.{name}, {told}}}"

    def rows(self) -> Iterator[dict[str, Any]]:
        for rank in range(self.scenario.ranks):
            path = Path(f"{self._trace}.{rank}")
            if path.exists():
                for line in path.read_text().splitlines():
                    with suppress(ValueError):  # no room was left for all of it
                        yield json.loads(line)

    def begun(self) -> list[tuple[str, int]]:
        """Return the stage and step at which each start began training."""
        return [(row["stage"], row["step"]) for row in self.rows() if row["row"] == "begin" and row["rank"] == 0]

    def checkpoints(self) -> dict[str, set[int]]:
        """Return of each stage the steps that it may go on from: two where it died while it wrote the second."""
        kept: dict[str, Kept] = collections.defaultdict(Kept)
        for row in self.rows():
            if row["rank"] == 0:
                kept[row["stage"]].follow(row["row"], row["step"])
        return {stage: {each.step} | ({each.writing} - {None}) for stage, each in kept.items()}

    def corrupt(self, stage: str) -> None:
        """Change some bytes in the middle of the last checkpoint, as disks do, where there is a whole one before it.

        More than lie between two tensors, where they would mean nothing.
        """
        folder = self.out / "run" / "checkpoints" / stage
        rows = [
            row["row"] for row in self.rows() if row["stage"] == stage and row["row"] in ("saving", "saved", "damaged")
        ]
        if rows[-1:] != ["saved"] or not (folder / "previous.ckpt").exists():
            return
        content = bytearray((folder / "last.ckpt").read_bytes())
        middle = len(content) // 2
        content[middle : middle + 256] = bytes(byte ^ 0xFF for byte in content[middle : middle + 256])
        (folder / "last.ckpt").write_bytes(content)
        with Path(f"{self._trace}.0").open("a") as file:
            file.write(json.dumps({"row": "damaged", "stage": stage, "step": 0, "rank": 0}) + "\n")

    def last_step(self, stage: str) -> int:
        """Return the step of a stage that was done last."""
        steps = [row["step"] for row in self.rows() if row["row"] in ("begin", "state") and row["stage"] == stage]
        return steps[-1] if steps else 0

    def trace(self) -> tuple[dict[str, Any], list[str]]:
        """Return what was done, by what it was done to, and what was done twice and differently."""
        found: dict[str, Any] = {}
        differing = []
        for row in self.rows():
            if row["row"] in ("begin", "saving", "saved", "damaged"):
                continue
            place = {key: row.pop(key) for key in ("row", "stage", "step", "rank", "micro_batch") if key in row}
            name = " ".join(f"{key} {value}" if key != "row" else value for key, value in place.items())
            if found.setdefault(name, row) != row:
                differing.append(f"{name}: {found[name]} and {row}")
        return found, differing

    def left(self) -> dict[str, Any]:
        """Return the content of what a run leaves: results, pictures, figures; what tells of times and paths aside."""
        out, found = self.out, {}
        for path in sorted(out.rglob("*")):
            name = str(path.relative_to(out))
            if path.is_file() and (path.suffix in (".safetensors", ".png") or path.name == "stage.json"):
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        with (out / "run" / "metrics.csv").open(newline="") as file:
            for metric, step, value, *_ in csv.reader(file):
                if metric.partition("/")[0] in STAGES and metric.rpartition("/")[2] not in SPEED:
                    assert found.setdefault(f"{metric} {step}", value) == value, f"{metric} {step} is there twice"
        return found


def _gone(group: int, seconds: float) -> bool:
    """Wait until no process of a group is left; tell whether that came."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def reference(scenario: str, folder: Path, sets: Path) -> Run:
    """Run a scenario that nothing interrupts."""
    folder.mkdir(parents=True)
    run = Run(scenario, folder, sets)
    assert run.start() == 0, run.said
    return run


def interrupted(run: Run, whole: Run, crashes: Sequence[Crash]) -> Outcome:
    """Interrupt a run by each of these in turn, let it come to its end, and compare it with the whole one."""
    outcome = Outcome()
    for crash in crashes:
        code = _start(run, outcome, crash)
        run.ballast.unlink(missing_ok=True)
        if run.marker.exists() or (crash.event == "from outside" and code == -signal.SIGKILL):
            outcome.crashes.append(crash)
            _check_end(run, outcome, crash, code)
        elif code != 0:
            outcome.lost.append(f"before {crash}: exit code {code}\n{run.said[-3000:]}")
        if crash.event == "corrupted":
            run.corrupt(crash.stage)
        if not outcome.kept:
            return outcome
    if code := _start(run, outcome):
        outcome.lost.append(f"the last start: exit code {code}\n{run.said[-3000:]}")
        return outcome
    _compare(run, whole, outcome)
    return outcome


def _start(run: Run, outcome: Outcome, crash: Crash | None = None) -> int:
    """Start a run; it must go on from its last checkpoint, or from the one before where that is damaged."""
    there, num_begun = run.checkpoints(), len(run.begun())
    code = run.start(crash)
    for stage, step in run.begun()[num_begun:]:
        if step not in there.get(stage, {0}):
            outcome.lost.append(f"{stage} began at step {step}, and not at {there.get(stage)}\n{run.said[-2000:]}")
    return code


def _check_end(run: Run, outcome: Outcome, crash: Crash, code: int) -> None:
    """A process must have ended as its event has it end, with a checkpoint where that can be asked for."""
    wanted = (1, 130, 143) if crash.rank else (CODES[crash.event],)
    if code not in wanted:
        outcome.wrong.append(f"{crash}: exit code {code}, and not {wanted}\n{run.said[-1500:]}")
    if crash.event in ("full disk", "worker killed") and "Traceback" in run.said:
        outcome.wrong.append(f"{crash}: a traceback\n{run.said[-3000:]}")
    if run.left_behind:
        outcome.wrong.append(f"{crash}: processes were left behind\n{run.said[-1500:]}")
    if crash.event in SIGNALS and crash.phase in (*TRAINING, *WRITING) and code == CODES[crash.event]:
        last, done = run.checkpoints().get(crash.stage), run.last_step(crash.stage)
        if last != {done}:
            outcome.lost.append(f"{crash}: step {done} was done, and the last checkpoint is of {last}")


def _compare(run: Run, whole: Run, outcome: Outcome) -> None:
    wanted, _ = whole.trace()
    found, outcome.differing = run.trace()
    outcome.differing += [f"{name} is missing" for name in wanted if name not in found]
    outcome.differing += [f"{name} is too much" for name in found if name not in wanted]
    both = [name for name in wanted if name in found]
    outcome.differing += [f"{name}: {found[name]}, not {wanted[name]}" for name in both if found[name] != wanted[name]]
    ours, theirs = run.left(), whole.left()
    outcome.differing += [
        f"{name} differs" for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)
    ]


@contextmanager
def small_disk(folder: Path, size: str = "24m") -> Iterator[bool]:
    """Mount a small file system on a folder; give False where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)
