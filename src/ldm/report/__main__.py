"""`python -m ldm.report RUN_DIR` writes the report of a run, finished or going on."""

import argparse
import sys
from pathlib import Path

from ldm.errors import UserError
from ldm.report import write_report

if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m ldm.report", description="Write the report of a run.")
    parser.add_argument("run_dir", type=Path, help="what train.py wrote, such as outputs/shapes")
    try:
        print(f"report: {write_report(parser.parse_args().run_dir)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
