"""B batch, P width of the common space."""

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import tiny
from ldm.conditioner import Conditioner, tokenize, train_tokenizer
from ldm.config import ClipStage, TrainConfig, check
from ldm.data.sources import open_sources
from ldm.evaluation.evaluate import evaluate
from ldm.nn.clip import CLIP, TextTower
from ldm.training import fit, stages
from ldm.training.clip import ClipModule
from ldm.training.module import StageModule
from ldm.weights.folder import load_network
from ldm.weights.tokenizer import load_tokenizer
from runs import TINY_OWN, compose_values, tiny_config

STAGE = {
    "max_steps": 4, "batch_size": 2,
    "optim": {"_target_": "torch.optim.SGD", "lr": 0.1, "weight_decay": 0.0, "arguments": {}, "schedule": "constant",
              "warmup_steps": 0, "decay_share": 0.2, "clip_norm": None},
}  # fmt: skip


@pytest.fixture
def module() -> ClipModule:
    module = ClipModule(tiny.clip(), tiny.tokenizer(), 12, ClipStage.model_validate(STAGE), seed=0)
    module.trainer = SimpleNamespace(world_size=1)
    return module


@pytest.fixture
def batch() -> dict:
    image = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return {"image": image, "caption": list(tiny.CAPTIONS)}


def test_the_loss_is_that_of_the_paper_by_hand(module, batch):
    losses = module.losses(*module.embed(batch))
    ids = tokenize(tiny.tokenizer(), batch["caption"], 12)
    text, image = module.network.encode_text(ids), module.network.encode_image(batch["image"])
    scale = math.exp(module.network.logit_scale.item())
    logits = [[scale * float(F.cosine_similarity(i, t, dim=0).detach()) for t in text] for i in image]

    def cross_entropy(row: list[float], own: int) -> float:
        return -row[own] + math.log(sum(math.exp(value) for value in row))

    columns = [list(column) for column in zip(*logits, strict=True)]
    by_picture = sum(cross_entropy(logits[i], i) for i in range(3)) / 3
    by_caption = sum(cross_entropy(columns[i], i) for i in range(3)) / 3
    assert losses["loss"].item() == pytest.approx((by_picture + by_caption) / 2, rel=1e-4)
    recall = sum(max(range(3), key=lambda j: logits[i][j]) == i for i in range(3)) / 3
    assert losses["recall"].item() == pytest.approx(recall)


def test_the_gradient_reaches_every_parameter(module, batch):
    module.losses(*module.embed(batch))["loss"].backward()
    for name, parameter in module.network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if (
            not name.startswith("text_model.embeddings") and "k_proj.bias" not in name
        ):  # a shift of all keys does nothing
            assert parameter.grad.abs().sum() > 0, name


def test_a_batch_of_equals_cannot_be_told_apart(module, batch):
    same = {"image": batch["image"][:1].expand(3, -1, -1, -1), "caption": ["a red circle"] * 3}
    assert module.losses(*module.embed(same))["loss"].item() == pytest.approx(math.log(3), abs=1e-4)


def rows(run_dir: Path, metric: str) -> list[float]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [float(value) for name, _, value, _ in csv.reader(file) if name == metric]


@pytest.mark.parametrize(("before", "after"), [(9.0, math.log(100)), (3.0, 3.0)])
def test_the_temperature_stays_below_its_bound(module, before, after, monkeypatch):
    def step(self, *args, **kwargs):
        self.network.logit_scale.data.fill_(before)

    monkeypatch.setattr(StageModule, "optimizer_step", step)
    module.optimizer_step()
    assert module.network.logit_scale.item() == pytest.approx(after, abs=1e-3)


def test_training_teaches_which_caption_is_whose(tmp_path):
    config = tiny_config(
        tmp_path, "stages=[clip]", "clip.max_steps=120", "clip.optim.lr=5e-3", "trainer.val_every=40",
        "data.num_train=400", "data.num_val=32", "clip.batch_size=32",
    )  # fmt: skip
    stages.run(config)
    run = Path(config.run_dir)
    loss, *recalls = (rows(run, f"clip/val_{name}") for name in ("loss", "image_to_text@1", "text_to_image@1"))
    assert loss[-1] < math.log(32) - 0.3 and all(len(recall) == 3 and recall[-1] > 2 / 32 for recall in recalls)


def captioned(folder: Path) -> list[str]:
    """Write pictures of which several share a caption and some have two; return the overrides that name them."""
    folder.mkdir()
    rng, lines = np.random.default_rng(0), []
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
        text = f"thing {i % 7} of many"
        told = [text, f"also called {i}"] if i % 2 else text
        lines.append(json.dumps({"file_name": f"{i:02d}.png", "text": told}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return [*TINY_OWN, "data=folder", f"data.path={folder}", "data.num_val=12"]


def test_validation_measures_retrieval_as_evaluation_does(tmp_path):
    """Over all held-out pictures that were seen and all their captions, not batch by batch: 5, 5 and 2 of 12."""
    overrides = captioned(tmp_path / "set")
    overrides += ["clip.max_steps=30", "clip.optim.lr=1e-2", "clip.batch_size=5", "trainer.val_every=30",
                  "trainer.val_batches=10", f"output_dir={tmp_path}/out", "name=all"]  # fmt: skip
    config = check(TrainConfig, compose_values("train", overrides))
    stages.run(config)
    found = evaluate(compose_values("evaluate", [f"ckpt={config.run_dir}", "metrics=[retrieval]", "num_prompts=4"]))
    theirs = found["retrieval"]
    assert theirs["num_images"] == 12 and theirs["num_captions"] > 7
    for name in ("image_to_text@1", "image_to_text@5", "text_to_image@1", "text_to_image@5"):
        [ours] = rows(Path(config.run_dir), f"clip/val_{name}")
        assert ours == pytest.approx(theirs[name]), name
    assert 0 < theirs["image_to_text@1"] < theirs["image_to_text@5"] <= 1


def test_the_result_has_both_towers_the_text_encoder_alone_and_the_tokenizer(finished):
    place = stages.result_folder(finished, "clip")
    assert {path.name for path in place.iterdir()} == {"clip", "text_encoder", "tokenizer", "stage.json"}
    clip, text = load_network(CLIP, place / "clip"), load_network(TextTower, place / "text_encoder")
    for name, tensor in text.state_dict().items():
        assert torch.equal(tensor, clip.state_dict()[f"text_model.{name}"])
    tokenizer = load_tokenizer(place / "tokenizer")
    conditioner = Conditioner(tokenizer, text)
    assert conditioner.max_length == 20 and len(tokenizer) <= 600
    assert conditioner(["a red circle"]).shape == (1, 20, 16)
    state = torch.load(fit.checkpoint_path(finished, "clip"), weights_only=True)["state_dict"]
    assert all(torch.equal(state[f"network.{name}"], tensor) for name, tensor in clip.state_dict().items())


def test_the_vocabulary_is_a_function_of_the_captions(finished, tmp_path):
    """A resumed run trains it again: the same ids must come out."""
    captions = [text for texts in open_sources(finished.data)[0].captions() for text in texts]
    first, second = (train_tokenizer(captions, 600, 20) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    saved = load_tokenizer(stages.result_folder(finished, "clip") / "tokenizer")
    assert saved.get_vocab() == first.get_vocab()
    assert tokenize(saved, captions[:20], 20).equal(tokenize(first, captions[:20], 20))


def test_transformers_opens_the_text_encoder(finished):
    from transformers import CLIPTextModel

    place = stages.result_folder(finished, "clip")
    theirs, ours = (
        CLIPTextModel.from_pretrained(place / "text_encoder"),
        load_network(TextTower, place / "text_encoder"),
    )
    ids = tokenize(load_tokenizer(place / "tokenizer"), ["a large red circle", ""], 20)
    with torch.inference_mode():
        torch.testing.assert_close(theirs.eval()(ids).last_hidden_state, ours(ids)[0], rtol=1e-4, atol=1e-4)
