"""The card of the float model: a card without a header is no fault, and nothing is said of it."""

import logging
from pathlib import Path

import pytest

from qtool.reports import base_card


def test_a_card_without_a_header_carries_nothing_over_and_nothing_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    (tmp_path / "README.md").write_text("# A model\n\n---\n")
    assert base_card.base_card(tmp_path, "m", quantized=False) == base_card.BaseCard()
    assert caplog.records == []
    (tmp_path / "README.md").write_text("\n---\nlicense: mit\n---\n# A model\n")
    assert base_card.base_card(tmp_path, "m", quantized=False).license == "mit"
