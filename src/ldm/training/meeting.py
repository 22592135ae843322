"""Where the ranks of one machine meet: at an address that other machines do not reach."""

import os
import socket
from typing import Any

import torch.distributed as dist
from lightning_fabric.plugins.environments import LightningEnvironment

from ldm.ranks import meet

HERE = "127.0.0.1"


class MeetHere:
    """Part of a strategy: ranks that one machine has started itself talk over its loopback interface alone.

    PyTorch's meeting place listens at all addresses of a machine, and gloo at that of its name. MASTER_ADDR and
    GLOO_SOCKET_IFNAME say otherwise, as do torchrun and SLURM.
    """

    def save_checkpoint(self: Any, *args: Any, **kwargs: Any) -> None:
        super().save_checkpoint(*args, **kwargs)  # type: ignore[misc]
        meet()  # for as long as the first rank writes; Lightning's own barrier has a limit

    def setup_environment(self: Any) -> None:
        environment = self.cluster_environment
        alone = self.num_nodes == 1 and isinstance(environment, LightningEnvironment)
        if alone and environment.main_address == HERE and not dist.is_initialized():
            loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
            if loopback is not None:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
            rank, port = environment.local_rank(), environment.main_port
            first = socket.create_server((HERE, port)).detach() if rank == 0 else None
            store = dist.TCPStore(
                HERE, port, self.num_processes, rank == 0, self._timeout, wait_for_workers=False, master_listen_fd=first
            )
            options = {"device_id": self.root_device} if self.root_device.type == "cuda" else {}
            backend = self._get_process_group_backend()
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=self.num_processes, timeout=self._timeout, **options
            )
        super().setup_environment()  # type: ignore[misc]
