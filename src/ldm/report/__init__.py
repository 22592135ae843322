"""The report of a run: one HTML page with its figures, curves, pictures and settings, which needs nothing beside it.

Made from what lies in the run directory, at the end of `train.py` and of `evaluate.py`, and at any time by
`python -m ldm.report RUN_DIR`. Nothing here imports torch.
"""

from pathlib import Path

from ldm.errors import UserError


def write_report(run_dir: Path) -> Path:
    """Write `report/index.html` into a run directory, whole or not at all.

    What is missing or damaged among the run's files is said on the page, in its place.

    Args:
        run_dir: of a finished run, or of one that is going on.

    Returns:
        The page.

    Raises:
        UserError: the folder is no run, or cannot be written into.
    """
    from ldm.files import file_written_atomically
    from ldm.report.page import make_page

    if not any((run_dir / name).is_file() for name in ("config.yaml", "metrics.csv")):
        raise UserError(
            f"{run_dir} is no run directory: it has neither config.yaml nor metrics.csv; name the folder that "
            "train.py wrote, such as outputs/shapes"
        )
    page = make_page(run_dir).encode("utf-8", "replace")  # a file name may hold what is no text
    path = run_dir / "report" / "index.html"
    try:
        path.parent.mkdir(exist_ok=True)
        with file_written_atomically(path) as file:
            file.write(page)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    return path


def report(run_dir: Path) -> None:
    """Write the report at the end of a run and say where; that it cannot be had is no reason to fail."""
    try:
        print(f"report: {write_report(run_dir)}", flush=True)
    except Exception as error:
        print(f"there is no report: {error}", flush=True)
