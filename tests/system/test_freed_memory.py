"""Memory that a process has freed: glibc keeps it for the next tensor."""

import os
import platform
import subprocess
import sys

import pytest

NEW_PAGES = """
import resource, sys
import torch
from qtool.system import memory
if "keep" in sys.argv:
    memory.keep_freed()
def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(12_000_000)
before = pages()
for _ in range(10):
    torch.ones(12_000_000)
print(pages() - before)
"""
PAGES = 10 * 48_000_000 // 4096
GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is set")


def new_pages(*arguments: str, **environment: str) -> int:
    """Return how many pages the system gives to a process for ten tensors of 48 MB, one after the other."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", NEW_PAGES, *arguments]
    child = subprocess.run(command, env=plain | environment, capture_output=True, text=True, check=True)
    return int(child.stdout)


@GLIBC
def test_freed_memory_is_kept_for_the_next_tensor() -> None:
    assert new_pages("keep") < 0.2 * PAGES


@GLIBC
def test_settings_of_the_allocator_in_the_environment_stay() -> None:
    assert new_pages("keep", MALLOC_TRIM_THRESHOLD_="131072") == pytest.approx(new_pages(), rel=0.1)
    assert new_pages() > 0.9 * PAGES
