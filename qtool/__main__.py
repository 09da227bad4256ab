"""``python -m qtool`` and the ``qtool`` command."""

import os
import sys

from qtool import cli


def main() -> None:
    """Run the command line and end the process at once.

    Taking torch and transformers apart again takes a second or two at exit; nothing of ours is left to be closed.
    """
    code = cli.main()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # the reader has gone
            code = code or 1
    os._exit(code)


if __name__ == "__main__":
    main()
