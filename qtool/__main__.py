"""``python -m qtool`` and the ``qtool`` command."""

import atexit
import gc
import json
import os
import sys
from contextlib import suppress

from qtool.system import interrupts
from qtool.system.post_import import when_imported

SPINS = "10000"  # spin iterations of a waiting thread of GNU OpenMP before it sleeps (default 300,000)


def main() -> None:
    """Run the command line and end the process at once.

    Importing torch and transformers makes many objects and no garbage; garbage collection at its usual thresholds takes
    a fifth of the import time. Skip interpreter teardown, which takes one to two seconds; nothing of ours is left to be
    closed. Threads of torch wait by spinning, which on a shared machine takes time from the threads that they wait for
    (docs/benchmarks.md), so let them spin less. From then on freed memory is kept for the next tensor.
    """
    try:
        interrupts.install()
        when_imported("torch", _keep_freed)
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch is imported
        gc.set_threshold(50_000, 20, 20)
        from qtool.cli import main as command_line
        from qtool.cli import streams

        streams.occupy_descriptors()
        code = command_line.main()
    except KeyboardInterrupt:  # it came before the command line could answer it
        interrupts.finish()
        code = _interrupted("--json" in sys.argv)
    interrupts.finish()
    if interrupts.received():
        with suppress(Exception):
            atexit._run_exitfuncs()  # they remove temporary folders of libraries
    os._exit(code)


def _keep_freed() -> None:
    from qtool.system import memory  # it loads ctypes, which commands without torch do not need

    memory.keep_freed()


def _interrupted(as_json: bool) -> int:
    with suppress(OSError):
        print("interrupted", file=sys.stderr, flush=True)
        if as_json:
            error = {"error": "interrupted", "kind": "interrupted", "exit_code": interrupts.EXIT_CODE}
            print(json.dumps(error), flush=True)
    return interrupts.EXIT_CODE


if __name__ == "__main__":
    main()
