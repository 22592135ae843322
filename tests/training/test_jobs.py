"""Sweeps by real launchers and processes: resumed, stopped, with jobs that fail and results that are shared."""

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from ldm.errors import UserError
from ldm.training import jobs, locks
from runs import ROOT, TINY, compose_values

FAKE = ROOT / "tests" / "fake_train.py"
RATES = "autoencoder.optim.lr"
JOBLIB = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")


def command(folder: Path, *arguments: str, script: Path = FAKE) -> list[str]:
    """Return a sweep over a VAE of three steps, named by what is swept alone."""
    said = ["experiment=short", f"output_dir={folder}", *arguments]
    (folder / "conf/experiment").mkdir(parents=True, exist_ok=True)
    short = {
        "defaults": ["shapes"], "name": "sweep", "stages": ["autoencoder"],
        "autoencoder": {"max_steps": 3}, "clip": {"max_steps": 3}, "trainer": {"max_steps": 3},
    }  # fmt: skip
    (folder / "conf/experiment/short.yaml").write_text("# @package _global_\n" + yaml.safe_dump(short))
    return [sys.executable, str(script), "-m", f"--config-dir={folder / 'conf'}", *said]


def start(folder: Path, *arguments: str, seconds: float = 0.0, **options) -> subprocess.Popen:
    environment = {**os.environ, "FAKE_SECONDS": str(seconds), "PYTHONPATH": str(ROOT / "tests")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command(folder, *arguments, **options), env=environment, start_new_session=True, **pipes)


def sweep(folder: Path, *arguments: str, seconds: float = 0.0, **options) -> tuple[int, str]:
    process = start(folder, *arguments, seconds=seconds, **options)
    out, _ = process.communicate(timeout=300)
    return process.returncode, out


def steps(folder: Path) -> Counter[str]:
    path = folder / "steps.txt"
    return Counter(path.read_text().splitlines() if path.exists() else [])


def wait_for_step(folder: Path, step: str) -> None:
    for _ in range(600):
        if step in steps(folder):
            return
        time.sleep(0.1)
    raise AssertionError(f"{step} never came: {steps(folder)}")


def all_steps(*names: str, count: int = 3, stage: str = "autoencoder") -> Counter[str]:
    return Counter(f"{name} {stage} {step}" for name in names for step in range(count))


def name(rate: float) -> str:
    return f"{RATES}-{rate}"


# --------------------------------------------------------------------------------------------------------- what fails


def test_a_job_fails_alone_and_is_told_and_only_it_is_run_again(tmp_path):
    code, out = sweep(tmp_path, f"{RATES}=9,1,8,7,0")
    assert code == 1
    assert steps(tmp_path) == all_steps(name(1))
    assert "error: 4 of the jobs failed:" in out
    folder = tmp_path / "sweep"
    found = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/failed.json")}
    assert {rate: (each["exit_code"], each["error"].splitlines()[0]) for rate, each in found.items()} == {
        name(9): (2, "error: a rate of 9"),
        name(8): (1, "ValueError: eight"),
        name(7): (-9, "ended by SIGKILL (want of memory ends a process so); its last lines:"),
        name(0): (2, "error: autoencoder.optim.lr: Input should be greater than 0, not 0"),
    }
    by_itself = f"experiment=short output_dir={tmp_path} {RATES}=9 run_dir={folder / name(9)}"
    assert found[name(9)]["command"] == f"python train.py --config-dir={tmp_path / 'conf'} {by_itself}"
    assert all(f"    {line}\n" in out for line in ("error: a rate of 9", "is too much", "ValueError: eight"))
    assert f"- `{name(8)}`: ValueError: eight; `python train.py " in (folder / "sweep.md").read_text()
    summary = json.loads((folder / "sweep.json").read_text())
    assert summary["jobs"][0]["told"] == f"{RATES}=1" and len(summary["failed"]) == 4
    assert "ValueError: eight" in (folder / name(8) / "job.log").read_text()

    (folder / name(1) / "failed.json").write_text((folder / name(9) / "failed.json").read_text())  # of long ago
    code, out = sweep(tmp_path, f"{RATES}=1")  # those that failed are no part of this one
    assert not (folder / name(1) / "failed.json").exists()
    assert code == 0 and "up to date" in out and steps(tmp_path) == all_steps(name(1))


def test_a_sweep_is_no_rank(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out = sweep(tmp_path, f"{RATES}=1")
    assert code == 2 and "without torchrun" in out and not steps(tmp_path)


# ---------------------------------------------------------------------------------------------------------- launchers


def test_of_jobs_side_by_side_one_trains_what_they_share(tmp_path):
    shared = ("stages=[autoencoder,clip]", "autoencoder.max_steps=20")
    code, out = sweep(tmp_path, *JOBLIB, *shared, "clip.optim.lr=1,2,9", seconds=0.1)
    assert code == 0, out
    names = [f"autoencoder.max_steps-20_clip.optim.lr-{rate}" for rate in (1, 2, 9)]
    done = steps(tmp_path)
    of_vae = [line for line in done.elements() if " autoencoder " in line]
    assert len(of_vae) == 20 and len({line.split()[0] for line in of_vae}) == 1  # one job's, each step once
    assert done - Counter(of_vae) == all_steps(*names, stage="clip")
    assert "waiting for" in out and "done by another run" in out
    assert f"[{names[0]}] clip         training, 3 steps" in out
    assert not list((tmp_path / "stages").glob(".*"))
    assert len(json.loads((tmp_path / "sweep/sweep.json").read_text())["jobs"]) == 3


def test_submitit_keeps_what_it_writes_in_the_sweep_s_folder(tmp_path):
    code, out = sweep(tmp_path, "hydra/launcher=submitit_local", f"{RATES}=2,9,1")
    assert code == 1 and "ranked by autoencoder/val_loss" in out and "error: a rate of 9" in out
    assert steps(tmp_path) == all_steps(name(1), name(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["conf", "stages", "steps.txt", "sweep"]
    assert list((tmp_path / "sweep/.submitit").rglob("*_log.out"))
    assert "autoencoder  training" in (tmp_path / "sweep" / name(1) / "job.log").read_text()


@pytest.mark.slow
def test_optuna_is_told_of_failures_and_asks_for_the_same_when_it_resumes(tmp_path):
    search = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", f"{RATES}=choice(1,2,9)", "seed=0")
    code, out = sweep(tmp_path, *search)
    first = steps(tmp_path)
    results = tmp_path / "sweep/optimization_results.yaml"
    best = yaml.safe_load(results.read_text())
    assert code == 1 and "Failed experiment" in out and "error: a rate of 9" in out  # which this seed tries
    assert best["best_value"] == min(float(line.split()[0].split("lr-")[1].split("_")[0]) for line in first)
    assert f"| `{RATES}={best['best_params'][RATES]}` | 1 | {best['best_value']:.4g} |" in out.splitlines()
    assert max(first.values()) == 1
    assert sweep(tmp_path, *search)[0] == 1
    assert steps(tmp_path) == first and yaml.safe_load(results.read_text()) == best


@pytest.mark.parametrize(("metric", "direction"), [("null", "minimize"), ("diffusion/prompt_accuracy", "maximize")])
def test_a_search_knows_which_way_is_better(metric, direction, tmp_path, monkeypatch):
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        told = ["experiment=shapes", "sweep=search", f"optimized_metric={metric}", "seed=5"]
        config = compose("train", told, return_hydra_config=True)
    jobs._settle_search(config)
    assert str(config.hydra.sweeper.direction).rpartition(".")[2] == direction
    assert config.hydra.sweeper.sampler.seed == 5


@pytest.mark.slow
def test_the_commands_of_the_page(tmp_path):
    fenced = re.findall(r"^```\n(.*?)^```", (ROOT / "docs/sweeps.md").read_text(), re.DOTALL | re.MULTILINE)
    lines = [line for block in fenced for line in block.splitlines()]
    few = ["autoencoder.max_steps=1", "clip.max_steps=1", "trainer.max_steps=1"]
    for line in lines:
        _, script, *arguments = shlex.split(re.sub(r"\s{2,}#.*", "", line))
        arguments = [str(FAKE), *arguments, *few] if script == "train.py" else [script, *arguments]
        done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "ranked by diffusion/" in done.stdout
    assert len(lines) >= 5


@pytest.mark.parametrize("path", sorted((ROOT / "conf/sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_each_sweep_that_is_kept_as_a_file_composes(path):
    values = compose_values("train", ["experiment=shapes", f"sweep={path.stem}"])
    assert values["name"] == path.stem and values["optimized_metric"].startswith("diffusion/")


def test_a_plugin_that_is_missing_is_told(tmp_path):
    code, out = sweep(tmp_path, "hydra/launcher=ray")
    assert code == 2 and "there is no hydra/launcher=ray; pip install 'ldm[sweeps]'" in out


# -------------------------------------------------------------------------------------------- killed, and started again


@pytest.mark.parametrize("launcher", [(), pytest.param(JOBLIB, marks=pytest.mark.slow)], ids=["basic", "joblib"])
def test_a_sweep_that_is_killed_goes_on_with_each_step_done_once(launcher, tmp_path):
    arguments = (f"{RATES}=1,2,3", *launcher)
    process = start(tmp_path, *arguments, seconds=0.8)
    wait_for_step(tmp_path, f"{name(2)} autoencoder 0")
    process.kill()
    process.wait()
    assert steps(tmp_path) != all_steps(name(1), name(2), name(3))
    code, out = sweep(tmp_path, *arguments)
    assert code == 0, out
    assert steps(tmp_path) == all_steps(name(1), name(2), name(3))
    assert "stopped after step" in (tmp_path / "sweep" / name(2) / "job.log").read_text()  # it did not run on by itself


@pytest.mark.parametrize("launcher", [(), pytest.param(JOBLIB, marks=pytest.mark.slow)], ids=["basic", "joblib"])
@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_sweep_after_the_steps_in_hand(launcher, signum, code, tmp_path):
    process = start(tmp_path, f"{RATES}=1,2,3,4", "autoencoder.max_steps=200", *launcher, seconds=0.3)
    first = f"{name(1)}_autoencoder.max_steps-200"
    wait_for_step(tmp_path, f"{first} autoencoder 0")
    os.killpg(process.pid, signum) if signum == signal.SIGINT else process.send_signal(signum)  # as terminals do
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code, out
    assert "stopped after step" in out and "Traceback" not in out and "failed" not in out
    ended = steps(tmp_path)
    begun = {line[: line.index("_")] for line in ended}
    assert begun <= ({name(1), name(2)} if launcher else {name(1)})  # no other job
    time.sleep(1)
    assert steps(tmp_path) == ended  # and nothing runs on
    assert not any(locks.in_use(run_dir) for run_dir in (tmp_path / "sweep").glob("*/"))


@pytest.mark.slow
def test_a_job_that_another_sweep_runs_is_waited_for(tmp_path):
    arguments = (f"{RATES}=1", "autoencoder.max_steps=20")
    job = f"{name(1)}_autoencoder.max_steps-20"
    one = start(tmp_path, *arguments, seconds=0.5)
    wait_for_step(tmp_path, f"{job} autoencoder 0")
    code, out = sweep(tmp_path, *arguments)
    one.communicate(timeout=60)
    assert code == one.returncode == 0
    assert "is in use by process" in out and steps(tmp_path) == all_steps(job, count=20)


@pytest.mark.slow
def test_who_waits_takes_over_from_a_holder_that_dies(tmp_path):
    arguments = ("stages=[autoencoder]", "autoencoder.max_steps=40")
    runs = [start(tmp_path, *arguments, f"name={each}", seconds=0.1) for each in "ab"]
    names = "autoencoder.max_steps-40"
    wait_for_step(tmp_path, f"{names} autoencoder 5")
    holder = next(iter((tmp_path / "stages").glob(".*.lock"))).read_text()
    first = Path(holder.splitlines()[0]).parent.name
    os.kill(int(holder.splitlines()[1].split()[1]), signal.SIGKILL)
    outs = {each: run.communicate(timeout=60)[0] for each, run in zip("ab", runs, strict=True)}
    second = "b" if first == "a" else "a"
    assert "ended by SIGKILL" in outs[first] and "waiting for" in outs[second]
    assert "done in" in outs[second]
    assert (tmp_path / second / names / "model/vae").is_dir()


# -------------------------------------------------------------------------------------------------------------- locks


def test_one_is_in_turn_at_a_time_and_the_file_goes(tmp_path):
    path, looks = tmp_path / "a" / ".lock", []

    def never(holder):
        raise AssertionError

    with locks.turn(path, "mine", never):
        assert locks.said_by_holder(path).startswith(f"mine\nprocess {os.getpid()} on ")
        with pytest.raises(RuntimeError, match="mine"):

            def waiting(holder):
                looks.append(holder)
                raise RuntimeError(holder)

            with locks.turn(path, "other", waiting):
                raise AssertionError
    assert not path.exists() and len(looks) == 1
    with locks.turn(path, "again", never):
        pass


def test_a_directory_in_use_is_waited_for_or_told(tmp_path):
    code = f"from pathlib import Path; from ldm.training.locks import held; import time\nwith held(Path('{tmp_path}')):"
    other = subprocess.Popen(
        [sys.executable, "-c", f"{code}\n print(1, flush=True); time.sleep(2)"], stdout=subprocess.PIPE
    )
    assert other.stdout and other.stdout.readline() == b"1\n"
    with pytest.raises(UserError, match=f"is in use by process {other.pid}"), locks.held(tmp_path):
        pass
    assert locks.in_use(tmp_path)
    with locks.held(tmp_path, wait=True):
        assert other.wait() == 0
    assert not locks.in_use(tmp_path)


def test_who_waited_for_a_directory_that_was_removed_holds_the_new_one(tmp_path, monkeypatch):
    """The one inside fails, and takes the directory with it while another waits; a third comes."""
    run_dir, waits = tmp_path / "a" / "run", []

    def fail(seconds):
        waits.append(seconds)
        (run_dir / "config.yaml").touch()
        first.__exit__(UserError, UserError("no"), None)
        assert not (tmp_path / "a").exists()

    monkeypatch.setattr(locks.time, "sleep", fail)
    first = locks.held(run_dir)
    first.__enter__()
    with pytest.raises(UserError, match="mine"), locks.held(run_dir, wait=True):
        assert len(waits) == 1 and f"process {os.getpid()} " in (run_dir / ".lock").read_text()
        with pytest.raises(UserError, match="is in use by process"), locks.held(run_dir):
            raise AssertionError
        raise UserError("mine")
    assert not list(tmp_path.iterdir())  # it had made it anew


def test_a_directory_that_somebody_else_made_anew_stays(tmp_path):
    run_dir = tmp_path / "run"
    with pytest.raises(UserError, match="no"), locks.held(run_dir):
        shutil.rmtree(run_dir)  # by hand
        second = locks.held(run_dir)
        second.__enter__()
        (run_dir / "theirs").touch()
        raise UserError("no")
    assert (run_dir / "theirs").exists() and locks.in_use(run_dir)
    second.__exit__(None, None, None)


def test_a_directory_goes_before_its_lock_does(tmp_path, monkeypatch):
    """Nobody is inside a directory that another process is removing."""
    run_dir, removed = tmp_path / "run", []
    unlink = Path.unlink

    def slow(path, missing_ok=False):
        removed.append(path.name)
        if path.name != ".lock":
            with pytest.raises(UserError, match="is in use"), locks.held(run_dir):
                raise AssertionError
        unlink(path, missing_ok)
        if path.name == ".lock":
            (run_dir / "theirs").touch()  # somebody came in

    monkeypatch.setattr(Path, "unlink", slow)
    with pytest.raises(UserError, match="no"), locks.held(run_dir):
        for name in ("a", "z"):
            (run_dir / name).touch()
        raise UserError("no")
    assert removed[-1] == ".lock" and sorted(removed) == [".lock", "a", "z"]
    assert [path.name for path in run_dir.iterdir()] == ["theirs"]


@pytest.mark.parametrize("moment", ["mkdir", "open"])
def test_a_folder_that_goes_while_a_lock_is_opened(tmp_path, monkeypatch, moment):
    path, real = tmp_path / "a" / ".lock", getattr(Path, moment)
    faults = [FileNotFoundError(2, "no"), FileExistsError(17, "was there"), FileNotFoundError(2, "no")]

    def gone(self, *args, **options):
        if faults:
            raise faults.pop()
        return real(self, *args, **options)

    monkeypatch.setattr(Path, moment, gone)
    with locks.turn(path, "mine", None):
        assert path.exists()
    faults += [FileNotFoundError(2, "No such file")] * 1000
    with pytest.raises(UserError, match="a cannot be written: No such file"), locks.turn(path, "mine", None):
        raise AssertionError


def test_one_is_inside_at_a_time_whoever_fails(tmp_path):
    """Processes that come and go as fast as they can, each of which removes what it made."""
    code = f"""
import os
from contextlib import nullcontext
from pathlib import Path
from ldm.errors import UserError
from ldm.training import locks
locks.LOOK, locks.say = 0.001, lambda text: None
folder = Path({str(tmp_path)!r})
for i in range(1000):
    try:
        kind = locks.turn(folder / "b/.lock", "", lambda _: nullcontext(lambda _: None)) if i % 2 else None
        with kind or locks.held(folder / "a/run", wait=True):
            inside = folder / "b/inside" if kind else folder / "a/run/inside"
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
            inside.unlink()
            raise UserError
    except UserError as error:
        assert not str(error), error
"""
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_disk_without_locks(tmp_path, monkeypatch, number):
    def refuse(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    told = rf"is on a disk without file locks: {os.strerror(number)}\. .*output_dir="
    for kind in (locks.held(tmp_path), locks.turn(tmp_path / ".lock", "", None)):
        with pytest.raises(UserError, match=told), kind:
            raise AssertionError
    assert not locks.in_use(tmp_path)


# ---------------------------------------------------------------------------------------------------- real trainings


@pytest.mark.slow
def test_each_job_has_its_own_process_group_of_ranks(tmp_path):
    """Two jobs one after another on two ranks each; the first is killed half-way, and the sweep started again."""
    marker = tmp_path / "killed"
    kill = f"+callbacks.kill={{_target_: probes.KillAt, stage: diffusion, step: 2, marker: {marker}}}"
    tiny = [item for item in TINY if not item.startswith("experiment=")]
    arguments = (
        *tiny,
        "trainer.devices=2",
        "trainer.strategy=ddp",
        "optim.lr=1e-3,2e-3",
        "stages=[autoencoder,clip,diffusion]",
    )
    code, out = sweep(tmp_path, *arguments, kill, script=ROOT / "train.py")
    assert marker.exists() and code == 1, out
    done = {path.parent.parent.name for path in tmp_path.glob("sweep/*/model/model_index.json")}
    assert len(done) == 1, out
    code, out = sweep(tmp_path, *arguments, kill, script=ROOT / "train.py")
    assert code == 0, out
    assert out.count("diffusion    training") == 1 and "going on from step 2" in out
    assert "draw with the best: python sample.py ckpt=" in out
    models = [path.read_bytes() for path in tmp_path.glob("sweep/*/model/unet/*.safetensors")]
    assert len(models) == 2 and models[0] != models[1]
    assert len(list((tmp_path / "stages").iterdir())) == 2
    assert not list(tmp_path.rglob(".hydra")) and not list(tmp_path.rglob("train*.log"))  # of Hydra's


@pytest.mark.slow
def test_real_jobs_side_by_side_share_the_vae_and_clip(tmp_path):
    tiny = [item for item in TINY if not item.startswith("experiment=")]
    stages = "stages=[autoencoder,clip,diffusion]"
    code, out = sweep(tmp_path, *tiny, *JOBLIB, "optim.lr=1e-3,2e-3", stages, script=ROOT / "train.py")
    assert code == 0, out
    assert out.count("autoencoder  training") == out.count("clip         training") == 1
    assert out.count("diffusion    training") == 2
    best = json.loads((tmp_path / "sweep/sweep.json").read_text())["jobs"][0]["runs"][0]
    assert f"python sample.py ckpt={tmp_path / 'sweep' / best} " in out
