"""Methods by blocks in two processes: the checkpoint of one, up to the order of sums."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import shared_blocks as shared
from helpers.shared_blocks import CASES, NUM_WINDOWS
from hypothesis import given
from hypothesis import strategies as st

from qtool.blocks.shares import owner, share_of
from qtool.system import distributed
from qtool.system.errors import InputError

EXACT = {"rtn", "hqq", "smoothquant"}  # nothing is summed over the text: these are the same bits
DIFFERING = 0.002  # largest share of codes that may differ elsewhere
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run all cases in two processes, and return their folder."""
    folder = tmp_path_factory.mktemp("shared")
    shared.models(folder)
    script = ["-m", "helpers.shared_blocks", str(folder)]
    done = subprocess.run([*LAUNCH, *script], cwd=Path(shared.__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def seen(folder: Path, case: str) -> list[dict[str, Any]]:
    """Return the records of a case, one for each of the two processes."""
    return [torch.load(folder / f"{case}-{number}.pt") for number in (0, 1)]


@pytest.mark.parametrize("case", sorted(CASES))
def test_two_processes_make_the_checkpoint_of_one(ran: Path, case: str) -> None:
    """Codes, scales, folded and trained norms, figures; four windows for one process and three for the other."""
    (first, second), one = seen(ran, case), shared.run_case(CASES[case], ran, ran / "states" / f"{case}-1")
    assert first["weights"].keys() == second["weights"].keys() == one["weights"].keys()
    for name, (codes, scale, _) in one["weights"].items():
        for ours, theirs in zip(first["weights"][name], second["weights"][name], strict=True):
            assert torch.equal(ours, theirs), f"{name} is not the same in both processes"
        assert float((first["weights"][name][0] != codes).float().mean()) <= (0 if case in EXACT else DIFFERING), name
        torch.testing.assert_close(first["weights"][name][1], scale, rtol=0 if case in EXACT else 0.1, atol=0)
    for name, tensor in one["rest"].items():
        assert torch.equal(first["rest"][name], second["rest"][name]), name
        torch.testing.assert_close(first["rest"][name], tensor, rtol=0 if case in EXACT else 1e-3, atol=1e-6)
    limit = 0 if case in EXACT else 1e-2 * float(one["logits"].abs().max())
    torch.testing.assert_close(first["logits"], one["logits"], rtol=0, atol=limit)
    assert first["series"].keys() == one["series"].keys()
    for name, values in one["series"].items():
        assert first["series"][name] == pytest.approx(values, rel=1e-3), name
    assert first["errors"] == pytest.approx(one["errors"], rel=1e-3)


def test_each_process_holds_its_share_of_the_hidden_states(ran: Path) -> None:
    for case in set(CASES) - {"rtn", "hqq"}:  # which read no text
        assert [each["held"] for each in seen(ran, case)] == [3, 4]
        assert sum(each["held"] for each in seen(ran, case)) == NUM_WINDOWS


def test_a_block_that_is_not_the_same_everywhere_is_an_error(ran: Path) -> None:
    for number in (0, 1):
        said = (ran / f"differing-{number}.txt").read_text()
        assert said.startswith("model.layers.1 is not the same in all processes: rank(s) 1 of 2 differ from rank 0")


@given(st.integers(1, 64), st.integers(0, 20), st.integers(1, 3))
def test_batches_in_a_row_and_batches_spread_evenly_have_all_owners(count: int, start: int, power: int) -> None:
    everyone = set(range(count))
    assert {owner(start * count + i, count) for i in range(count)} == everyone
    assert {owner(i * count**power, count) for i in range(count)} == everyone
    assert owner(0, count) == 0, "the first windows belong to the first process, which measures the error of a block"


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 12))
def test_every_window_belongs_to_one_process(windows: int, size: int, count: int) -> None:
    shares = []
    for rank in range(count):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distributed, "place", lambda rank=rank: (rank, count))
            if windows < count:
                with pytest.raises(InputError, match=f"found {windows} calibration window.s. for {count} processes"):
                    share_of(windows, size)
                continue
            found, share = share_of(windows, size)
            assert found <= size
            assert share.num_windows > 0
            shares.append(share)
    if shares:
        assert sorted(number for share in shares for number in share.numbers) == list(range(len(shares[0].sizes)))
        assert {sum(share.sizes) for share in shares} == {windows}
        assert max(s.num_windows for s in shares) - min(s.num_windows for s in shares) <= 2 * size


def test_a_process_that_works_alone_adds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    assert distributed.active()
    with distributed.alone():
        assert not distributed.active()
        assert distributed.place() == (0, 1)
        assert distributed.summed(3, 4.5) == [3, 4.5]
    assert distributed.active()
