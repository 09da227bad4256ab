"""docs/python.md: its snippets run as they stand, in their order, and print what they say."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def snippets(page: str) -> list[str]:
    """The Python blocks of a page of docs."""
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.filterwarnings("ignore::UserWarning")  # use_backend warns of linears without a kernel
def test_the_snippets_run_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = snippets("python.md")
    assert len(blocks) == 7
    for index, block in enumerate(blocks):
        exec(compile(block, f"docs/python.md, snippet {index}", "exec"), names)
    printed = capsys.readouterr().out
    assert printed.startswith("out/wiki-llama-3m-gptq-w3g64 3.25 bits per weight (7.21 of the file), ")
    assert "\nout/w3 3.25\n" in printed
    assert "quant.num_bit: unknown key; the nearest is quant.num_bits; found 3" in printed
    assert sorted(path.name for path in Path("out").iterdir()) == ["gptq", "saved", "w3", "wiki-llama-3m-gptq-w3g64"]
