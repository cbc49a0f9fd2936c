"""The process that those of a pool, and those that are launched, are forked from."""

import os
import sys
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerContext

__all__ = ["server"]


def server() -> ForkServerContext:
    """Return what makes processes, of one that runs and has imported what they need."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["parallel.preloaded"])
    # It knows none of the paths that pytest added, and says nothing where an import fails.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context
