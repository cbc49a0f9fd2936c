"""A progress bar for loading, on a terminal."""

import os
import sys

from tqdm import tqdm  # type: ignore[import-untyped]


def progress_bar(description: str, total: int) -> tqdm:
    """Return a bar of bytes: shown after one second, removed at its end.

    `HF_HUB_DISABLE_PROGRESS_BARS=1`, which the downloads obey, keeps it away, too.
    """
    wish = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper()
    shown = wish not in ("1", "ON", "YES", "TRUE") and sys.stderr is not None
    return tqdm(
        desc=description,
        total=total,
        unit="B",
        unit_scale=True,
        delay=1.0,
        leave=False,
        # None: unless standard error is a terminal.
        disable=None if shown else True,
    )
