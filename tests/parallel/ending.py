"""What torchrun starts: a command line, which leaves behind with which code it ended."""

import os
import signal
import sys
from pathlib import Path

from quintet.cli.main import main

if __name__ == "__main__":
    # Ctrl-C is heard also where the tests themselves were started in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    where = Path(sys.argv[1])
    rank = os.environ["RANK"]
    (where / f"{rank}.pid").write_text(str(os.getpid()))
    try:
        main(sys.argv[2:])
    except SystemExit as end:
        (where / f"{rank}.code").write_text(str(end.code))
        raise
