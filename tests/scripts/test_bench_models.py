"""``--model`` of the scripts in ``scripts/bench``: each that reads a float model takes the same names."""

import importlib
from pathlib import Path

import pytest
import real_models
from real_models import NAMES

BENCH = Path(real_models.__file__).parent
# scripts that read a float model by none of these names, and what they read instead
OTHERS = {
    "child_cost.py": "a part of other scripts",
    "decode_turns.py": "quantized checkpoints",
    "gpu.py": "random weights of large shapes",
    "llama_quantize.py": "GGUF files",
    "lrqat_memory.py": "random weights of the shapes on its command line",
    "memory_accounting.py": "a part of lrqat_memory.py",
    "memory_watch.py": "a part of lrqat_memory.py",
    "peer.py": "a part of peers.py",
    "peer_autoround.py": "a part of peers.py",
    "peer_gptqmodel.py": "a part of peers.py",
    "peer_llmcompressor.py": "a part of peers.py",
    "random_llama.py": "nothing: it writes a random model",
    "real_models.py": "the packages of the models",
}
SCRIPTS = sorted(path.name for path in BENCH.glob("*.py"))


def test_every_script_is_known() -> None:
    assert set(OTHERS) < set(SCRIPTS)


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name not in OTHERS])
def test_a_script_takes_the_models_by_name(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = importlib.import_module(script.removesuffix(".py")).main
    monkeypatch.setattr("sys.argv", [script, "--help"])
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit, match="0"):
        main()
    words = capsys.readouterr().out.split("--model", 1)[1].split()
    assert all(f"{name}," in words for name in NAMES)
