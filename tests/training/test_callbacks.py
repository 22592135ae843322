import io
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.training import stages
from ldm.training.callbacks import Progress, SampleGrid
from runs import tiny_config

# ---------------------------------------------------------------------------------------------------------- pictures


def test_grids_come_when_they_are_due_and_at_the_end(finished):
    config = tiny_config(
        finished.output_dir, "stages=[diffusion]", "name=grids", "callbacks.samples.every=2", "trainer.max_steps=5",
        "trainer.accumulate_grad_batches=2",
    )  # fmt: skip
    stages.run(config)
    folder = Path(config.run_dir) / "samples" / "diffusion"
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{step:06d}.png" for step in (2, 4, 5)]
    pictures = [np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]
    assert len({picture.shape for picture in pictures}) == 1
    assert not np.array_equal(pictures[0], pictures[-1])


def test_the_last_grid_is_not_drawn_twice(finished, monkeypatch):
    drawn = []
    real = SampleGrid._save
    monkeypatch.setattr(
        SampleGrid,
        "_save",
        lambda self, trainer, module: (drawn.append(trainer.global_step), real(self, trainer, module)),
    )
    overrides = ["stages=[diffusion]", "name=twice", "callbacks.samples.every=2", "trainer.max_steps=4"]
    stages.run(tiny_config(finished.output_dir, *overrides))
    assert drawn == [2, 4]


def test_a_stage_that_shows_nothing_has_no_grid(run_dir):
    assert {path.name for path in (run_dir / "samples").iterdir()} == {"autoencoder", "diffusion"}


def test_the_grid_of_the_vae_has_pictures_beside_reconstructions(run_dir):
    [path] = (run_dir / "samples" / "autoencoder").iterdir()
    picture = np.asarray(Image.open(path))
    assert picture.shape[1] >= 2 * 128  # two of 16 px, enlarged eight times
    left, right = picture[4 : 4 + 128, 4 : 4 + 128], picture[4 : 4 + 128, 4 + 132 : 4 + 132 + 128]
    assert np.array_equal(left[:8, :8], np.broadcast_to(left[0, 0], (8, 8, 3)))  # one source pixel
    assert left.std() > 5 and not np.array_equal(left, right)


def test_pictures_go_to_loggers_that_take_them(tmp_path):
    taken = []
    wandb = SimpleNamespace(log_image=lambda key, images, step: taken.append((key, images[0].shape, step)))
    trainer = SimpleNamespace(
        global_step=3, is_global_zero=True, default_root_dir=str(tmp_path), loggers=[wandb, object()]
    )
    average, network = torch.nn.Dropout().train(), torch.nn.Dropout().train()
    drawn = []

    def preview(with_what, num):
        drawn.append((with_what, with_what.training))
        return torch.zeros(num, 3, 16, 16), ["a"] * num

    module = SimpleNamespace(
        stage="diffusion", preview=preview, evaluated=average, network=network, ema=SimpleNamespace(average=average),
        whole=lambda given: given,
    )  # fmt: skip
    SampleGrid(every=1, num_images=4, raw=True)._save(trainer, module)
    assert drawn == [(average, False), (network, False)] and network.training
    assert [(key, shape[2], step) for key, shape, step in taken] == [
        ("diffusion/samples", 3, 3), ("diffusion/samples_raw", 3, 3),
    ]  # fmt: skip
    names = {path.name for path in (tmp_path / "samples" / "diffusion").iterdir()}
    assert names == {"step-000003.png", "step-000003_raw.png"}


def test_only_the_first_process_draws(tmp_path):
    trainer = SimpleNamespace(global_step=3, is_global_zero=False, default_root_dir=str(tmp_path), loggers=[])
    asked = []  # all put together what is cut up
    module = SimpleNamespace(
        stage="diffusion", preview=lambda *_: pytest.fail("drawn"), evaluated="average", whole=asked.append
    )
    SampleGrid(every=1, num_images=4)._save(trainer, module)
    assert asked == ["average"]


# ---------------------------------------------------------------------------------------------------------- progress


def trainer_at(step: int, max_steps: int = 100, world_size: int = 1):
    return SimpleNamespace(global_step=step, max_steps=max_steps, world_size=world_size)


@pytest.fixture
def progress(monkeypatch):
    """A Progress at a clock that the test moves, where there is no terminal."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("ldm.training.callbacks.time.monotonic", lambda: clock.now)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    progress = Progress(every=10.0)
    monkeypatch.setattr(progress, "get_metrics", lambda trainer, module: {"v_num": "x", "diffusion/loss": 0.5})
    progress.clock = clock
    return progress


def test_a_line_now_and_then_with_speed_and_time_left(progress, capsys):
    module, batch = SimpleNamespace(stage="diffusion"), {"image": torch.zeros(8, 3, 4, 4), "caption": ["a"] * 8}
    progress.on_train_start(trainer_at(20), module)  # goes on from step 20
    for step in range(21, 41):
        progress.clock.now += 1.0
        progress.on_train_batch_end(trainer_at(step), module, None, batch, 0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert re.sub(" +", " ", lines[0]) == " diffusion 30/100 8 images/s loss 0.5 70 s left"
    assert "40/100" in lines[1] and lines[1].endswith("60 s left")


def test_the_last_step_always_has_its_line(progress, capsys):
    module, batch = SimpleNamespace(stage="clip"), {"moments": torch.zeros(4, 1)}
    progress.on_train_start(trainer_at(0, 1), module)
    progress.clock.now += 0.1
    progress.on_train_batch_end(trainer_at(1, 1, world_size=2), module, None, batch, 0)
    assert "1/1  80 images/s" in capsys.readouterr().out.replace("   ", "")


def test_other_ranks_are_silent(progress, capsys):
    progress.disable()
    module, batch = SimpleNamespace(stage="clip"), {"moments": torch.zeros(4, 1)}
    progress.on_train_start(trainer_at(0, 1), module)
    progress.clock.now += 100
    progress.on_train_batch_end(trainer_at(1, 1), module, None, batch, 0)
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_bar_that_ends_with_the_training(progress, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", Terminal())
    module, batch = SimpleNamespace(stage="clip"), {"moments": torch.zeros(4, 1)}
    for end in (lambda: progress.on_train_end(None, None), lambda: progress.on_exception(None, None, ValueError())):
        progress.on_train_start(trainer_at(0), module)
        progress.clock.now += 1
        progress.on_train_batch_end(trainer_at(50), module, None, batch, 0)
        assert progress._bar.tasks[0].completed == 50 and progress._bar.tasks[0].total == 100
        assert (
            "images/s" in progress._bar.tasks[0].fields["note"] and "loss 0.5" in progress._bar.tasks[0].fields["note"]
        )
        end()
        assert progress._bar is None


def test_a_run_without_progress_is_silent(finished, capsys):
    stages.run(tiny_config(finished.output_dir, "stages=[diffusion]", "name=silent", "~callbacks.progress"))
    assert "images/s" not in capsys.readouterr().out
