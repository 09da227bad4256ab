"""``python -m qtool`` and the ``qtool`` command."""

import gc
import os
import sys

from qtool.cli import main as command_line

SPINS = "10000"  # looks for work that a waiting thread of GNU OpenMP takes before it sleeps; it would take 300,000


def main() -> None:
    """Run the command line and end the process at once.

    Importing torch and transformers makes many objects and no garbage; looking for it as often as usual takes a fifth
    of the time. Taking them apart again takes a second or two at exit; nothing of ours is left to be closed. And
    torch's threads wait by looking again and again, which on a machine that others use too takes the time that they
    wait for: docs/benchmarks.md.
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
