"""``python -m qtool`` and the ``qtool`` command."""

import gc
import os
import sys

from qtool import cli


def main() -> None:
    """Run the command line and end the process at once.

    Importing torch and transformers makes many objects and no garbage; looking for it as often as usual takes a fifth
    of the time. Taking them apart again takes a second or two at exit; nothing of ours is left to be closed.
    """
    gc.set_threshold(50_000, 20, 20)
    code = cli.main()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # the reader has gone
            code = code or 1
    os._exit(code)


if __name__ == "__main__":
    main()
