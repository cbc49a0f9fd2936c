"""The kernels, compiled before a model runs, with a note to the waiting user."""

import os
import sys

from quintet.cli.terminal import Waiting, note

# The line that says what is done comes after two seconds.
NOTICE_AFTER = 3.0


def have_kernels(quiet: bool) -> None:
    """Have the kernels of this CPU, compiled now unless they were; Ctrl-C does not undo the work.

    Raises:
        KeyboardInterrupt: Ctrl-C, while they were compiled; another process goes on with it.
    """
    from quintet.kernels.native import native

    try:
        with Waiting("compiling", quiet, after=NOTICE_AFTER):
            native()
    except KeyboardInterrupt:
        os.posix_spawn(
            sys.executable,
            [sys.executable, "-P", "-m", "quintet.kernels"],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in range(3)],
            # Away from the terminal and its Ctrl-C.
            setsid=True,
        )
        note("kernels are compiled in the background; start again in half a minute", quiet)
        raise
