"""Distances against closed forms, naive sums, and torch-fidelity's own command on a small feature network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.evaluation.distances import cmmd, frechet_distance, frechet_metric, kernel_distance


def normals(num: int, mean: Tensor, deviations: Tensor, seed: int) -> Tensor:
    """Draw features whose sample mean and covariance are exactly these."""
    x = torch.randn(num, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = x - x.mean(0)
    whitener = torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (num - 1)))
    return x @ whitener.T * deviations + mean


def test_frechet_distance_of_two_normal_distributions():
    """Eq. 6 for diagonal covariances: ‖μ_1 - μ_2‖² + Σ (s_1 - s_2)²."""
    means = torch.tensor([[0.0, 1.0, -2.0], [0.5, 1.0, 1.0]], dtype=torch.float64)
    deviations = torch.tensor([[1.0, 2.0, 0.5], [1.5, 0.25, 0.5]], dtype=torch.float64)
    real, drawn = (normals(50 + 9 * i, means[i], deviations[i], i) for i in (0, 1))
    expected = float((means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum())
    assert frechet_distance(real, drawn) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-6)


def on_a_rank(rank: int, meeting: str, real: Tensor, drawn: Tensor) -> None:
    torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2)
    metric = frechet_metric(real.shape[1])
    for _ in range(2):  # the second time anew
        metric.reset()
        metric.update(real[rank::2], real=True)
        metric.update(drawn[rank::2], real=False)
        found = float(metric.compute())
    Path(f"{meeting}-{rank}").write_text(str(found))
    if rank == 0:  # as in training, where the first rank alone measures what was drawn
        Path(f"{meeting}-alone").write_text(f"{frechet_distance(real, drawn)} {kernel_distance(real, drawn)[0]}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_frechet_distance_is_summed_over_ranks(tmp_path):
    real, drawn = (torch.randn(21, 5, generator=torch.Generator().manual_seed(i)).double() + i for i in (0, 1))
    context = torch.multiprocessing.get_context("fork")
    meeting = str(tmp_path / "meeting")
    ranks = [context.Process(target=on_a_rank, args=(rank, meeting, real, drawn)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    for rank in range(2):
        found = float(Path(f"{meeting}-{rank}").read_text())
        assert found == pytest.approx(frechet_distance(real, drawn), rel=1e-6)
    alone = [float(word) for word in Path(f"{meeting}-alone").read_text().split()]
    assert alone == pytest.approx([frechet_distance(real, drawn), kernel_distance(real, drawn)[0]])


def test_kernel_distance_is_the_unbiased_sum():
    real, drawn = (torch.randn(12, 5, generator=torch.Generator().manual_seed(i)).double() + i for i in (0, 1))

    def kernel(x: Tensor, y: Tensor) -> float:
        return float((x @ y / 5 + 1) ** 3)

    own = sum(kernel(s[i], s[j]) for s in (real, drawn) for i in range(12) for j in range(12) if i != j) / (12 * 11)
    cross = sum(kernel(x, y) for x in real for y in drawn) / 144
    assert kernel_distance(real, drawn) == pytest.approx((own - 2 * cross, 0.0))


def test_kernel_distance_over_subsets_is_a_function_of_the_seed():
    real, drawn = (torch.randn(40, 4, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    state = torch.get_rng_state()
    once, again, other = (kernel_distance(real, drawn, 7, 20, seed) for seed in (3, 3, 4))
    assert once == again != other and once[1] > 0
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's draws are moved


def test_cmmd_is_the_papers_unbiased_sum():
    real, drawn = (torch.randn(6 + i, 4, generator=torch.Generator().manual_seed(i)) * (3 + i) for i in (0, 1))

    def kernel(x: Tensor, y: Tensor) -> float:
        return float(torch.exp(-(x / x.norm() - y / y.norm()).square().sum() / 200))

    def within(s: Tensor) -> float:
        return sum(kernel(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j) / (len(s) ** 2 - len(s))

    cross = sum(kernel(x, y) for x in real for y in drawn) / (len(real) * len(drawn))
    assert cmmd(real, drawn) == pytest.approx(1000 * (within(real) + within(drawn) - 2 * cross), abs=1e-3)


def test_cmmd_is_zero_on_average_and_sees_a_shift():
    def draw(seed: int) -> Tensor:
        return torch.randn(64, 8, generator=torch.Generator().manual_seed(seed)) + torch.eye(8)[0]

    same = np.mean([cmmd(draw(i), draw(1000 + i)) for i in range(40)])
    shifted = cmmd(draw(0), draw(1) + torch.eye(8)[1])
    assert abs(same) < 0.05 < 0.5 < shifted
    assert cmmd(draw(0), draw(1)) == pytest.approx(cmmd(5 * draw(0), 0.1 * draw(1)), abs=1e-6)


SMALL = """
import torch
from torch_fidelity import FeatureExtractorBase, register_feature_extractor

WEIGHT = torch.randn(6, 3 * 8 * 8, generator=torch.Generator().manual_seed(0))


class Small(FeatureExtractorBase):
    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list():
        return ("small",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "small"

    @staticmethod
    def can_be_compiled():
        return False

    def forward(self, x):
        return ((x.flatten(1).float() / 255) @ WEIGHT.T,)


register_feature_extractor("small", Small)
"""


def test_torch_fidelity_s_command_says_the_same(tmp_path):
    """`fidelity` as typed, on two folders of PNGs, with a network of 6 features that Python brings as it starts."""
    (tmp_path / "sitecustomize.py").write_text(SMALL)
    weight = torch.randn(6, 3 * 8 * 8, generator=torch.Generator().manual_seed(0))
    rng = np.random.default_rng(0)
    sets = []
    for name, low in (("real", 0), ("drawn", 60)):
        (tmp_path / name).mkdir()
        pictures = rng.integers(low, 256, (30, 8, 8, 3), dtype=np.uint8)
        for i, picture in enumerate(pictures):
            Image.fromarray(picture).save(tmp_path / name / f"{i:02d}.png")
        sets.append(torch.from_numpy(pictures).movedim(-1, 1).flatten(1).float() / 255 @ weight.T)
    command = (
        "--input1 real --input2 drawn --feature-extractor small --cpu --fid --kid --kid-subset-size 30 --kid-subsets 1 "
        "--no-cache --save-cpu-ram --json"
    )
    done = subprocess.run(
        [Path(sys.executable).with_name("fidelity"), *command.split()], cwd=tmp_path, text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout)
    assert frechet_distance(*sets) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert kernel_distance(*sets)[0] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
