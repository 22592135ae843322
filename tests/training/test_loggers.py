import csv
import time
from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.training import stages
from ldm.training.loggers import MetricsCSV, wandb_logger
from runs import tiny_config


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@pytest.fixture
def logger(tmp_path) -> MetricsCSV:
    return MetricsCSV(str(tmp_path))


# -------------------------------------------------------------------------------------------------------- metrics.csv


def test_a_row_a_figure(logger):
    logger.log_metrics({"a/loss": 0.123456789, "epoch": 3}, step=5)
    logger.log_metrics({"a/loss": 1e-9, "b/val_loss": float("nan")}, step=6)
    header, *found = rows(logger.path)
    assert header == ["metric", "step", "value", "unix_time"]
    assert [row[:3] for row in found] == [
        ["a/loss", "5", "0.123457"],
        ["a/loss", "6", "1e-09"],
        ["b/val_loss", "6", "nan"],
    ]
    assert all(float(row[3]) > 1.7e9 for row in found)


def test_another_logger_adds_to_what_is_there(logger, tmp_path):
    logger.log_metrics({"a/loss": 1.0}, step=0)
    MetricsCSV(str(tmp_path)).log_metrics({"b/loss": 2.0}, step=0)
    assert [row[0] for row in rows(logger.path)] == ["metric", "a/loss", "b/loss"]


def test_rows_that_will_be_trained_again_are_dropped(logger):
    for step in range(10):
        logger.log_metrics({"a/loss": 1.0, "a/val_loss": 1.0, "ab/loss": 1.0}, step=step)
    logger.drop_from("a/", 4)
    found = rows(logger.path)[1:]
    assert [int(row[1]) for row in found if row[0] == "a/loss"] == [0, 1, 2, 3]
    assert [int(row[1]) for row in found if row[0] == "a/val_loss"] == [0, 1, 2, 3]
    assert [int(row[1]) for row in found if row[0] == "ab/loss"] == list(range(10))
    assert [path.name for path in logger.path.parent.iterdir()] == ["metrics.csv"]
    logger.log_metrics({"a/loss": 1.0}, step=4)
    logger.drop_from("a/", 0)
    assert not [row for row in rows(logger.path) if row[0].startswith("a/")]


def test_figures_are_whole_while_rows_are_dropped(logger, monkeypatch):
    logger.log_metrics({"a/loss": 1.0}, step=3)
    before = logger.path.read_bytes()

    def killed(old, new):
        assert Path(old).name.startswith(".") and Path(old).name.endswith(".tmp")  # so that the next start removes it
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        logger.drop_from("a/", 0)
    assert logger.path.read_bytes() == before
    assert [path.name for path in logger.path.parent.iterdir()] == ["metrics.csv"]


def test_dropping_where_there_is_nothing(logger):
    logger.drop_from("a/", 0)
    assert not logger.path.exists()


@pytest.mark.parametrize(
    "rest",
    ["", "metric,step", "metric,step,value,unix_time\na/loss,1,0.5,1\na/lo", "metric,step,value,unix_time\na/loss,1"],
)
def test_a_file_that_a_crash_cut_short(logger, rest):
    logger.path.write_text(rest)
    logger.drop_from("a/", 5)
    logger.log_metrics({"a/loss": 2.0}, step=5)
    found = rows(logger.path)
    assert found[0] == list(MetricsCSV.COLUMNS)
    assert [row[:2] for row in found[1:]] == [["a/loss", "1"]] * rest.count("0.5") + [["a/loss", "5"]]


def test_a_run_logs_each_stage_under_its_name(run_dir):
    found = {row[0] for row in rows(run_dir / "metrics.csv")[1:]}
    assert {name.split("/")[0] for name in found} == {"autoencoder", "clip", "diffusion"}
    assert {"autoencoder/loss", "autoencoder/kl", "autoencoder/val_psnr", "clip/recall", "clip/val_loss"} <= found
    assert {"diffusion/loss", "diffusion/val_loss"} <= found


def test_tensorboard_has_the_same_figures_and_the_pictures(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars, images = {}, set()
    for path in (run_dir / "tensorboard").glob("events.*"):
        events = EventAccumulator(str(path))
        events.Reload()
        images |= set(events.Tags()["images"])
        for tag in events.Tags()["scalars"]:
            scalars[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    assert images == {"autoencoder/samples", "diffusion/samples"}
    for metric, step, value, _ in rows(run_dir / "metrics.csv")[1:]:
        assert any(
            at == int(step) and abs(figure - float(value)) < 1e-4 * max(1, abs(figure))
            for at, figure in scalars[metric]
        )


# ------------------------------------------------------------------------------------------------------------- wandb


@pytest.fixture
def no_wandb_settings(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home"))
    yield
    import wandb

    wandb.finish()
    wandb.teardown()


def test_wandb_writes_an_offline_run(no_wandb_settings, finished, tmp_path, capfd):
    overrides = ["stages=[diffusion]", "name=online", "logger=wandb", "logger.wandb.offline=true"]
    config = tiny_config(finished.output_dir, *overrides)
    stages.run(config)
    run_dir = Path(config.run_dir)
    run_id = (run_dir / "wandb-id.txt").read_text().strip()
    [offline] = (run_dir / "wandb").glob("offline-run-*")
    assert offline.name.endswith(run_id)
    [record] = offline.glob("*.wandb")
    deadline = time.monotonic() + 30
    while b"diffusion/val_loss" not in (content := record.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.1)  # a process of wandb's own writes it, and has been seen to be late on a busy machine
    assert b"diffusion/val_loss" in content and b"diffusion/loss" in content
    assert list(offline.glob("files/media/images/diffusion/samples_*.png"))
    assert (run_dir / "metrics.csv").is_file() and list((run_dir / "tensorboard").iterdir())
    import wandb

    assert wandb.run is None  # finished: the next job of a sweep is a run of its own


def test_a_run_directory_is_one_wandb_run_and_another_is_another(no_wandb_settings, tmp_path):
    ids = []
    for name in ("a", "a", "b"):
        (tmp_path / name).mkdir(exist_ok=True)
        logger = wandb_logger(str(tmp_path / name), offline=True, project="ldm")
        ids.append(logger.version)
        assert logger.experiment.name == name
        import wandb

        wandb.finish()
    assert ids[0] == ids[1] != ids[2] and len(ids[0]) == 8


def test_nobody_logged_in_is_a_user_error_before_anything_is_trained(no_wandb_settings, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    config = tiny_config(tmp_path / "out", "logger=wandb", "stages=[clip]")
    with pytest.raises(UserError, match=r"wandb: .*logger\.wandb\.offline=true"):
        stages.run(config)
    assert not (tmp_path / "out").exists()
