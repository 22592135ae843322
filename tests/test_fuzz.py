"""A selection of what `fuzz.py` does, and that it would notice: run as a program, whose hooks stay in its processes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fuzz
from fuzz import State, Target
from ldm.errors import UserError

PROGRAM = Path(__file__).parent / "fuzz.py"


def run(*arguments: str) -> None:
    done = subprocess.run([sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_damaged_files_work_or_are_refused(tmp_path):
    run("inputs=10", "minutes=0.15", f"keep={tmp_path}")


@pytest.mark.slow
def test_more_damaged_files(tmp_path):
    run("inputs=250", "minutes=0.75", "seed=1", f"keep={tmp_path}")


# --------------------------------------------------------------------------------------- what it is there to notice


def make(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.txt").write_text("0" * 64)


def is_damaged(folder: Path) -> bool:
    return not (folder / "a.txt").exists() or (folder / "a.txt").read_bytes() != b"0" * 64


def write_beside(folder: Path) -> None:
    (folder.parent / "escaped").write_text("x")


def run_a_program(folder: Path) -> None:
    subprocess.run(["true"], check=True)


def die(folder: Path) -> None:
    os._exit(1)


def take_memory(folder: Path) -> None:
    bytearray(fuzz.MEMORY + (1 << 30))


def say_nothing(folder: Path) -> None:
    raise UserError("")


BAD = {
    "FileNotFoundError": lambda folder: (folder / "gone").read_text(),
    "RecursionError": lambda folder: json.loads("[" * 100_000),
    "MemoryError": take_memory,
    "says nothing": say_nothing,
    "breach: opened to write": write_beside,
    "breach: opened to read": lambda folder: (folder.parent / "canary.txt").read_text(),
    "breach: subprocess.Popen": run_a_program,
    "breach: os.remove": lambda folder: (folder.parent / "canary.txt").unlink(),
    "breach: import": lambda folder: __import__("fuzz_trap"),
    "still at it": lambda folder: time.sleep(60),
    "the process died": die,
}


@pytest.mark.parametrize("what", BAD)
def test_what_must_not_be_is_found(what, tmp_path, monkeypatch):
    def use(folder: Path) -> None:
        if is_damaged(folder):
            BAD[what](folder)

    monkeypatch.setattr(fuzz, "SECONDS", 1)
    report = fuzz.run("bad", Target(make, use), 3, 1, tmp_path / "found")
    assert report.inputs == 3 and report.findings
    assert all(what in each["what"] for each in report.findings), report.findings
    for each in report.findings:
        assert what in (tmp_path / "found" / each["input"] / "finding.txt").read_text()


def test_an_input_is_a_function_of_its_number(tmp_path):
    def fail(folder: Path) -> None:
        if is_damaged(folder):
            raise ValueError

    many = fuzz.run("x", Target(make, fail), 20, 1, tmp_path / "many")
    last = many.findings[-1]["input"]
    one = fuzz.run("x", Target(make, fail), 1, 1, tmp_path / "one", first=int(last.rpartition("-")[2]))
    assert [each["input"] for each in one.findings] == [last]
    assert fuzz.read_files(tmp_path / "one" / last) == fuzz.read_files(tmp_path / "many" / last)


def test_what_is_well_is_counted(tmp_path):
    def use(folder: Path) -> None:
        if is_damaged(folder):
            raise UserError("it is damaged")

    report = fuzz.run("good", Target(make, use), 30, 1, tmp_path)
    assert report.refused > 20 and report.inputs == 30 and not report.findings
    with pytest.raises(RuntimeError, match="the good files of bad cannot be made or used"):
        fuzz.run("bad", Target(make, say_nothing), 1, 1, tmp_path)
    assert State().worked == 0
