"""A run of all stages that tests of training share, and one that takes some more steps."""

from pathlib import Path

import pytest

from ldm.config import TrainConfig
from ldm.training import stages
from runs import tiny_config


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> TrainConfig:
    """The config of a tiny run whose stages are all done. Read it, do not write into it."""
    config = tiny_config(tmp_path_factory.mktemp("finished"))
    stages.run(config, ["experiment=shapes"])
    return config


@pytest.fixture(scope="session")
def run_dir(finished) -> Path:
    return Path(finished.run_dir)
