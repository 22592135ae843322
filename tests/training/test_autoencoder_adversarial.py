"""The VAE with a discriminator, LPIPS and a learned log-variance: in real runs of the tiny experiment."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

import tiny
from ldm.config import TrainConfig, check
from ldm.errors import UserError
from ldm.nn.autoencoder import AutoencoderKL, DiagonalGaussian
from ldm.nn.discriminator import PatchDiscriminator
from ldm.training import fit, stages
from ldm.training.autoencoder import AutoencoderModule, adaptive_weight, hinge_loss, similarity
from ldm.training.module import step_generator
from ldm.weights.folder import load_network, save_network
from probes import Stopped
from runs import ROOT, TINY, compose_values, tiny_config
from training_checks import assert_equal

RUN = ["stages=[autoencoder]", "trainer.val_every=100", "autoencoder.optim.lr=1e-2"]
PATCHGAN = [
    "discriminator=patchgan", "autoencoder.discriminator.channels=8", "autoencoder.discriminator.num_layers=2",
    "autoencoder.discriminator.start=0", "autoencoder.discriminator.lr=1e-3",
]  # fmt: skip


def build(*overrides: str) -> AutoencoderModule:
    stage = tiny_config(
        "unused", *PATCHGAN, "autoencoder.l2=0.5", "autoencoder.kl_weight=0.1", "autoencoder.learned_logvar=true",
        *overrides,
    ).autoencoder  # fmt: skip
    return AutoencoderModule(tiny.vae(), stage, seed=0)


@pytest.fixture
def image() -> Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def checkpoint(config: TrainConfig) -> dict[str, Any]:
    return torch.load(fit.checkpoint_path(config, "autoencoder"), weights_only=True)


def figures(config: TrainConfig, metric: str) -> list[float]:
    lines = [line.split(",") for line in (Path(config.run_dir) / "metrics.csv").read_text().splitlines()]
    return [float(value) for name, _, value, _ in lines if name == f"autoencoder/{metric}"]


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith(prefix)}


# ------------------------------------------------------------------------------------------------------- the terms


def test_hinge_loss_numbers():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert float(hinge_loss(real, fake)) == pytest.approx(((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3) / 2)
    assert float(hinge_loss(torch.full((2, 1, 3, 3), 1.0), torch.full((1,), -1.0))) == 0


def test_adaptive_weight_numbers():
    layer = torch.ones(2, requires_grad=True)
    weight = adaptive_weight((layer * torch.tensor([3.0, 4.0])).sum(), (layer * torch.tensor([0.0, 0.5])).sum(), layer)
    assert float(weight) == pytest.approx(5 / 0.5, rel=1e-5) and not weight.requires_grad
    assert layer.grad is None
    assert float(adaptive_weight(layer.sum(), 0 * layer.sum(), layer)) == 1e4
    assert float(adaptive_weight(0 * layer.sum(), layer.sum(), layer)) == 0


def test_the_similarity_is_not_rounded_by_mixed_precision(image):
    other = (image + 0.3 * image.flip(0)).clamp(-1, 1)
    exact = similarity(image, other)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(similarity(image, other), exact)
    assert 0.3 < exact < 0.99 and similarity(image, image) == 1


def test_the_loss_with_all_terms_is_the_sum_that_is_written_down(image):
    module = build()
    assert module.logvar is not None
    with torch.no_grad():
        module.logvar.fill_(0.7)
    losses, reconstruction = module.losses(module.network, image, step_generator(0, 0), judged=True)
    error = ((reconstruction - image).abs().mean() + 0.5 * (reconstruction - image).square().mean()) / 2.0138 + 0.7
    adversarial = -module.discriminator(reconstruction).mean()
    layer = module.network.decoder.conv_out.weight
    of_error, of_adversarial = (
        torch.autograd.grad(loss, layer, retain_graph=True)[0].norm() for loss in (error, adversarial)
    )
    weight = 0.5 * of_error / of_adversarial
    torch.testing.assert_close(losses["adversarial_weight"], weight, rtol=1e-3, atol=0)
    expected = error + 0.1 * losses["kl"] + weight * adversarial
    torch.testing.assert_close(losses["loss"], expected, rtol=1e-3, atol=0)


def test_a_weight_that_does_not_adapt(image):
    module = build("autoencoder.discriminator.adaptive=false")
    losses, _ = module.losses(module.network, image, step_generator(0, 0), judged=True)
    assert float(losses["adversarial_weight"]) == 0.5
    rest, _ = module.losses(module.network, image, step_generator(0, 0))
    torch.testing.assert_close(losses["loss"] - rest["loss"], 0.5 * losses["adversarial"], rtol=1e-3, atol=1e-6)


def test_every_term_has_a_gradient_into_exactly_what_it_is_meant_for(image):
    module = build()
    losses, _ = module.losses(module.network, image, step_generator(0, 0), judged=True)
    vae = {f"network.{name}" for name, _ in module.network.named_parameters()}
    encoder = {name for name in vae if name.startswith(("network.encoder", "network.quant_conv"))}
    meant = {"loss": vae | {"logvar"}, "l1": vae, "l2": vae, "adversarial": vae, "kl": encoder, "logvar": {"logvar"}}
    assert losses.keys() == {*meant, "adversarial_weight"} and not losses["adversarial_weight"].requires_grad
    for term, wanted in meant.items():
        module.zero_grad()
        losses[term].backward(retain_graph=True)
        reached = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert reached == wanted, f"{term}: {reached ^ wanted}"
        assert all(p.grad is None for p in module.discriminator.parameters())


def test_no_term_depends_on_resolution():
    module = build()
    picture = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(1)), 128)
    small, _ = module.losses(module.network, picture, step_generator(0, 0), judged=True)
    large, _ = module.losses(module.network, picture.repeat(1, 1, 2, 2), step_generator(0, 0), judged=True)
    for name in ("loss", "l1", "l2", "kl", "logvar"):
        assert large[name].item() == pytest.approx(small[name].item(), rel=0.1, abs=1e-3), name
    assert large["adversarial"].item() == pytest.approx(small["adversarial"].item(), abs=0.1)


def test_the_learned_log_variance_settles_at_the_error(image):
    """Error / exp(s) + s is least where exp(s) is the error."""
    module = build("autoencoder.discriminator.start=9")
    assert module.logvar is not None
    optimizer = torch.optim.SGD([module.logvar], lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        losses, _ = module.losses(module.network, image, step_generator(0, 0))
        losses["loss"].backward()
        optimizer.step()
    assert module.logvar.exp().item() == pytest.approx((losses["l1"] + 0.5 * losses["l2"]).item(), rel=1e-3)


# ---------------------------------------------------------------------------------------------------------- in runs


class Watch(pl.Callback):
    """Note what is trained when, and where gradients are."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.leaks: list[str] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.leaks += [name for name, p in pl_module.discriminator.named_parameters() if p.grad is not None]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        state = pl_module.discriminator_optimizer.state
        self.steps.append(int(max((float(value["step"]) for value in state.values()), default=0)))
        self.leaks += [name for name, p in pl_module.discriminator.named_parameters() if p.grad is not None]
        self.leaks += [name for name, p in pl_module.discriminator.named_parameters() if p.requires_grad]


def watched(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch, build_trainer = Watch(), fit.build_trainer
    monkeypatch.setattr(fit, "build_trainer", lambda config, module, *more: build_trainer(config, module, watch, *more))
    stages.run(config)
    return watch


def test_all_steps_are_counted_in_steps_of_the_vae(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, *RUN, *PATCHGAN, "autoencoder.max_steps=7", "autoencoder.discriminator.start=3",
                         "trainer.val_every=7")  # fmt: skip
    watch = watched(config, monkeypatch)
    assert watch.steps == [0, 0, 0, 1, 2, 3, 4] and not watch.leaks
    content = checkpoint(config)
    assert content["global_step"] == 7 and int(content["state_dict"]["ema.num_updates"]) == 7
    assert content["lr_schedulers"][0]["last_epoch"] == 7
    assert len(figures(config, "val_loss")) == len(figures(config, "val_psnr")) == len(figures(config, "val_ssim")) == 1


def test_each_step_changes_its_own_network(tmp_path, monkeypatch):
    before_and_after = []
    step = AutoencoderModule._train_discriminator

    def spy(self: Any, image: Tensor, reconstruction: Tensor) -> None:
        def all_of(prefix: str) -> list[Tensor]:
            return [p.detach().clone() for name, p in self.named_parameters() if name.startswith(prefix)]

        gradients = [None if p.grad is None else p.grad.clone() for p in self.network.parameters()]
        before = all_of("network"), all_of("ema"), all_of("discriminator")
        assert not reconstruction.requires_grad
        step(self, image, reconstruction)
        after = all_of("network"), all_of("ema"), all_of("discriminator")
        assert_equal([None if p.grad is None else p.grad for p in self.network.parameters()], gradients)
        before_and_after.append([all(map(torch.equal, a, b)) for a, b in zip(before, after, strict=True)])

    monkeypatch.setattr(AutoencoderModule, "_train_discriminator", spy)
    stages.run(tiny_config(tmp_path, *RUN, *PATCHGAN))
    assert before_and_after == [[True, True, False]] * 3


def test_until_its_start_a_discriminator_changes_nothing(tmp_path):
    """And the one code path is that of a VAE without any."""
    plain = tiny_config(tmp_path, *RUN, "name=plain", "autoencoder.max_steps=4")
    late = tiny_config(
        tmp_path, *RUN, *PATCHGAN, "name=late", "autoencoder.max_steps=4", "autoencoder.discriminator.start=4"
    )
    early = tiny_config(
        tmp_path, *RUN, *PATCHGAN, "name=early", "autoencoder.max_steps=4", "autoencoder.discriminator.start=3"
    )
    states = []
    for config in (plain, late, early):
        stages.run(config)
        states.append(checkpoint(config))
    assert_equal(part(states[0]["state_dict"], "network"), part(states[1]["state_dict"], "network"))
    assert_equal(states[0]["optimizer_states"], states[1]["optimizer_states"])
    name = "network.decoder.conv_out.weight"
    assert not torch.equal(states[0]["state_dict"][name], states[2]["state_dict"][name])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = PatchDiscriminator(3, 8, 2).state_dict()
    assert_equal(part(states[1]["state_dict"], "discriminator"), {f"discriminator.{k}": v for k, v in fresh.items()})


def test_a_discriminator_that_comes_too_late_is_told(tmp_path, capsys):
    stages.run(tiny_config(tmp_path, *RUN, *PATCHGAN, "autoencoder.discriminator.start=3"))
    assert "autoencoder.discriminator.start=3 comes after the last step" in capsys.readouterr().out


@pytest.mark.parametrize("step", [7, 11])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(step, tmp_path):
    """Interrupted before and after the discriminator's first step, both at a checkpoint of step 5 or 10."""
    overrides = [
        *RUN, *PATCHGAN, "autoencoder.discriminator.start=6", "autoencoder.learned_logvar=true",
        "autoencoder.max_steps=14", "trainer.checkpoint_every=5", "autoencoder.optim.warmup_steps=3",
    ]  # fmt: skip
    reference = tiny_config(tmp_path / "whole", *overrides)
    stages.run(reference)
    with pytest.raises(Stopped):
        crash = f"+callbacks.x={{_target_: probes.StopAt, stage: autoencoder, step: {step}}}"
        stages.run(tiny_config(tmp_path / "crashed", *overrides, crash))
    config = tiny_config(tmp_path / "crashed", *overrides)
    assert checkpoint(config)["global_step"] == step // 5 * 5
    stages.run(config)
    ours, theirs = checkpoint(config), checkpoint(reference)
    for name in ("state_dict", "optimizer_states", "discriminator_optimizer", "lr_schedulers", "global_step"):
        assert_equal(ours[name], theirs[name], name)
    assert len(theirs["discriminator_optimizer"]["state"]) == len(part(theirs["state_dict"], "discriminator"))
    assert theirs["state_dict"]["logvar"] != 0


def test_the_learned_log_variance_learns_and_stays_out_of_the_model(tmp_path):
    config = tiny_config(tmp_path, *RUN, "autoencoder.learned_logvar=true", "autoencoder.max_steps=40",
                         "autoencoder.ema_decay=0.9", "trainer.val_every=40")  # fmt: skip
    stages.run(config)
    content = checkpoint(config)
    assert content["state_dict"]["logvar"].abs() > 0.01
    assert figures(config, "val_logvar") == [pytest.approx(float(content["state_dict"]["logvar"]), rel=1e-4)]
    load_network(AutoencoderKL, Path(config.run_dir) / "model" / "vae")  # strict


@pytest.mark.parametrize(("norm", "moves"), [("null", True), ("1e-20", False)])
def test_the_discriminators_gradients_are_clipped_too(norm, moves, tmp_path):
    """Below its epsilon, 1e-8, Adam's step goes to nothing."""
    config = tiny_config(tmp_path, *RUN, *PATCHGAN, f"autoencoder.optim.clip_norm={norm}")
    stages.run(config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = PatchDiscriminator(3, 8, 2).state_dict()
    trained = checkpoint(config)["state_dict"]
    moved = max(float((trained[f"discriminator.{name}"] - tensor).abs().max()) for name, tensor in fresh.items())
    assert (moved > 1e-4) == moves and (moved < 1e-8) != moves


def test_in_bf16(tmp_path):
    config = tiny_config(tmp_path, *RUN, *PATCHGAN, "autoencoder.precision=bf16-mixed", "trainer.val_every=3",
                         "autoencoder.learned_logvar=true")  # fmt: skip
    stages.run(config)
    assert all(tensor.isfinite().all() for tensor in checkpoint(config)["state_dict"].values())
    assert all(tensor.dtype == torch.float32 for tensor in part(checkpoint(config)["state_dict"], "disc").values())
    assert -1 <= figures(config, "val_ssim")[0] <= 1


# ------------------------------------------------------------------------------------------------------ does it learn


@pytest.fixture(scope="module")
def switched_on(tmp_path_factory) -> TrainConfig:
    """A run in which the discriminator comes half-way, validated every 25 steps."""
    config = tiny_config(
        tmp_path_factory.mktemp("on"), *RUN, *PATCHGAN, "autoencoder.max_steps=200", "trainer.val_every=25",
        "autoencoder.discriminator.start=100", "autoencoder.discriminator.weight=0.5", "trainer.val_batches=4",
        "autoencoder.ema_decay=0.9",
    )  # fmt: skip
    stages.run(config)
    return config


def test_the_reconstruction_does_not_get_worse_when_the_discriminator_comes(switched_on):
    """The stated margin: at every later validation at most a fifth above the error at the switch-on."""
    errors = figures(switched_on, "val_l1")
    assert len(errors) == 8
    assert max(errors[4:]) < 1.2 * errors[3]
    assert errors[3] < 0.7 * errors[0]


def test_the_discriminator_learns(switched_on):
    losses = figures(switched_on, "discriminator")
    assert losses and losses[-1] < 0.97  # 1 where real and fake look the same
    assert all(weight >= 0 for weight in figures(switched_on, "adversarial_weight"))


def overfit(tmp_path: Path, *overrides: str) -> tuple[AutoencoderKL, TrainConfig]:
    config = tiny_config(
        tmp_path, *RUN, "trainer.overfit_batches=1", "autoencoder.max_steps=120", "autoencoder.ema_decay=0.9",
        "trainer.val_every=120", *overrides,
    )  # fmt: skip
    stages.run(config)
    vae = AutoencoderKL(**load_network(AutoencoderKL, Path(config.run_dir) / "model" / "vae").config).eval()
    state = part(checkpoint(config)["state_dict"], "ema.average.")
    vae.load_state_dict({name.removeprefix("ema.average."): tensor for name, tensor in state.items()})
    return vae, config


@torch.inference_mode()
def divergence_and_error(vae: AutoencoderKL, config: TrainConfig) -> tuple[float, float]:
    """Return nats per latent and the error per pixel of the batch that was trained on, or of one like it."""
    train, _ = fit.open_pictures(config)
    image = train.images(range(len(train)))
    posterior = DiagonalGaussian(vae.encode(image))
    kl = float(posterior.kl().mean()) / posterior.mean[0].numel()
    return kl, float((vae.decode(posterior.mode()) - image).abs().mean())


def test_one_batch_is_overfitted_and_the_posterior_does_not_collapse(tmp_path):
    few = ["data.num_train=8"]
    vae, config = overfit(tmp_path, *few)
    kl, error = divergence_and_error(vae, config)
    assert error < 0.15  # of a range that is 2 wide
    assert kl > 1
    vae, config = overfit(tmp_path, *few, "name=heavy", "autoencoder.kl_weight=10", "autoencoder.max_steps=60")
    kl_heavy, error_heavy = divergence_and_error(vae, config)
    assert kl_heavy < 0.3 < 1 < kl and error_heavy > 3 * error


# ------------------------------------------------------------------------------------------------ pretrained weights


@pytest.fixture
def pretrained(tmp_path) -> Path:
    save_network(tiny.vae(shift_factor=0.1), tmp_path / "pretrained" / "vae")
    return tmp_path / "pretrained"


def test_the_discriminator_counts_in_the_size_of_a_checkpoint(switched_on):
    module = AutoencoderModule(fit.first_vae(switched_on), switched_on.autoencoder, seed=0)
    sizes: list[int] = []
    torch.utils._pytree.tree_map_only(Tensor, lambda tensor: sizes.append(tensor.nbytes), checkpoint(switched_on))
    assert module.checkpoint_size == pytest.approx(sum(sizes), rel=0.01)


def test_the_decoder_alone(pretrained, tmp_path, capsys):
    """The encoder, and with it every latent, is to the bit what it was; nothing is folded."""
    config = tiny_config(
        tmp_path, *RUN, f"+vae.pretrained={pretrained}", "autoencoder.train=decoder", *PATCHGAN,
        "autoencoder.optim.weight_decay=0.1",
    )  # fmt: skip
    stages.run(config)
    out = capsys.readouterr().out
    assert f"going on from {pretrained}, autoencoder.train=decoder" in out
    before = load_network(AutoencoderKL, pretrained / "vae")
    after = load_network(AutoencoderKL, Path(config.run_dir) / "model" / "vae")
    changed = {
        name.split(".")[0] for name, p in after.named_parameters() if not torch.equal(p, before.state_dict()[name])
    }
    assert changed == {"decoder", "post_quant_conv"}
    assert after.config == before.config and after.config["scaling_factor"] == 0.8
    stages.run(config)
    assert "up to date" in capsys.readouterr().out


def test_all_of_a_pretrained_vae(pretrained, tmp_path):
    overrides = [f"+vae.pretrained={pretrained}", "autoencoder.optim.lr=1e-10"]
    config = tiny_config(tmp_path, *RUN, *overrides)
    stages.run(config)
    before = load_network(AutoencoderKL, pretrained / "vae")
    after = load_network(AutoencoderKL, Path(config.run_dir) / "model" / "vae")
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.inference_mode():
        restored = [vae.image(vae.latents(vae.encode(image))) for vae in (before, after)]
    torch.testing.assert_close(*restored, rtol=1e-3, atol=1e-3)
    assert after.config["scaling_factor"] == 1.0
    assert stages.stage_key(config, "autoencoder") != stages.stage_key(tiny_config(tmp_path, *RUN), "autoencoder")


def test_a_pretrained_vae_that_does_not_fit_the_pictures(pretrained, tmp_path):
    with pytest.raises(UserError, match=r"data\.resolution=15 must be a multiple of 2"):
        stages.run(tiny_config(
            tmp_path, *RUN, f"+vae.pretrained={pretrained}", "data.resolution=15", "vae.block_out_channels=null",
            "text_encoder.vision=null",
        ))  # fmt: skip


# -------------------------------------------------------------------------------------------------------- the config


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["autoencoder.train=decoder"], "name one by +vae.pretrained="),
        (["autoencoder.l1=0", "autoencoder.l2=0"], "no error of pixels"),
        (["discriminator=patchgan", "trainer=gpu", "autoencoder.precision=16-mixed"], "autoencoder.precision=bf16"),
        (["discriminator=patchgan"], "autoencoder.discriminator.num_layers=3 leaves nothing of data.resolution=16"),
        (["perceptual=lpips", "autoencoder.perceptual.net=alex"], "at least 31 px"),
        (["perceptual=lpips", "+vae.in_channels=4"], "compares RGB"),
        (["perceptual=lpips", "autoencoder.perceptual.net=resnet"], "autoencoder.perceptual.net"),
        (["discriminator=patchgan", "autoencoder.discriminator.start=-1"], "autoencoder.discriminator.start"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(overrides, says, tmp_path):
    with pytest.raises(UserError) as caught:
        tiny_config(tmp_path, *overrides)
    assert says in str(caught.value)


def test_what_the_stage_is_not_there_for_is_not_looked_at(tmp_path):
    """And a pretrained VAE is taken as it is where there is no stage for it."""
    config = tiny_config(tmp_path, "autoencoder.train=decoder", "stages=[clip]", "+vae.pretrained=x")
    assert config.frozen_vae == "x"
    assert tiny_config(tmp_path, "stages=[autoencoder]", "+vae.pretrained=x").frozen_vae is None


@pytest.mark.parametrize(
    ("vae", "millions", "factor", "channels"),
    [("kl_f4", 55.31, 4, 3), ("kl_f8", 83.65, 8, 4), ("kl_f16", 64.35, 16, 16), ("tiny", 0.68, 4, 4)],
)
def test_the_presets_have_their_sizes(vae, millions, factor, channels):
    """The first two are the published networks, to the parameter."""
    from ldm.training.networks import build_vae

    config = check(TrainConfig, compose_values("train", [f"vae={vae}", "data.resolution=64"]))
    with torch.device("meta"):
        network: nn.Module = build_vae(config)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
    assert (network.downscale_factor, network.config["latent_channels"]) == (factor, channels)


# ---------------------------------------------------------------------------------------------------- several processes

KEEPER = """
import os
import pytorch_lightning as pl
import torch

class Keep(pl.Callback):
    def on_train_end(self, trainer, pl_module):
        state = {name: p for name, p in pl_module.state_dict().items() if not name.startswith("ema")}
        moments = [value["exp_avg"] for value in pl_module.discriminator_optimizer.state.values()]
        torch.save({"state": state, "moments": moments}, os.environ["KEEP"] + f"/{trainer.global_rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_train_one_vae_and_one_discriminator(tmp_path):
    """Their pictures and noise differ; what they have learned does not, the discriminator and log-variance too."""
    (tmp_path / "keeper.py").write_text(KEEPER)
    overrides = [
        *TINY, *RUN, *PATCHGAN, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2",
        "trainer.precision=32-true", "autoencoder.batch_size=4", "autoencoder.discriminator.start=2",
        "autoencoder.learned_logvar=true", "autoencoder.max_steps=5", f"output_dir={tmp_path / 'out'}",
        "+callbacks.keep={_target_: keeper.Keep}",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "KEEP": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *overrides],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_equal(first, second)
    assert any(moment.abs().max() > 0 for moment in first["moments"])
    [content] = [torch.load(path, weights_only=True) for path in (tmp_path / "out").rglob("last.ckpt")]
    assert content["global_step"] == 5
