"""`trainer.compile=true` changes how blocks are computed, and nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from ldm.config import TrainConfig
from ldm.errors import UserError
from ldm.training import compiling, fit, stages
from ldm.training.compiling import compile_blocks
from probes import Record
from runs import tiny_config

# One level, and so as few different blocks as there can be.
SMALLEST = (
    "unet.block_out_channels=[8]", "++unet.down_block_types=[CrossAttnDownBlock2D]",
    "++unet.up_block_types=[CrossAttnUpBlock2D]",
)  # fmt: skip


@pytest.fixture
def quick(monkeypatch) -> None:
    """Trace blocks as ever, and compute what was traced without translating it."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    torch._dynamo.reset()


def losses(config: TrainConfig) -> list[float]:
    Record.rows.clear()
    stages.run(config)
    return [row["loss"] for row in Record.rows if row["stage"] == "diffusion"]


def config_of(output_dir: Any, name: str, *overrides: str) -> TrainConfig:
    probe = "+callbacks.record._target_=probes.Record"
    return tiny_config(output_dir, f"name={name}", "stages=[diffusion]", probe, *SMALLEST, *overrides)


def test_blocks_are_compiled_in_place_and_no_weight_is_called_otherwise(quick):
    for make in (tiny.unet, tiny.vae, tiny.clip):
        network: Any = make()
        names = list(network.state_dict())
        compiled = compile_blocks(network)
        assert compiled and compiled == sum(module._compiled_call_impl is not None for module in network.modules())
        assert list(network.state_dict()) == names == [name for name, _ in make().state_dict().items()]


@pytest.mark.slow
def test_predictions_and_gradients_are_the_same_at_every_shape(quick):
    level = {"block_out_channels": [16], "down_block_types": ["CrossAttnDownBlock2D"]}
    plain, compiled = (tiny.unet(**level, up_block_types=["CrossAttnUpBlock2D"]).requires_grad_(True) for _ in range(2))
    compile_blocks(compiled, many_shapes=True)
    for batch, height, width in ((2, 8, 8), (3, 16, 4)):
        x_t = torch.randn(batch, 4, height, width).contiguous(memory_format=torch.channels_last)
        t, context = torch.arange(batch), torch.randn(batch, 5, 16)
        outputs = [network(x_t, t, context) for network in (plain, compiled)]
        torch.testing.assert_close(*outputs)
        for output, network in zip(outputs, (plain, compiled), strict=True):
            network.zero_grad()
            output.square().sum().backward()
        for mine, its in zip(plain.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, its.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("buckets", [False, True])
def test_what_is_trained_is_compiled_where_it_is_asked_for(finished, monkeypatch, buckets):
    seen: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        fit, "compile_blocks", lambda network, many_shapes: seen.append((type(network).__name__, many_shapes))
    )
    options = ["trainer.compile=true", "trainer.max_steps=1", f"data.buckets={str(buckets).lower()}"]
    stages.run(config_of(finished.output_dir, f"asked-{buckets}", *options))
    assert seen == [("UNet", buckets)]


@pytest.mark.slow
def test_a_run_goes_on_compiled_or_not(quick, finished):
    """Losses are equal but for rounding, results have one name, and either reads the other's checkpoints."""
    plain, compiled = (config_of(finished.output_dir, name) for name in ("plain", "compiled"))
    compiled = compiled.model_copy(update={"trainer": compiled.trainer.model_copy(update={"compile": True})})
    assert stages.stage_key(plain, "diffusion") == stages.stage_key(compiled, "diffusion")
    found = [losses(config) for config in (plain, compiled)]
    assert found[0] == pytest.approx(found[1], rel=1e-5) and len(found[0]) == 3
    weights = [Path(config.run_dir) / "model" / "unet" / "config.json" for config in (plain, compiled)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    for first, then in ((plain, compiled), (compiled, plain)):
        longer = then.trainer.model_copy(update={"max_steps": 5})
        more = then.model_copy(update={"trainer": longer, "name": first.name, "run_dir": first.run_dir})
        assert len(losses(more)) == 2  # from step 3 on


def test_a_machine_without_a_compiler_is_told_so(monkeypatch):
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler, .* leave trainer\.compile=false"):
        compile_blocks(tiny.unet())


@pytest.mark.slow
def test_translated_blocks_train_as_plain_ones_do(finished):
    torch._dynamo.reset()
    plain, compiled = (config_of(finished.output_dir, f"{name}-whole") for name in ("plain", "compiled"))
    compiled = compiled.model_copy(update={"trainer": compiled.trainer.model_copy(update={"compile": True})})
    assert losses(plain) == pytest.approx(losses(compiled), rel=1e-4)
