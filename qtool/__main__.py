"""``python -m qtool`` and the ``qtool`` command."""

import gc
import os
import sys

from qtool.cli import main as command_line

SPINS = "10000"  # spin iterations of a waiting thread of GNU OpenMP before it sleeps (default 300,000)


def main() -> None:
    """Run the command line and end the process at once.

    Importing torch and transformers makes many objects and no garbage; garbage collection at its usual thresholds takes
    a fifth of the import time. Skip interpreter teardown, which takes one to two seconds; nothing of ours is left to be
    closed. Threads of torch wait by spinning, which on a shared machine takes time from the threads that they wait for
    (docs/benchmarks.md), so let them spin less.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch is imported
    gc.set_threshold(50_000, 20, 20)
    code = command_line.main()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # the reader has gone
            code = code or 1
    os._exit(code)


if __name__ == "__main__":
    main()
