"""`metrics.csv`: one row a figure, appended as training goes, readable at any moment."""

import csv
import time
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only


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
        fresh = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(self.COLUMNS)
            now = round(time.time(), 1)
            for metric, value in metrics.items():
                if metric != "epoch":  # batches are endless, see ldm.data.datamodule
                    writer.writerow([metric, step, f"{value:.6g}", now])

    @rank_zero_only
    def drop_from(self, stage: str, step: int) -> None:
        """Forget a stage's rows at and after a step, before that step is trained again."""
        if not self.path.exists():
            return
        with self.path.open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        kept = [row for row in rows if not row[0].startswith(f"{stage}/") or int(row[1]) < step]
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *kept])
        temporary.replace(self.path)
