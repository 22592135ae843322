"""torch.compile of what a network repeats: the blocks alone, in place, so that names of weights stay what they are."""

import os
import shutil
from typing import Any

from torch import nn

from ldm.errors import UserError
from ldm.nn.blocks import ResBlock
from ldm.nn.clip import EncoderLayer
from ldm.nn.transformer import BasicTransformerBlock

BLOCKS = (ResBlock, BasicTransformerBlock, EncoderLayer)
BACKEND = "inductor"
GRAPHS = 64  # of one kind of block: as many as it has widths and sizes, where torch would give up after eight


def compile_blocks(network: nn.Module, many_shapes: bool = False) -> int:
    """Compile the blocks of a network; they are translated when they first run. Blocks that are alike share the work.

    Args:
        network: of any stage. Copies that are made of it, such as its average, are not compiled.
        many_shapes: let one translation serve all heights and widths, at some cost in speed, where batches differ.

    Returns:
        How many blocks there are.

    Raises:
        UserError: there is no C++ compiler.
    """
    from torch import _dynamo  # takes a second to import

    compilers = [os.environ.get("CXX"), "g++", "clang++"]
    if BACKEND == "inductor" and not any(shutil.which(name) for name in compilers if name):
        raise UserError(
            "trainer.compile=true needs a C++ compiler, on a GPU too, and there is none: install g++ (apt-get install "
            "g++), name one by the environment variable CXX, or leave trainer.compile=false"
        )
    settings: Any = _dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, GRAPHS)
    blocks = [module for module in network.modules() if isinstance(module, BLOCKS)]
    for block in blocks:
        block.compile(dynamic=True if many_shapes else None, backend=BACKEND)
    return len(blocks)
