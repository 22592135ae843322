"""FSDP2: weights, gradients, optimizer and averages of a U-Net cut up over the ranks, for one that does not fit.

What leaves training (checkpoints, previews, the model folder) is put together on the first rank: files are those of
every other strategy, and are read on any number of ranks.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from pytorch_lightning.strategies.strategy import Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ldm.nn.blocks import ResBlock
from ldm.nn.transformer import SpatialTransformer
from ldm.training.flops import twin
from ldm.training.launching import Launcher
from ldm.training.meeting import MeetHere

N = TypeVar("N", bound=nn.Module)


class FSDP(MeetHere, ModelParallelStrategy):
    """Fully sharded data parallelism (PyTorch FSDP, arXiv:2304.11277) over all ranks, with gathered checkpoints."""

    def __init__(self, **options: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **options)

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = Launcher(self.cluster_environment, self.num_processes, self.num_nodes)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return gathered_state(self.lightning_module) if self.lightning_module is not None else {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        content = optimizer.state_dict()
        return {**content, "state": _gathered(content["state"])}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        mine, whole = self.lightning_module.state_dict(), checkpoint["state_dict"]
        state = {name: _cut(value, mine[name]) if name in mine else value for name, value in whole.items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, content in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            numbers = [number for group in content["param_groups"] for number in group["params"]]
            of_parameter = dict(zip(numbers, parameters, strict=True))
            state = {
                number: {key: _cut(value, of_parameter[number]) for key, value in values.items()}
                for number, values in content["state"].items()
            }
            optimizer.load_state_dict({**content, "state": state})


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Cut a U-Net up, block by block: each is gathered when it is its turn, and let go again."""
    for module in network.modules():
        if isinstance(module, ResBlock | SpatialTransformer):
            fully_shard(module, mesh=mesh)
    fully_shard(network, mesh=mesh, reshard_after_forward=True)  # in validation no backward pass follows


def is_sharded(network: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in network.parameters())


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return what of some tensors lies on this rank: themselves, where they are not cut up."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def whole(network: N, device: torch.device) -> N | None:
    """Return a network that is not cut up: itself, or a copy on the first rank and None elsewhere; all must ask."""
    if not is_sharded(network):
        return network
    state = gathered_state(network)
    if not state:
        return None
    copy = twin(network)
    copy.load_state_dict({name: value.to(device) for name, value in state.items()}, assign=True)
    return copy.requires_grad_(False).train(network.training)


def gathered_state(module: nn.Module) -> dict[str, Any]:
    """Return a module's whole state dict, on the host, on the first rank; an empty one elsewhere. All must ask."""
    state: dict[str, Any] = _gathered(module.state_dict())
    return state if torch.distributed.get_rank() == 0 else {}


def _gathered(value: Any) -> Any:
    """Put the tensors of nested mappings together, one after another; the first rank alone keeps them."""
    if isinstance(value, Mapping):
        return {key: _gathered(each) for key, each in value.items()}
    if isinstance(value, DTensor):
        together = value.full_tensor()
        return together.cpu() if torch.distributed.get_rank() == 0 else None
    return value.cpu() if isinstance(value, Tensor) else value


def _cut(value: Any, like: Any) -> Any:
    """Cut a whole tensor up as another of its shape is; every rank has it, none asks the others."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    value = value.to(like.device).contiguous()  # as the parameters are, whatever they were when it was saved
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
