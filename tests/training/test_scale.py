"""The same run on one process and on several, however they are started; real processes on the processor."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from ldm.config import Trainer
from ldm.errors import UserError
from ldm.training import stages
from ldm.training.launching import environment, placed
from runs import ROOT, TINY, compose_values, tiny_config

# ------------------------------------------------------------------------------------- who says how many there are

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
SRUN = {"SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "train", "SLURM_STEP_ID": "0"}


def place(monkeypatch, variables: dict[str, str], *overrides: str) -> tuple[int | str, int]:
    for name in ("LDM_LAUNCHER", "NODE_RANK", *TORCHRUN, *SRUN):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return placed(Trainer.model_validate(compose_values("train", list(overrides))["trainer"]))


@pytest.mark.parametrize("trainer", ["multinode", "slurm", "fsdp"])
@pytest.mark.parametrize("variables", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
def test_processes_are_as_many_as_were_started(variables, trainer, monkeypatch):
    assert place(monkeypatch, variables, f"trainer={trainer}") == (4, 2)
    assert place(monkeypatch, variables, f"trainer={trainer}", "trainer.devices=4", "trainer.num_nodes=2") == (4, 2)


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        (["trainer=cpu"], (1, 1)),
        (["trainer=ddp"], ("auto", 1)),
        (["trainer=fsdp"], ("auto", 1)),
        (["trainer=multinode", "trainer.num_nodes=3", "trainer.devices=2"], (2, 3)),
    ],
)
def test_alone_they_are_as_many_as_the_config_says(overrides, found, monkeypatch):
    assert place(monkeypatch, {}, *overrides) == found


def test_in_a_job_of_one_task_the_first_process_starts_the_others(monkeypatch):
    """As `sbatch --gpus=8` with `python train.py trainer=ddp` has it."""
    devices, nodes = place(monkeypatch, {"SLURM_NTASKS": "1"}, "trainer=ddp", "trainer.devices=2")
    trainer = pl.Trainer(
        accelerator="cpu", devices=devices, num_nodes=nodes, strategy="ddp", plugins=environment(), logger=False
    )
    assert type(trainer.strategy.cluster_environment).__name__ == "LightningEnvironment"
    place(monkeypatch, SRUN, "trainer=slurm")
    assert environment() == []


@pytest.mark.parametrize(
    ("variables", "overrides", "says"),
    [
        (TORCHRUN, ["trainer=cpu"], "torchrun has started 4 processes on each of 2 machines.*take trainer=multinode"),
        (TORCHRUN, ["trainer=ddp"], "trainer.num_nodes=1"),
        (SRUN, ["trainer=multinode", "trainer.devices=2"], "srun has started 4 processes.*trainer.devices=2"),
        ({**SRUN, "SLURM_NTASKS": "7"}, ["trainer=slurm"], "7 processes on 2 machines: there must be as many on each"),
        (
            {k: SRUN[k] for k in ("SLURM_NTASKS", "SLURM_NNODES")},
            ["trainer=slurm"],
            "start it by `srun python train.py",
        ),
        ({"NODE_RANK": "1"}, ["trainer=multinode"], "trainer.num_nodes=2"),
    ],
)
def test_what_does_not_fit_is_refused(variables, overrides, says, monkeypatch):
    with pytest.raises(UserError, match=says):
        place(monkeypatch, variables, *overrides)


# ------------------------------------------------------------------------------------------------------ real processes

# An epsilon above the rounding of gradients: those that are zero in theory would be sign(rounding) in Adam.
SAME = ["++optim.arguments.eps=1e-3", "++autoencoder.optim.arguments.eps=1e-3", "trainer.checkpoint_every=2"]
FOUR = ["trainer.max_steps=4", "autoencoder.max_steps=4", "diffusion.offset_noise=0.1", "optim.schedule=constant"]


def arguments(folder: Path, name: str, *overrides: str) -> list[str]:
    curve = f"+callbacks.curve={{_target_: probes.Curve, folder: {folder}/curves/{name}}}"
    return [*SAME, *FOUR, f"name={name}", curve, *overrides]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(folder: Path, launcher: list[str], overrides: list[str], **variables: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1", **variables}
    processor = ["trainer.accelerator=cpu", "trainer.precision=32-true"]
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *TINY, f"output_dir={folder}/out", *overrides]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([*command, *processor], env=environment, cwd=folder, text=True, **pipes)


def finished(*processes: subprocess.Popen) -> str:
    """Wait for the processes of a run; return what they have said."""
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(said)
    return "\n".join(said)


def losses(folder: Path, name: str) -> dict[int, float]:
    lines = (folder / "curves" / name / "loss.txt").read_text().splitlines()
    return {int(step): float(loss) for step, loss in map(str.split, lines)}


def weights(folder: Path, name: str, stage: str = "diffusion") -> dict:
    return torch.load(folder / f"out/{name}/checkpoints/{stage}/last.ckpt", weights_only=True)


def assert_same_run(folder: Path, name: str, stage: str, first: int = 0) -> None:
    """Compare a run with the one of a single process: losses of all steps, the first gradient, what came of it."""
    single = losses(folder, f"one-{stage}")
    assert losses(folder, name) == pytest.approx({k: v for k, v in single.items() if k > first}, rel=1e-5)
    if not first:
        gradients = [
            torch.load(folder / "curves" / each / "gradient.pt", weights_only=True) for each in (f"one-{stage}", name)
        ]
        assert gradients[0].keys() == gradients[1].keys()
        for key, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][key].contiguous(), gradient.contiguous(), rtol=1e-4, atol=1e-6)
    ours, theirs = (weights(folder, each, stage) for each in (name, f"one-{stage}"))
    assert ours["global_step"] == theirs["global_step"] == 4 and ours["samples"] == theirs["samples"] == 32
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for key, value in theirs["state_dict"].items():
        torch.testing.assert_close(ours["state_dict"][key].contiguous(), value.contiguous(), rtol=1e-3, atol=2e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where a VAE and a CLIP are, and runs of one process with batches of 8."""
    folder = tmp_path_factory.mktemp("scale")
    stages.run(tiny_config(folder / "out", *arguments(folder, "one-autoencoder", "stages=[autoencoder]")))
    stages.run(tiny_config(folder / "out", *SAME, *FOUR, "name=clip", "stages=[clip]"))
    stages.run(tiny_config(folder / "out", *arguments(folder, "one-diffusion", "stages=[diffusion]")))
    return folder


@pytest.mark.slow
def test_two_ranks_of_srun_are_one_with_both_batches(folder):
    """The VAE; the processes have what SLURM tells them."""
    own = arguments(folder, "two-vae", "stages=[autoencoder]", "autoencoder.batch_size=4", "trainer=slurm")
    shared = {
        **SRUN, "SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1",
        "SLURM_JOB_ID": "4711", "SLURM_NTASKS_PER_NODE": "2", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    said = finished(*(start(folder, [], own, **shared, SLURM_PROCID=i, SLURM_LOCALID=i) for i in "01"))
    assert said.count("autoencoder  training, 4 steps") == said.count("autoencoder  done") == 1
    assert_same_run(folder, "two-vae", "autoencoder")


@pytest.mark.slow
def test_four_ranks_of_two_machines_are_one_with_all_batches(folder):
    """The U-Net; each `torchrun` is a machine of two devices."""
    own = arguments(folder, "four", "stages=[diffusion]", "data.batch_size=2", "trainer=multinode")
    meeting = [f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-backend=c10d", "--rdzv-id=4711"]
    launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", *meeting]
    said = finished(*(start(folder, launcher, own) for _ in range(2)))
    assert said.count("diffusion    training, 4 steps") == said.count("diffusion    done") == 1
    assert len(list((folder / "out/four").glob("**/metrics.csv"))) == 1
    assert_same_run(folder, "four", "diffusion")


@pytest.mark.slow
def test_a_sharded_run_is_the_same_and_goes_on_on_another_number_of_ranks(folder):
    """One rank begins, two with FSDP go on, and one ends it; the model folder is that of a single process."""
    shutil.copytree(folder / "out/one-diffusion/checkpoints", folder / "out/sharded/checkpoints")
    last = folder / "out/sharded/checkpoints/diffusion/last.ckpt"
    last.with_name("previous.ckpt").replace(last)
    assert torch.load(last, weights_only=True)["global_step"] == 2
    own = arguments(folder, "sharded", "stages=[diffusion]", "data.batch_size=4", "trainer=fsdp", "trainer.devices=2")
    said = finished(start(folder, [], own))
    assert said.count("going on from step 2") == 1
    assert_same_run(folder, "sharded", "diffusion", first=2)
    longer = [*own, "trainer.max_steps=6", "callbacks.samples.every=5", "trainer.val_every=3"]
    said = finished(start(folder, [], longer))
    assert said.count("going on from step 4") == 1
    assert (folder / "out/sharded/samples/diffusion/step-000005.png").exists()
    alone = arguments(folder, "sharded", "stages=[diffusion]", "trainer=cpu", "trainer.max_steps=7")
    said = finished(start(folder, [], alone))
    assert said.count("going on from step 6") == 1
    whole = tiny_config(folder / "out", *arguments(folder, "one-long", "stages=[diffusion]", "trainer.max_steps=7"))
    stages.run(whole)
    ours, theirs = (weights(folder, name)["state_dict"] for name in ("sharded", "one-long"))
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key].contiguous(), value.contiguous(), rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_more_ranks_with_the_same_batch_go_on_where_the_samples_are(folder):
    """Batches of 8 on one rank, then 8 on each of two: nothing is left out, and it is said."""
    shutil.copytree(folder / "out/one-diffusion/checkpoints", folder / "out/more/checkpoints")
    own = arguments(folder, "more", "stages=[diffusion]", "trainer=ddp", "trainer.devices=2", "trainer.max_steps=6")
    said = finished(start(folder, [], own))
    assert said.count("16 samples a step from here on, 8 before: on other ranks. The learning rate stays") == 1
    found = weights(folder, "more")
    assert (found["samples"], found["batch"]) == (4 * 8 + 2 * 16, 16)
