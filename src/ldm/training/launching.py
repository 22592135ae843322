"""How the processes of a run come about: the strategy, and the ranks that a plainly started process starts itself."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from lightning_fabric.plugins.environments import LightningEnvironment
from lightning_fabric.utilities.distributed import _set_num_threads_if_needed
from pytorch_lightning.strategies import DDPStrategy, Strategy
from pytorch_lightning.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from ldm import ranks
from ldm.config import Stage, Trainer
from ldm.errors import UserError
from ldm.training.meeting import MeetHere

STARTING = 5.0  # minutes that ranks may be apart when they meet, beyond the time that a step may take
STOPPED = (130, 143)  # exit codes of a rank that was asked to stop: the others were too, and are about to
LOOK = 0.5  # seconds between looks at the ranks of this node


def placed(options: Trainer) -> tuple[int | str, int]:
    """Return the processes of each node and the number of nodes: as torchrun or srun has started them, or as is said.

    Raises:
        UserError: they say one thing, the config another; SLURM has given more tasks than are started.
    """
    by, tasks, nodes = _started()
    if by is None:
        if options.num_nodes == "auto" and "NODE_RANK" in os.environ and ranks.LAUNCHER not in os.environ:
            raise UserError("NODE_RANK is set, and nothing says how many machines there are: trainer.num_nodes=2, say")
        return options.devices, 1 if options.num_nodes == "auto" else options.num_nodes
    if by == "SLURM":
        raise UserError(
            f"SLURM has given this job {tasks} tasks, and one process was started: start it by `srun python train.py …`"
        )
    here = tasks // nodes
    if here * nodes != tasks:
        raise UserError(f"{by} has started {tasks} processes on {nodes} machines: there must be as many on each")
    if options.devices not in ("auto", here) or options.num_nodes not in ("auto", nodes) or not _is_several(options):
        raise UserError(
            f"{by} has started {here} processes on each of {nodes} machines, and the config is for another number "
            f"(trainer.devices={options.devices}, trainer.num_nodes={options.num_nodes}, "
            f"trainer.strategy={options.strategy}): take trainer=multinode or trainer=fsdp"
        )
    return here, nodes


def _started() -> tuple[str | None, int, int]:
    """Return who has started the processes of this run, how many and on how many machines, by their environment."""
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment:
        tasks = int(environment["WORLD_SIZE"])
        return "torchrun", tasks, tasks // int(environment["LOCAL_WORLD_SIZE"])
    tasks = int(environment.get("SLURM_NTASKS", "1"))
    if tasks > 1 and environment.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return "srun" if "SLURM_STEP_ID" in environment else "SLURM", tasks, int(environment.get("SLURM_NNODES", "1"))
    return None, 1, 1


def environment() -> list[LightningEnvironment]:
    """Return what Lightning is to know of how the processes come about, where it would guess wrongly.

    It takes a job of SLURM with one task for processes that SLURM has started, and would start no others.
    """
    return [LightningEnvironment()] if "SLURM_NTASKS" in os.environ and _started()[0] is None else []


def _is_several(options: Trainer) -> bool:
    """Tell whether a config is for several processes."""
    return options.strategy != "auto" or options.num_nodes != 1 or options.devices not in (1, "auto")


def build_strategy(options: Trainer, stage: Stage) -> str | Strategy:
    """Return the strategy that a config asks for; Lightning's own by name where it is none of these.

    FSDP cuts up the U-Net; the VAE and CLIP, which are small, are trained by DDP then.
    """
    timeout = timedelta(minutes=options.timeout_minutes + STARTING)
    if options.strategy == "fsdp" and stage == "diffusion":
        from ldm.training.sharding import FSDP

        return FSDP(timeout=timeout)
    if options.strategy in ("ddp", "fsdp") or (options.strategy == "auto" and _is_several(options)):
        return DDP(timeout=timeout)
    return options.strategy


class Launcher(_SubprocessScriptLauncher):
    """Start the other ranks of this node, and end with the first of them that ends badly.

    Lightning's looks at them every five seconds, and then kills all without a word.
    """

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        environment = self.cluster_environment
        environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not environment.creates_processes_externally:
            if self.num_processes > 1:
                os.environ[ranks.LAUNCHER] = str(os.getpid())
            self._call_children_scripts()
            ranks.started[:] = self.procs
            first = environment.node_rank() * self.num_processes + 1
            threading.Thread(target=observe, args=(self.procs, first), daemon=True, name="observe-ranks").start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)


class DDP(MeetHere, DDPStrategy):
    """DistributedDataParallel over processes of `Launcher`, or of those that torchrun or SLURM have started."""

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = Launcher(self.cluster_environment, self.num_processes, self.num_nodes)


def _ends_too(seconds: float) -> bool:
    """Wait whether this process ends by the same cause; it may take its time, once it needs the others no more."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if ranks.peers is not None and not ranks.peers.met:
            return True
        time.sleep(LOOK)
    return False


def observe(processes: Sequence[subprocess.Popen[bytes]], first_rank: int) -> None:
    """Wait until all processes have ended well, or end this one with the first that has not.

    Args:
        processes: ranks of this node.
        first_rank: of the first of them.
    """
    while any((code := process.poll()) != 0 for process in processes):
        bad = [(rank, code) for rank, process in enumerate(processes, first_rank) if (code := process.returncode)]
        if bad:
            rank, code = bad[0]
            if _ends_too(10 if code in STOPPED else 1):
                return
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"has ended with exit code {code}"
            if ranks.peers is not None:
                ranks.peers.tell_gone(rank, how)
            print(f"error: rank {rank} {how} before training began", file=sys.stderr)
            ranks.end(max(code, 1))
        time.sleep(LOOK)
