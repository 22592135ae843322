"""Tiny tensors gain nothing from threads, and lose much where tests run side by side: one thread, in children too."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
