"""A planted copy is found, new pictures are not taken for copies, and the threshold is what it says."""

import torch

from ldm.evaluation.memorization import SIDE, _flat, copies, nearest


def test_nearest_is_the_nearest_of_all_parts():
    generator = torch.Generator().manual_seed(0)
    queries, train = (torch.randn(num, 7, generator=generator) for num in (9, 50))
    expected = torch.cdist(queries.double(), train.double())
    distance, number = nearest(queries, train.split(13))
    assert torch.equal(number, expected.argmin(1))
    assert torch.allclose(distance, expected.min(1).values, atol=1e-6)


def test_a_copy_among_many_lies_at_no_distance():
    """Where a square of a difference from three products would be off by some 1e-3."""
    train = 100 + torch.rand(40, 300, generator=torch.Generator().manual_seed(0))
    distance, number = nearest(train[[17, 3]], train.split(8))
    assert number.tolist() == [17, 3] and distance.max() == 0


def test_planted_copies_are_counted_and_new_pictures_are_not():
    generator = torch.Generator().manual_seed(0)
    train, held_out, new = (torch.rand(num, 20, generator=generator) for num in (500, 200, 90))
    drawn = torch.cat([new, train[:10] + 1e-3])  # ten of a hundred
    is_copy, threshold = copies(*(nearest(each, train.split(100))[0] for each in (drawn, held_out)))
    assert is_copy[90:].all() and is_copy[:90].float().mean() <= 0.05 and threshold > 0.1


def test_the_threshold_is_the_hundredth_part_of_the_held_out():
    held_out = torch.arange(1.0, 1001.0)
    is_copy, threshold = copies(torch.tensor([9.0, 10.0, 11.0, 12.0]), held_out)
    assert threshold == 10 and is_copy.tolist() == [True, True, False, False]
    # Held-out pictures that are in the training set too leave nothing but exact copies to find.
    assert copies(torch.tensor([0.0, 0.1]), torch.zeros(5))[0].tolist() == [True, False]


def test_pixel_distance_is_the_root_mean_square_of_the_range():
    import numpy as np

    black, grey = (np.full((1, 8, 8, 3), value, np.uint8) for value in (0, 51))
    assert torch.allclose((_flat(black) - _flat(grey)).norm(), torch.tensor(0.2))
    large = np.full((1, 200, 200, 3), 51, np.uint8)
    assert _flat(large).shape == (1, 3 * SIDE**2) and torch.allclose(_flat(large).norm(), torch.tensor(0.2))
