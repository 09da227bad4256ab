"""In a fresh Python, qtool may be imported before or after transformers; without it, transformers stops."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny
from transformers import AutoModelForCausalLM

import qtool
from qtool.config.quant import QuantConfig

HEAVY = "torch, torch._dynamo, torch.distributed.tensor, scipy.optimize, accelerate, transformers"
LOAD = "model = LlamaForCausalLM.from_pretrained('native', dtype='float32')"
LOGITS = "torch.save(model.eval()(torch.load('probe.pt')).logits.detach(), '{}.pt')"
SCRIPTS = {
    "without": f"from transformers import LlamaForCausalLM; assert 'qtool' not in sys.modules; {LOAD}",
    "first": f"import qtool; from transformers import LlamaForCausalLM; {LOAD}; {LOGITS.format('first')}",
    "last": f"from transformers import LlamaForCausalLM; import qtool; {LOAD}; {LOGITS.format('last')}",
}
FORKS = f"""
import os, sys, traceback, {HEAVY}
assert not [name for name in sys.modules if name == 'transformers.modeling_utils' or name.startswith('qtool')]
children = {{}}
for name, script in {SCRIPTS!r}.items():
    child = os.fork()
    if child == 0:
        os.dup2(os.open(name + '.err', os.O_WRONLY | os.O_CREAT), 2)
        try:
            exec(script)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        sys.stderr.flush()
        os._exit(0)
    children[name] = child
for name, child in children.items():
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
Fresh = tuple[Path, dict[str, int]]


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny.quantize(tiny.llama(folder / "float"), folder / "native", QuantConfig(num_bits=3, group_size=32))
    return folder / "native"


@pytest.fixture(scope="module")
def fresh(native: Path, tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    """The folder and exit codes of ``SCRIPTS``, run in a Python without qtool and transformers' models.

    Each script runs in a fork of one process that has done the slow imports, to save time.
    """
    folder = tmp_path_factory.mktemp("fresh")
    (folder / "native").symlink_to(native)
    torch.save(tiny.probe(), folder / "probe.pt")
    path = [str(Path(qtool.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, path))}
    command = [sys.executable, "-c", FORKS]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return folder, {name: int(code) for name, code in (line.split() for line in done.stdout.splitlines())}


@pytest.mark.parametrize("name", ["first", "last"])
def test_qtool_may_be_imported_before_or_after_transformers(name: str, fresh: Fresh, native: Path) -> None:
    folder, codes = fresh
    assert codes[name] == 0, (folder / f"{name}.err").read_text()
    expected = tiny.logits(AutoModelForCausalLM.from_pretrained(native, dtype=torch.float32).eval())
    assert torch.equal(torch.load(folder / f"{name}.pt"), expected)


def test_importing_qtool_imports_neither_torch_nor_transformers() -> None:
    script = "import sys, qtool; print(*{'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_without_import_qtool_transformers_stops_at_a_size_mismatch(fresh: Fresh) -> None:
    folder, codes = fresh
    said = (folder / "without.err").read_text()
    assert codes["without"] != 0, "a random model was given"
    assert "mismatch" in said.lower()
    assert "torch.Size([1])" in said  # the size of the marker tensor, where a weight was expected
