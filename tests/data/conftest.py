import pytest
import torch

from caches import SHARD_ROWS, Counting
from ldm.data import cache_layout


@pytest.fixture
def small_shards(monkeypatch):
    """Let a cache of a few pictures have several shards, and encode as the processes of other tests do."""
    monkeypatch.setattr(cache_layout, "SHARD_ROWS", SHARD_ROWS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def counting():
    return Counting()
