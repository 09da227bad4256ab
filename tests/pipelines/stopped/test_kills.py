"""A run may be killed at any moment and goes on to the same bytes."""

import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from helpers.stopped_runs import METHODS, Whole, after_each_kill, hashes, in_child, make, quantize, wait

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")


@pytest.mark.parametrize("method", ["gptq", "lsq", "efficientqat"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_run_killed_where_any_file_gets_its_name_goes_on_to_the_same_bytes(
    folder: Path, tmp_path: Path, whole: Whole, after: bool, method: str
) -> None:
    number = 0
    for output in after_each_kill(lambda output: make(folder, output, method), tmp_path, after, whole(method)):
        assert {path.name for path in output.iterdir()} >= {"qtool.json", "report.json", "report.html", "README.md"}
        assert [path.name for path in tmp_path.glob(f"{output.name}*/")] == [output.name], number
        number += 1
    # lock, tokens, three blocks with a record each, the rest, the folder; or four steps in place of the blocks; or both
    assert number >= {"gptq": 10, "lsq": 8, "efficientqat": 13}[method]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_at_a_random_moment_goes_on_to_the_same_bytes(
    folder: Path, tmp_path: Path, whole: Whole, method: str
) -> None:
    expected = whole(method)
    start = time.monotonic()
    quantize(make(folder, tmp_path / "timed", method))
    lasts = time.monotonic() - start
    draw = random.Random(0)
    for i in range(3):
        output = tmp_path / f"out-{i}"
        checked = make(folder, output, method)
        child = in_child(partial(quantize, checked))
        time.sleep(draw.uniform(0, 1.2 * lasts))
        os.kill(child, signal.SIGKILL)
        wait(child)
        quantize(checked)
        assert hashes(output) == expected
        assert not output.with_name(f"{output.name}.partial").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", [name for name in ("gptq", "awq", "smoothquant", "signround") if name in METHODS])
def test_ten_random_kills_each(folder: Path, tmp_path: Path, whole: Whole, method: str) -> None:
    """With all four methods that is forty kills; a run may be killed several times before it may finish."""
    expected = whole(method)
    start = time.monotonic()
    quantize(make(folder, tmp_path / "timed", method))
    lasts = time.monotonic() - start
    draw = random.Random(method)
    kills = 0
    while kills < 10:
        output = tmp_path / f"out-{kills}"
        checked = make(folder, output, method)
        while not output.exists():
            child = in_child(partial(quantize, checked))
            time.sleep(draw.uniform(0, 1.1 * lasts))
            os.kill(child, signal.SIGKILL)
            kills += wait(child) == -signal.SIGKILL
            if kills >= 10:
                break
        quantize(checked)
        assert hashes(output) == expected
