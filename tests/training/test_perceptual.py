"""LPIPS over backbones with random weights, in files as torchvision publishes them.

B batch, H W pixels.
"""

import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.image import lpips as library

import tiny
from ldm.config import PerceptualLoss
from ldm.errors import UserError
from ldm.training import fit, stages
from ldm.training.autoencoder import AutoencoderModule
from ldm.training.module import step_generator
from ldm.training.perceptual import BACKBONES, LPIPS
from runs import tiny_config

# Of each backbone: the layers after which its features are compared (arXiv:1801.03924, Appendix B).
TAPS = {"vgg": (4, 9, 16, 23, 30), "alex": (2, 5, 8, 10, 12), "squeeze": (2, 5, 8, 10, 11, 12, 13)}
FILES = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth", "squeeze": "squeezenet1_1-b8a52dc0.pth"}


def features(net: str) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found: Any = getattr(torchvision.models, BACKBONES[net])(weights=None, num_classes=1).features
    return found


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, Path]:
    """A file for each backbone; of the classifiers, which are large and not used, the names alone."""
    folder = tmp_path_factory.mktemp("backbones") / "checkpoints"
    folder.mkdir()
    paths = {}
    for net in BACKBONES:
        state = {f"features.{name}": tensor for name, tensor in features(net).state_dict().items()}
        paths[net] = folder / FILES[net]
        torch.save(state | {"classifier.6.weight": torch.zeros(1, 1), "classifier.6.bias": torch.zeros(1)}, paths[net])
    return paths


def config(net: str, weights: Path | None) -> PerceptualLoss:
    return PerceptualLoss(weight=1.0, net=net, weights=None if weights is None else str(weights))


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    one, other = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return one, other


@pytest.mark.parametrize("net", list(BACKBONES))
def test_it_is_equation_1(net, files, pair):
    """Squared distances of unit feature vectors, weighted by channel: means over positions, summed over layers."""
    heads = torch.load(Path(library.__file__).parent / "lpips_models" / f"{net}.pth", "cpu", weights_only=True)
    shift, scale = (torch.tensor(each).view(1, 3, 1, 1) for each in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    layers, expected = features(net).eval(), torch.zeros(2)
    with torch.inference_mode():
        seen = [(each - shift) / scale for each in pair]
        for i, layer in enumerate(layers[: TAPS[net][-1]], start=1):
            seen = [layer(each) for each in seen]
            if i in TAPS[net]:
                units = [F.normalize(each, dim=1) for each in seen]
                weights = heads[f"lin{TAPS[net].index(i)}.model.1.weight"]
                expected += ((units[0] - units[1]) ** 2 * weights).sum(1).mean((1, 2))
        found = LPIPS(config(net, files[net]))(*pair)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert (expected > 1e-3).all()


def test_gradients_reach_the_pictures_and_nothing_else(files, pair):
    lpips, (one, other) = LPIPS(config("squeeze", files["squeeze"])), pair
    one.requires_grad_()
    lpips.train()(one, other).mean().backward()
    assert one.grad is not None and (one.grad.abs().sum((1, 2, 3)) > 0).all()
    assert all(p.grad is None and not p.requires_grad for p in lpips.parameters())
    torch.testing.assert_close(lpips(one, other), lpips(one, other))  # no dropout of the heads in training mode
    assert lpips(one, one).abs().max() == 0


def test_grey_pictures_are_seen_as_grey(files, pair):
    lpips, (one, other) = LPIPS(config("squeeze", files["squeeze"])), (each[:, :1] for each in pair)
    torch.testing.assert_close(lpips(one, other), lpips(one.repeat(1, 3, 1, 1), other.repeat(1, 3, 1, 1)))


def test_mixed_precision_is_near(files, pair):
    lpips = LPIPS(config("vgg", files["vgg"]))
    exact = lpips(*pair)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(lpips(*pair).float(), exact, rtol=0.03, atol=0)


# --------------------------------------------------------------------------------------------------- where weights are


def test_the_cache_of_torch_hub_is_used(files, pair, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(files["squeeze"].parents[1]))
    torch.testing.assert_close(LPIPS(config("squeeze", None))(*pair), LPIPS(config("squeeze", files["squeeze"]))(*pair))


def test_weights_that_cannot_be_had(tmp_path, monkeypatch):
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(UserError) as caught:
        LPIPS(config("vgg", None))
    for told in (
        str(tmp_path / "checkpoints" / FILES["vgg"]), "https://download.pytorch.org/models/vgg16-397923af.pth",
        "no route to host", "autoencoder.perceptual.weights=<file>", "autoencoder.perceptual=null",
    ):  # fmt: skip
        assert told in str(caught.value)


def test_a_damaged_file_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / FILES["alex"]).write_bytes(b"not whole")
    with pytest.raises(UserError, match=r"alexnet-owt-7be5be79\.pth is not good .*cut short.*perceptual=null"):
        LPIPS(config("alex", None))


@pytest.mark.parametrize(("net", "file"), [("vgg", "alex"), ("squeeze", "vgg"), ("alex", "squeeze")])
def test_weights_of_another_network(net, file, files):
    with pytest.raises(UserError, match=f"autoencoder.perceptual.weights=.*torchvision's {BACKBONES[net]}"):
        LPIPS(config(net, files[file]))


def test_a_file_that_is_not_there():
    with pytest.raises(UserError, match=r"autoencoder\.perceptual\.weights: nowhere\.pth is missing"):
        LPIPS(config("vgg", Path("nowhere.pth")))


# ------------------------------------------------------------------------------------------------------- in training


def module(files: dict[str, Path]) -> AutoencoderModule:
    stage = tiny_config("unused", *with_lpips(files, 2.0), "autoencoder.kl_weight=0.1").autoencoder
    return AutoencoderModule(tiny.vae(), stage, seed=0)


def with_lpips(files: dict[str, Path], weight: float) -> list[str]:
    return [
        "perceptual=lpips", "autoencoder.perceptual.net=squeeze", f"autoencoder.perceptual.weight={weight}",
        f"autoencoder.perceptual.weights={files['squeeze']}", "data.resolution=32",
        "text_encoder.vision.patch_size=16",
    ]  # fmt: skip


def test_the_term_reaches_the_whole_vae(files, pair):
    trained = module(files)
    losses, _ = trained.losses(trained.network, pair[0], step_generator(0, 0))
    expected = losses["l1"] + losses["l2"] + 2 * losses["lpips"] + 0.1 * losses["kl"]
    torch.testing.assert_close(losses["loss"], expected)
    losses["lpips"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.network.parameters())
    assert not any("lpips" in name for name in trained.state_dict())


def test_it_does_not_depend_on_resolution(files):
    """LDM's sum over pixels would be four times as large."""
    trained = module(files)
    picture = F.interpolate(torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)), 128) * 2 - 1
    small, large = (
        trained.losses(trained.network, image, step_generator(0, 0))[0]["lpips"].item()
        for image in (picture, picture.repeat(1, 1, 2, 2))
    )
    assert large == pytest.approx(small, rel=0.1)


def test_a_run_with_it(files, tmp_path):
    """LPIPS of held-out pictures is logged, and lower for the loss that asks for it."""
    figures = []
    for name, weight in (("with", 100.0), ("without", 1e-9)):
        config = tiny_config(
            tmp_path, "stages=[autoencoder]", *with_lpips(files, weight), f"name={name}",
            "autoencoder.max_steps=40", "trainer.val_every=40", "autoencoder.optim.lr=1e-2",
            "autoencoder.ema_decay=0.9",
        )  # fmt: skip
        stages.run(config)
        lines = [line.split(",") for line in (Path(config.run_dir) / "metrics.csv").read_text().splitlines()]
        [value] = [float(line[2]) for line in lines if line[0] == "autoencoder/val_lpips"]
        figures.append(value)
        state = torch.load(fit.checkpoint_path(config, "autoencoder"), weights_only=True)["state_dict"]
        assert {key.split(".")[0] for key in state} == {"network", "ema"}
    assert figures[0] < figures[1]


def test_the_run_stops_at_the_door_where_there_are_no_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: 1 / 0)
    config = tiny_config(tmp_path / "out", "stages=[autoencoder]", "perceptual=lpips")
    with pytest.raises(UserError, match=r"autoencoder\.perceptual=null"):
        stages.run(config)
    assert not (tmp_path / "out").exists()
