"""CLIP score and retrieval against their definitions, and CLIP's eye against transformers' own processor and model."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tiny
from ldm.errors import UserError
from ldm.evaluation.clip_score import clip_score, recall
from ldm.evaluation.features import ClipFeatures
from ldm.weights.folder import save_network

CPU = torch.device("cpu")


def test_clip_score_is_100_times_the_cosine_and_never_negative():
    images = torch.tensor([[1.0, 0.0], [3.0, 4.0], [1.0, 0.0]])
    texts = torch.tensor([[5.0, 0.0], [1.0, 0.0], [-2.0, 0.0]])
    assert clip_score(images, texts) == pytest.approx(100 * (1 + 0.6 + 0) / 3)


def test_recall_counts_any_of_the_right_ones_among_the_nearest():
    """Three pictures, four captions; the first picture owns two captions, the last two share one."""
    owns = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]).bool()
    texts = torch.eye(4)
    images = torch.tensor([[0.1, 0.9, 0.3, 0.2], [0.9, 0.5, 0.4, 0.0], [0.0, 0.0, 0.9, 0.8]])
    found = recall(images, texts, owns, ranks=(1, 2, 3))
    # pictures: 0 finds caption 1 at once; 1 finds caption 2 as the third; 2 at once
    assert [found[f"image_to_text@{k}"] for k in (1, 2, 3)] == pytest.approx([2 / 3, 2 / 3, 1])
    # captions: 0 is nearest to picture 1, then 0; 1 and 2 and 3 find their own at once
    assert [found[f"text_to_image@{k}"] for k in (1, 2, 3)] == pytest.approx([3 / 4, 1, 1])


def test_recall_of_one_of_many_is_chance_for_noise():
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(400, 16, generator=generator) for _ in range(2))
    found = recall(images, texts, torch.eye(400).bool())
    assert all(value < 0.04 for value in found.values())
    assert all(value == 1 for value in recall(images, images, torch.eye(400).bool()).values())


def clip_folder(folder, ours=False, **preprocessor):
    save_network(tiny.clip(), folder)
    tiny.tokenizer().save_pretrained(folder.parent if ours else folder)
    if ours:
        (folder.parent / "stage.json").write_text("{}")
    if preprocessor:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


@pytest.fixture
def pictures():
    return np.random.default_rng(0).integers(0, 256, (3, 24, 24, 3), dtype=np.uint8)


@pytest.mark.parametrize("told", [{}, {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}])
def test_transformers_sees_and_reads_the_same(told, pictures, tmp_path):
    from PIL import Image
    from transformers import CLIPImageProcessor, CLIPModel

    folder = clip_folder(tmp_path / "clip", **told)
    model = CLIPModel.from_pretrained(folder).eval()
    size = {"height": 16, "width": 16}
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size, **told)
    pixel_values = processor([Image.fromarray(each) for each in pictures], return_tensors="pt")["pixel_values"]
    ours = ClipFeatures(str(folder), CPU)
    ids = ours.tokenizer(list(tiny.CAPTIONS), padding="max_length", max_length=12, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        theirs = model(pixel_values=pixel_values, input_ids=ids["input_ids"])
    assert torch.allclose(F.normalize(ours.images(pictures), dim=1), theirs.image_embeds, atol=2e-2)  # pixels rounded
    assert torch.allclose(F.normalize(ours.texts(tiny.CAPTIONS), dim=1), theirs.text_embeds, atol=1e-5)
    exact = pictures[:, :16, :16]
    assert torch.allclose(
        ours.images(exact),
        ours.clip.encode_image((torch.from_numpy(exact).movedim(-1, 1) / 255 - ours.mean) / ours.std),
        atol=1e-6,
    )


def test_a_clip_of_our_own_training_sees_pictures_from_minus_one_to_one(pictures, tmp_path):
    """Found by its stage's folder, and by the folder inside."""
    folder = clip_folder(tmp_path / "clip-123" / "clip", ours=True)
    image = torch.from_numpy(pictures[:, :16, :16]).movedim(-1, 1).float() / 127.5 - 1
    with torch.inference_mode():
        expected = tiny.clip().encode_image(image)
    for source in (folder, folder.parent):
        found = ClipFeatures(str(source), CPU)
        assert torch.allclose(found.images(pictures[:, :16, :16]), expected, atol=1e-5)
        assert len(found.texts(["a red circle"] * 3, batch_size=2)) == 3


def test_what_is_no_clip_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"clip=.*nowhere: there is no such folder"):
        ClipFeatures(str(tmp_path / "nowhere"), CPU)
    save_network(tiny.text_tower(), tmp_path / "tower")
    with pytest.raises(UserError, match="holds a clip_text_model; a clip must be a clip"):
        ClipFeatures(str(tmp_path / "tower"), CPU)
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="is a file: name a folder"):
        ClipFeatures(str(tmp_path / "a.safetensors"), CPU)
    folder = clip_folder(tmp_path / "clip", image_mean=[0.5], image_std=0)
    with pytest.raises(UserError, match="must be three numbers each"):
        ClipFeatures(str(folder), CPU)
