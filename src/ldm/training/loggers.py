"""Where figures go: `metrics.csv`, readable at any moment, and Weights & Biases."""

import csv
import io
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from ldm.errors import UserError
from ldm.files import file_written_atomically
from ldm.redact import redacted


class MetricsCSV(Logger):
    """Append (metric, step, value, seconds) rows to `metrics.csv`.

    Long form, because metrics come and go between stages: a new one never rewrites old rows, and a resumed run adds
    to what is there. Rows of steps that a resumed run will do again are dropped when it starts.

    Args:
        folder: the run directory.
    """

    COLUMNS = ("metric", "step", "value", "unix_time")

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run directory's config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if not file.tell():
                writer.writerow(self.COLUMNS)
            now = round(time.time(), 1)
            for metric, value in metrics.items():
                if metric != "epoch":  # batches are endless, see ldm.data.datamodule
                    writer.writerow([metric, step, f"{value:.6g}", now])

    @rank_zero_only
    def drop_from(self, prefix: str, step: int) -> None:
        """Forget rows at and after a step, before it is done again.

        Args:
            prefix: of their metrics, such as `diffusion/`.
            step: as it stands in the rows.
        """
        if not self.path.exists():
            return
        with self.path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if len(row) == len(self.COLUMNS)]  # less: cut short by a crash
        kept = [row for row in rows[1:] if not (row[0].startswith(prefix) and int(row[1]) >= step)]
        text = io.StringIO(newline="")
        csv.writer(text).writerows([self.COLUMNS, *kept])
        with file_written_atomically(self.path) as out:
            out.write(text.getvalue().encode())


def drop_rows(trainer: pl.Trainer, prefix: str, step: int) -> None:
    """Let every logger of files forget what is done again, see `MetricsCSV.drop_from`."""
    for logger in trainer.loggers:
        if isinstance(logger, MetricsCSV):
            logger.drop_from(prefix, step)


def wandb_logger(folder: str, offline: bool = False, **options: Any) -> WandbLogger:
    """Log to Weights & Biases; a run directory is one run there, which all its stages and resumptions add to.

    Args:
        folder: the run directory. The run's id is drawn once and kept in it: names are shared by people and machines.
        offline: log to disk only, for `wandb sync`.
        options: of `wandb.init` (project, group, tags, ...).

    Raises:
        UserError: nobody is logged in, or the server cannot be reached.
    """
    import wandb

    path = Path(folder) / "wandb-id.txt"
    if getattr(rank_zero_only, "rank", 0) == 0 and not path.exists():
        path.write_text(uuid.uuid4().hex[:8] + "\n", encoding="utf-8")
    run_id = path.read_text(encoding="utf-8").strip() if path.exists() else None
    logger = WandbLogger(name=Path(folder).name, id=run_id, save_dir=folder, offline=offline, **options)
    typed = sys.argv
    try:
        sys.argv = redacted(typed)  # which wandb keeps
        logger.experiment  # noqa: B018 opens the run now, on the first rank, and not when the data are ready
    except wandb.Error as error:
        raise UserError(f"wandb: {error} Log in (wandb login), or log to disk (logger.wandb.offline=true)") from error
    finally:
        sys.argv = typed
    return logger
