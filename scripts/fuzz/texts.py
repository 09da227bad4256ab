"""Give the code that reads text a number of damaged texts, token files and tokenizers, and count what becomes of them.

    python scripts/fuzz/texts.py --seed 0 --count 500

Each case is read as a run reads it, in a process of its own with a time limit. Right are windows of valid tokens and
refusals (``InputError`` or ``RunError``); any other error is a traceback, and more than five seconds are slow. The exit
code is 1 if there is either.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "critical"}
os.environ |= {"OMP_NUM_THREADS": "1"}

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qtool.config.recipe import check
from qtool.config.sections import DataConfig, ModelConfig
from qtool.data import sources, windows
from qtool.models.folders import BUILTIN
from qtool.models.loaded import LoadedModel
from qtool.models.loading import load_model
from qtool.system.errors import QtoolError

SECONDS = 5.0  # longest time that a case may take
MEMORY = 16 << 30  # most bytes of address space of the process that reads
PROSE = "The river runs through the old town, and the mill by the bridge is still used in autumn. " * 12
VOCABULARY = 4096

Case = tuple[Path, dict[str, object]]  # a folder with a model, and what is to be read with it


def write_model(folder: Path) -> Path:
    """Write a tiny model with the tokenizer of the built-in one."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BUILTIN / "wiki-llama-3m", trust_remote_code=False).save_pretrained(folder)
    return folder


def odd_value(rng: random.Random) -> Any:  # Any: JSON values
    """Return a JSON value that few programs expect."""
    values: list[Any] = [None, True, -1, 0, 4096, 2**31, 2**64, 10**30, 1e308, float("nan"), "", " ", "\0", "\ud800"]
    values += ["a\udfffb", "a" * 200_000, "\u202e\u0301" * 50, "<|endoftext|>" * 20, [], [[]], {}, {"a": {}}, [None]]
    values += [["text"], {"text": "a"}, "{{ 1/0 }}", "{% for a in b %}", "../../x", PROSE]
    return rng.choice(values)


def odd_bytes(rng: random.Random, content: bytes) -> bytes:
    """Return ``content`` with some bytes inserted, removed, replaced or repeated."""
    pieces = [
        b"\0",
        b"\xff\xfe",
        b"\xc3",
        b"\xed\xa0\x80",
        b"\r",
        b"\n\n\n",
        b"\xef\xbb\xbf",
        b"[" * 150_000,
        b"9" * 6000,
    ]
    pieces += [b"\\ud800", b"\\u0000", b'"', b"{", b"}", "\u2028\U0001f600".encode(), b" " * 100_000, b"a" * 300_000]
    for _ in range(rng.randint(1, 3)):
        at = rng.randint(0, len(content))
        to = min(len(content), at + rng.choice([0, 1, 7, 500]))
        content = content[:at] + rng.choice([b"", rng.choice(pieces), rng.choice(pieces)]) + content[to:]
    return rng.choice([content, content, content, content[: len(content) // 2], b""])


def places_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values inside a JSON value; of long containers, those of the first few items."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items)[:12]:
        found += places_in(inner, (*path, key))
    return found


def odd_json(rng: random.Random, value: Any) -> Any:
    """Return a copy of a JSON value with a few values inside it replaced or removed."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 2)):
        path = rng.choice(places_in(value))
        if not path:
            continue
        inner = value
        for key in path[:-1]:
            inner = inner[key]
        if rng.random() < 0.2:
            del inner[path[-1]]
        else:
            inner[path[-1]] = odd_value(rng)
    return value


def plain(rng: random.Random, folder: Path) -> Path:
    """Write damaged plain text."""
    file = folder / "a.txt"
    file.write_bytes(odd_bytes(rng, PROSE.encode()))
    return file


def rows(rng: random.Random, folder: Path) -> Path:
    """Write damaged rows of text, or of conversations in one of their forms."""
    turns = [{"role": "user", "content": "Name a river."}, {"role": "assistant", "content": PROSE[:300]}]
    others = [{"from": "human", "value": "Name a river."}, {"from": "gpt", "value": PROSE[:300]}]
    kinds: list[Any] = [{"text": PROSE}, {"messages": turns}, {"conversations": others}]
    kinds.append({"instruction": "Name a river.", "input": "", "output": PROSE[:300]})
    good = rng.choice(kinds)
    bad = rng.choice([odd_json(rng, good), odd_json(rng, good), odd_value(rng)])
    lines = [json.dumps(good), json.dumps(bad), *[json.dumps(good)] * 4]
    rng.shuffle(lines)
    content = "\n".join(lines).encode()
    file = folder / "a.jsonl"
    file.write_bytes(odd_bytes(rng, content) if rng.random() < 0.4 else content)
    return file


def token_file(rng: random.Random, folder: Path) -> Path:
    """Write a token file with odd values, an odd dtype or shape, or a damaged header."""
    file = folder / "a.npy"
    shape = rng.choice([(2, 16), (2, 16), (2, 16), (), (0,), (32,), (2, 0), (2, 16, 1)])
    kinds: list[Any] = ["<i8", ">i8", "<i4", "<u2", "<f4", "?", "<U4", "<M8[s]", [("a", "<i8")], "<c8"]
    array = np.full(shape, rng.choice([5, 5, 5, 4095, 4096, -1, 2**31 - 1])).astype("<i8")
    np.save(file, array.astype(rng.choice([*["<i8"] * 6, *kinds])))
    content = file.read_bytes()
    edits = [
        (b"(2, 16)", b"(9**9,)"),
        (b"(2, 16), }     ", b"(9999999, 999), }"),
        (b"'<i8'", b"'|O8'"),
        (b"False", b"True "),
    ]
    edits += [(b"{'descr'", b"(((((((((('descr'"), (b"NUMPY", b"NUMPX"), (b"\x01\x00", b"\x03\x00")]
    if rng.random() < 0.5:
        content = content.replace(*rng.choice(edits), 1)
    file.write_bytes(odd_bytes(rng, content) if rng.random() < 0.4 else content)
    return file


def tokenizer(rng: random.Random, folder: Path) -> Path:
    """Damage a file of the tokenizer, and write plain text or a conversation."""
    name = rng.choice(["tokenizer.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
    file = folder / name
    content = file.read_text() if file.exists() else "{}"
    if rng.random() < 0.3:
        file.write_bytes(odd_bytes(rng, content.encode()))
    else:
        file.write_text(json.dumps(odd_json(rng, json.loads(content))))
    if rng.random() < 0.3:
        templates = ["{{ messages[9].content }}", "{{ 1/0 }}", "{% for", "\0", "{{ messages }}"]
        (folder / "chat_template.jinja").write_text(rng.choice(templates))
    text = folder / "a.jsonl"
    turns = [{"role": "user", "content": "Name a river."}, {"role": "assistant", "content": PROSE}]
    text.write_text((json.dumps(rng.choice([{"text": PROSE}, {"messages": turns}])) + "\n") * 6)
    return text


def names(rng: random.Random, folder: Path) -> str:
    """Return a source that is no file that can be read."""
    os.mkfifo(folder / "fifo.txt")
    (folder / "loop.txt").symlink_to("loop.txt")
    (folder / "zero.txt").symlink_to("/dev/zero")
    (folder / "folder.txt").mkdir()
    (folder / "bad.parquet").write_bytes(b"PAR1" + bytes(range(200)) + b"PAR1")
    (folder / "bad.txt.xz").write_bytes(b"\xfd7zXZ\0" + bytes(50))
    (folder / "bad.safetensors").write_bytes((10**12).to_bytes(8, "little") + b"{}")
    found = [str(file) for file in sorted(folder.iterdir())]
    return rng.choice(
        [*found, "~nosuchuser/a.txt", "a\0.txt", "\ud800.txt", "", "/", "a" * 5000 + ".txt", "generated", "wiki"]
    )


KINDS: tuple[Callable[[random.Random, Path], Path | str], ...] = (plain, rows, token_file, tokenizer, names)


def make_case(seed: int, index: int, model: Path, folder: Path) -> Case:
    """Write case ``index`` into ``folder``: a model, and a text for it."""
    rng = random.Random(f"{seed} {index}")
    shutil.copytree(model, folder)
    source = KINDS[index % len(KINDS)](rng, folder)
    num, length = rng.choice([*[2] * 20, 1, 500, 10**13, 2**70]), rng.choice([*[16] * 20, 2, 64, 65, 10**9])
    return folder, {"source": str(source), "num_samples": num, "seq_len": length}


def read_case(case: Case, good: LoadedModel) -> str:
    """Read a case; return ``right`` or ``refused``, or the traceback of another error."""
    folder, raw = case
    try:
        data = check(DataConfig, raw, "the section data")
        sources.check_source(data)
        changed = any((folder / name).read_bytes() != (good.folder / name).read_bytes() for name in TOKENIZER)
        changed = changed or any(folder.glob("chat_template*"))
        loaded = load_model(ModelConfig(path=str(folder), device="cpu", dtype="float32")) if changed else good
        tokens, labels, _ = windows.calibration(data, loaded, 0)
        assert tokens.shape == (data.num_samples, data.seq_len)
        assert tokens.dtype == torch.int64
        assert 0 <= int(tokens.min()) <= int(tokens.max()) < VOCABULARY
        assert labels is None or bool(((labels == tokens) | (labels == -100)).all())
    except QtoolError as error:
        return "refused" if "bug in qtool" not in str(error) else str(error)
    except BaseException:  # a panic of the tokenizers library is no Exception
        return traceback.format_exc()
    return "right"


TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def serve(pipe: Connection, good: LoadedModel) -> None:
    """Read cases from ``pipe`` and answer with what became of them."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with open(os.devnull, "w") as nothing:  # panics print to the terminal
        os.dup2(nothing.fileno(), 2)
        while True:
            pipe.send(read_case(pipe.recv(), good))


def main() -> int:
    """Run the cases, print those that are wrong and a line of counts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--only", type=int, default=None, help="run the case of this number alone")
    options = parser.parse_args()
    fork = multiprocessing.get_context("fork")
    counts: Counter[str] = Counter(right=0, refused=0, tracebacks=0, slow=0)
    with tempfile.TemporaryDirectory(prefix="fuzz-texts-") as where:
        model = write_model(Path(where) / "model")
        good = load_model(ModelConfig(path=str(model), device="cpu", dtype="float32"))
        worker = None
        for index in range(options.count) if options.only is None else [options.only]:
            folder = Path(where) / "case"
            case = make_case(options.seed, index, model, folder)
            if worker is None:
                ours, theirs = fork.Pipe()
                worker = fork.Process(target=serve, args=(theirs, good), daemon=True)
                worker.start()
                theirs.close()
            ours.send(case)
            found = "slow"
            try:
                if ours.poll(SECONDS):
                    found = ours.recv()
            except EOFError:
                found = "the process died"
            counts[found if found in counts else "tracebacks"] += 1
            if found not in ("right", "refused"):
                kind = KINDS[index % len(KINDS)].__name__
                print(f"case {index} ({kind}): {case[1]!r:.200}\n{found}", file=sys.stderr)
                worker.kill()
                worker.join()
                worker = None
            shutil.rmtree(folder)
        if worker is not None:
            worker.kill()
            worker.join()
    print(f"{sum(counts.values())} texts: " + ", ".join(f"{number} {name}" for name, number in counts.items()))
    return 1 if counts["tracebacks"] or counts["slow"] else 0


if __name__ == "__main__":
    sys.exit(main())
