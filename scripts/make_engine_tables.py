"""Write the tables of engines and formats into docs/deploy, from ``qtool/config/engines.py``.

    python scripts/make_engine_tables.py [--check]

With ``--check`` nothing is written, and the exit code is 1 if a table differs from what the code knows.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path

from qtool.config.engines import ENGINES, FORMATS, READS, Grids, Reads, load_commands
from qtool.config.loadable import Weights, best, described
from qtool.config.quant import QuantConfig
from qtool.config.yaml_loader import parse
from qtool.system.distribution import install

ROOT = Path(__file__).parents[1]
# tables of each page, by mark
TABLES = {"docs/deploy/formats.md": ("formats",), "docs/deploy/index.md": ("grids", "engines")} | {
    f"docs/deploy/{engine}.md": (f"formats of {engine}", f"loading in {engine}") for engine in ENGINES
}
# sections quant of the usual grids
USUAL = (
    "{num_bits: 8, group_size: -1}",
    "{num_bits: 4, group_size: 128}",
    "{num_bits: 4, group_size: 128, symmetric: false}",
    "{num_bits: 4, group_size: 128, embedding: {num_bits: 8}}",
    "{num_bits: 3, group_size: 64}",
    "{num_bits: 3, group_size: 64, symmetric: false}",
    "{num_bits: 2, group_size: 64}",
    "{num_bits: 2, group_size: 64, symmetric: false}",
    "{num_bits: 2, group_size: 64, symmetric: false, float_zero: true}",
    "{num_bits: 8, group_size: -1, activations: {num_bits: 8, symmetric: true}}",
    "{num_bits: 4, group_size: 128, activations: {num_bits: 8, symmetric: true}}",
    "{grid: q4_k, embedding: {grid: q6_k}}",
)
GPU = "vllm", "sglang"  # engines that need a GPU, and were not run
EXTRA = {"gguf": "gguf", "onnx": "onnx"}  # extras of qtool that formats need
HOW = {"run": "run", "source": "source read", "docs": "documented"}


def main() -> int:
    """Write the tables, or compare them."""
    check, wrong = "--check" in sys.argv[1:], []
    for page, marks in TABLES.items():
        file = ROOT / page
        before = file.read_text(encoding="utf-8")
        after = before
        for mark in marks:
            after = replaced(after, mark, "\n".join(WRITERS[mark]()))
        if after != before:
            wrong.append(page)
            if not check:
                file.write_text(after, encoding="utf-8")
    if check and wrong:
        print(f"{' and '.join(wrong)} differ from qtool/config/engines.py; run scripts/make_engine_tables.py")
    return int(check and bool(wrong))


def replaced(page: str, mark: str, table: str) -> str:
    """Return a page with ``table`` between its marks."""
    start, end = f"<!-- {mark}: made by scripts/make_engine_tables.py -->", f"<!-- end of {mark} -->"
    before, rest = page.split(start)
    return f"{before}{start}\n\n{table}\n\n{end}{rest.split(end)[1]}"


def formats() -> Iterator[str]:
    """Yield the lines of the table of formats: what each holds, and which engines load it."""
    yield "| written as | holds | loads in |"
    yield "|---|---|---|"
    for name in FORMATS:
        rows = [row for row in READS if row.format == name]
        yield f"| {_named(name)} | {_held(name)} | {'; '.join(_loads(rows)) or 'nothing that is known'} |"


def ways(grids: tuple[Grids, ...]) -> str:
    """Return grids in words."""
    return "; or ".join(map(described, grids))


def _named(name: str) -> str:
    extra = f" (`{install(EXTRA[name])}`)" if name in EXTRA else ""
    return f"`{name}`{extra}" if name != "native" else "native"


def _held(name: str) -> str:
    holds = FORMATS[name]
    parts = [ways(holds.grids)]
    parts += ["mixed" if holds.mixed else "one grid for all linears"]
    parts += ["grids of llama.cpp"] if holds.k_quants else []
    parts += ["inputs of 8 bits"] if holds.int8 else []
    parts += [holds.note] if holds.note else []
    return ". ".join(parts)


def _loads(rows: list[Reads]) -> Iterator[str]:
    """Yield the engines that load a format, those with the same conditions together."""
    for condition, group in groupby(sorted(rows, key=_condition), _condition):
        engines = ", ".join(row.engine for row in group)
        yield engines + (f" ({condition})" if condition else "")


def _condition(row: Reads) -> str:
    parts = [] if row.grids == (Grids(),) else [ways(row.grids) if len(row.grids) == 1 else "some of these grids"]
    parts += [f"with {', '.join(row.packages)}"] if row.packages else []
    return "; ".join(parts)


def engines() -> Iterator[str]:
    """Yield the lines of the table of engines."""
    yield "| engine | facts about | formats, the best first | one grid for q, k, v and for gate, up |"
    yield "|---|---|---|---|"
    for engine in ENGINES.values():
        names = ", ".join(row.format for row in READS if row.engine == engine.name and not row.on_request)
        asked = ", ".join(row.format for row in READS if row.engine == engine.name and row.on_request)
        also = f"; if `export` names them: {asked}" if asked else ""
        about = f"{engine.package} {engine.version}"
        yield f"| `{engine.name}` | {about} | {names}{also} | {'yes' if engine.fused else 'no'} |"


def grids() -> Iterator[str]:
    """Yield the lines of the table of usual grids: the format in which each engine reads them best."""
    yield f"| `quant:` | {' | '.join(ENGINES)} |"
    yield "|---|" + "---|" * len(ENGINES)
    for keys in USUAL:
        found = [best(engine, _weights(keys)) for engine in ENGINES]
        cells = [f"`{each.format}`" if each.loads else "no" for each in found]
        yield f"| `{keys}` | {' | '.join(cells)} |"


def _weights(keys: str) -> Weights:
    """Return the grids of a model whose linears are all 4096 x 4096; its embedding is also its head."""
    section = QuantConfig.model_validate(parse(keys))
    shapes = {f"model.layers.0.self_attn.{name}_proj": (4096, 4096) for name in "qkvo"}
    return Weights(
        {name: section.spec_for(name) for name in shapes}, section.table_spec(section.embedding), None, shapes
    )


def pairs(engine: str) -> Iterator[str]:
    """Yield the lines of the table of the formats that an engine loads."""
    yield "| written as | grids | inputs of 8 bits | embedding | head | needs | known by | note |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in READS:
        if row.engine != engine:
            continue
        holds = FORMATS[row.format]
        grids = ways(row.grids if row.grids != (Grids(),) else holds.grids)
        kinds = "; grids of llama.cpp" if holds.k_quants and row.k_quants else ""
        int8 = ways(row.int8) if holds.int8 and row.int8 else "no"
        embedding = "yes" if holds.embedding and row.embedding else "no"
        head = row.head if holds.head and row.head else "no"
        cells = [f"`{row.format}`", grids + kinds, int8, embedding, head, ", ".join(row.packages)]
        yield f"| {' | '.join(cells)} | {HOW[row.how]}: {row.versions} | {row.note} |"


def loading(engine: str) -> Iterator[str]:
    """Yield how an engine loads a folder of each format."""
    rows = sorted((row for row in READS if row.engine == engine), key=lambda row: row.load)
    code = ENGINES[engine].code
    reason = "needs a GPU" if engine in GPU else "FOLDER stands for an export; slow tests load exports in this engine"
    for _, same in groupby(rows, lambda row: row.load):
        formats = [row.format for row in same]
        yield f"{', '.join(f'`{name}`' for name in formats)}:\n\n<!-- not run: {reason} -->\n```{code}"
        yield ("$ " if code == "console" else "") + load_commands(formats[0], engine)
        yield "```\n"


WRITERS: dict[str, Callable[[], Iterator[str]]] = {"formats": formats, "engines": engines, "grids": grids}
WRITERS |= {f"formats of {engine}": partial(pairs, engine) for engine in ENGINES}
WRITERS |= {f"loading in {engine}": partial(loading, engine) for engine in ENGINES}

if __name__ == "__main__":
    raise SystemExit(main())
