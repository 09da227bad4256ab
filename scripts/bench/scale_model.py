"""Predicts time, memory and traffic of methods by blocks on several processes, from a model's config and few rates.

    python scripts/bench/scale_rates.py rates.json                        # the rates of this machine, a minute
    python scripts/bench/scale_model.py --model FOLDER --rates rates.json --ranks 1,2 --windows 32 --length 512
    python scripts/bench/scale_model.py --model FOLDER --rates rates.json --measured ranks.json
    python scripts/bench/scale_model.py --published --json predictions.json

The second line predicts runs of a model; the third puts predictions beside the figures of ``scripts/bench/ranks.py``,
which names models, methods, windows and numbers of processes itself. The last line predicts models of 7B, 70B and 671B
on 1, 8 and 64 GPUs from datasheet rates times ``--share``. docs/train/processes.md explains every term.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from real_models import add_model, chosen
from transformers import DeepseekV3Config, LlamaConfig, PreTrainedConfig

from qtool.blocks.shares import owner
from qtool.blocks.states import PROBED_WINDOWS
from qtool.config.sections import ModelConfig
from qtool.methods import signround
from qtool.methods.efficientqat import Config as EfficientQAT
from qtool.models.described import described_model
from qtool.models.experts import choices, num_experts
from qtool.models.linears import linear_shapes
from qtool.models.loaded import LoadedModel
from qtool.training.block_training import HELD_OUT, NUM_CHECKS
from qtool.training.fit import windows_of_step

OWN_INPUT = ("o_proj", "down_proj", "out_proj")  # last parts of names of linears that share no input
BITS, GROUP = 4, 128
PUBLISHED: dict[str, Callable[[], PreTrainedConfig]] = {  # shapes from the models' published configs
    "7B (Llama 2)": lambda: LlamaConfig(dtype="bfloat16"),
    "70B (Llama 3)": lambda: LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        dtype="bfloat16",
    ),
    "671B mixture (DeepSeek V3)": lambda: DeepseekV3Config(dtype="bfloat16"),
}


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second; each process has such a machine for itself."""

    product: float  # FLOP/s of a block's forward, in the model's dtype
    gram: float  # FLOP/s of Hessians
    factor: float  # FLOP/s of Cholesky factorisation and triangular inverse, float32
    update: float  # FLOP/s of the products that correct later columns, float32
    nearest: float  # weights/s that are rounded to nearest in the range of their extremes
    search: float  # weights/s whose range is searched
    column: float  # seconds that a column takes beside its FLOPs: kernel starts
    train: float  # weights/s that are rounded, differentiated and moved in a training step
    disk: float  # bytes/s of reading a block, and of writing a packed one
    digest: float  # bytes/s of the check that all processes have the same bits
    link: float  # bytes/s that a process sends to its neighbours in the ring
    wait: float  # seconds that a collective takes beside its bytes


# NVIDIA H100 SXM: 989 TFLOP/s bfloat16, 494 TF32, 67 float32 (dense), 3.35 TB/s memory, 450 GB/s NVLink per direction;
# 50 GB/s per GPU between machines (one 400 Gb/s adapter each). Kernel starts: 10 of 5 us for a column.
def gpu(share: float, between: bool) -> Rates:
    """Return the rates of an H100 of which ``share`` of the datasheet's FLOP/s is reached; ``between`` machines."""
    memory = 3.35e12
    return Rates(
        product=989e12 * share,
        gram=494e12 * share,
        factor=67e12 * share,
        update=67e12 * share,
        nearest=memory / (6 * 8),  # 6 passes over 4 bytes read and 4 written
        search=memory / (40 * 8 * 8),  # 40 candidates, 8 passes over 4 bytes read and 4 written
        column=10 * 5e-6,
        train=memory / (25 * 8),  # 25 passes: rounding, its gradient, Adam's moments
        disk=5e9,
        digest=1.5e9,
        link=50e9 if between else 450e9,
        wait=30e-6,
    )


@dataclass(frozen=True)
class Group:
    """Linears of a block that read the same input; or the experts of a layer, ``rows`` of each."""

    columns: int
    rows: int
    experts: int = 1
    active: int = 1  # experts that a token chooses

    @property
    def weights(self) -> int:
        """The number of weights."""
        return self.columns * self.rows * self.experts


@dataclass(frozen=True)
class Block:
    """The shapes of one decoder block."""

    groups: tuple[Group, ...]
    hidden: int
    attention: float  # FLOPs of attention for a token and a token of context
    itemsize: int

    @property
    def weights(self) -> int:
        """The number of quantized weights."""
        return sum(group.weights for group in self.groups)

    def flops(self, length: int) -> float:
        """Return the FLOPs of a forward for a token in windows of ``length`` tokens; half of the context is masked."""
        products = sum(2.0 * g.columns * g.rows * g.active for g in self.groups)
        return products + self.attention * length / 2


@dataclass(frozen=True)
class Text:
    """The calibration text."""

    windows: int
    length: int


def blocks_of(loaded: LoadedModel) -> Counter[Block]:
    """Return the blocks of a model, equal ones counted."""
    config: Any = loaded.model.config.get_text_config()
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    reads = getattr(config, "qk_head_dim", None) or head
    writes = getattr(config, "v_head_dim", None) or head
    found: Counter[Block] = Counter()
    for name, block in loaded.blocks():
        groups: dict[tuple[str, ...], list[Group]] = {}
        for full, (rows, columns) in linear_shapes([(name, block)]).items():
            linear = block.get_submodule(full.removeprefix(f"{name}."))
            experts = num_experts(linear)
            parent, _, leaf = full.rpartition(".")
            apart = leaf if leaf in OWN_INPUT or experts > 1 else ""
            active = choices(loaded.model, linear) if experts > 1 else 1
            groups.setdefault((parent, str(columns), apart), []).append(
                Group(columns, rows // experts, experts, active)
            )
        joined = (
            Group(each[0].columns, sum(g.rows for g in each), each[0].experts, each[0].active)
            for each in groups.values()
        )
        attention = 2.0 * heads * (reads + writes)
        found[Block(tuple(joined), config.hidden_size, attention, loaded.storage_dtype.itemsize)] += 1
    return found


# -------------------------------------------------------------------------------------------------- the cost of a block


def ring(num_bytes: float, ranks: int) -> float:
    """Return the bytes that each process sends in an all-reduce: a reduction and a gathering of other parts."""
    return 2 * num_bytes * (ranks - 1) / ranks


def part(count: int, ranks: int) -> int:
    """Return the largest number of ``count`` rows or experts that one process has."""
    return -(-count // ranks)


def busiest(step: int, text: Text, ranks: int, num_steps: int) -> float:
    """Return the mean over steps of the largest number of a step's windows that one process holds."""
    size = min(step, text.windows)
    steps = min(num_steps, 1000)
    if ranks == 1:
        return size
    owners = [owner(window, ranks) for window in range(text.windows)]
    largest = (
        max(Counter(owners[w] for w in windows_of_step(s, size, text.windows, 0)).values()) for s in range(steps)
    )
    return sum(largest) / steps


Cost = dict[str, float]  # seconds of each part of a block; ``sent`` is bytes


def common(block: Block, text: Text, ranks: int, rates: Rates) -> Cost:
    """Return what every method needs: a forward, reading the block, packing, checking and writing it."""
    packed = block.weights * (BITS / 8 + 2 / GROUP)
    codes = block.weights * (1 + 8 / GROUP)
    sent = codes * (ranks - 1) / ranks
    return {
        "forward": part(text.windows, ranks) * text.length * block.flops(text.length) / rates.product,
        "read, write": (block.weights * block.itemsize + packed) / rates.disk,
        "check": packed / rates.digest if ranks > 1 else 0.0,
        "gather": sent / rates.link + 6 * len(block.groups) * rates.wait * (ranks > 1),
        "sent": sent,
    }


def of_gptq(block: Block, text: Text, ranks: int, rates: Rates) -> Cost:
    """Return the cost of GPTQ."""
    tokens = part(text.windows, ranks) * text.length
    hessian = factor = solve = sent = collectives = 0.0
    for group in block.groups:
        n, mixture = group.columns, group.experts > 1
        hessian += tokens * 1.25 * n * n * group.active * (2 if mixture else 1)  # experts: their own, and that of all
        factor += 2 / 3 * n**3 * (part(group.experts, ranks) if mixture else 1)
        own = group.rows * part(group.experts, ranks) if mixture else part(group.rows, ranks)
        solve += own * n * (1 / rates.search + n / rates.update)
        solve += n * rates.column * (part(group.experts, ranks) if mixture else 1)
        sent += ring(4.0 * n * n, ranks) * (1 + group.experts / 2 if mixture else 1)
        collectives += 1 + (group.experts if mixture else 0)
    cost = common(block, text, ranks, rates)
    return cost | {
        "Hessians": hessian / rates.gram,
        "factors": factor / rates.factor,
        "solve": solve,
        "add up": sent / rates.link + collectives * rates.wait * (ranks > 1),
        "sent": cost["sent"] + sent,
    }


def of_rtn(block: Block, text: Text, ranks: int, rates: Rates) -> Cost:
    """Return the cost of round to nearest in the range of extremes, which reads no text."""
    cost = common(block, text, ranks, rates) | {"forward": 0.0}
    return cost | {"rounding": block.weights / ranks / rates.nearest}


def training(block: Block, text: Text, ranks: int, rates: Rates, steps: int, size: int, held: int, checks: int) -> Cost:
    """Return the cost of training a block: forward and backward are three forwards, and floats need one more."""
    window = text.length * block.flops(text.length) / rates.product
    at_once = busiest(size, text, ranks, steps)
    sent = steps * ring(4.0 * block.weights, ranks)
    cost = common(block, text, ranks, rates)
    return cost | {
        "forward": 2 * cost["forward"] + checks * part(held, ranks) * window,
        "products": 3 * steps * at_once * window,
        "rounding": (steps + checks) * block.weights / rates.train,
        "search": block.weights / rates.search,
        "add up": sent / rates.link + steps * 7 * rates.wait * (ranks > 1),
        "sent": cost["sent"] + sent,
    }


def of_efficientqat(block: Block, text: Text, ranks: int, rates: Rates) -> Cost:
    """Return the cost of Block-AP with its defaults."""
    config = EfficientQAT()
    held = min(config.validation_samples, text.windows // HELD_OUT)
    trained = text.windows - held
    steps = max(config.min_steps, round(config.epochs * trained / config.batch_size))
    return training(block, text, ranks, rates, steps, config.batch_size, held, NUM_CHECKS + 1)


def of_signround(block: Block, text: Text, ranks: int, rates: Rates) -> Cost:
    """Return the cost of SignRound with its defaults."""
    config = signround.Config()
    checks = len(signround.checked_after(config.iterations)) + 1
    return training(block, text, ranks, rates, config.iterations, config.batch_size, config.check_samples, checks)


METHODS = {"rtn": of_rtn, "gptq": of_gptq, "signround": of_signround, "efficientqat": of_efficientqat}


def memory_of(method: str, block: Block, text: Text, ranks: int) -> Cost:
    """Return the bytes that each process holds while it works on a block."""
    floats = 2 if method in ("signround", "efficientqat") else 1
    rows = part(text.windows, ranks) * text.length
    found: Cost = {
        "hidden states": 0 if method == "rtn" else 2.0 * floats * rows * block.hidden * block.itemsize,
        "block": block.weights * (block.itemsize + 1.0),
    }
    if method == "gptq":
        dense = [4.0 * (2 * g.columns**2 + g.columns * (g.rows + 3 * part(g.rows, ranks))) for g in block.groups]
        experts = [4.0 * (max(ranks, 1) + 3) * g.columns**2 for g in block.groups if g.experts > 1]
        widest = max((g.columns * g.active for g in block.groups), default=0)
        found["Hessians and solving"] = max([*dense, *experts])
        found["paused forwards"] = float((widest + 3 * block.hidden) * block.itemsize * rows)
    elif method in ("signround", "efficientqat"):
        found["masters, gradients, moments"] = block.weights * (16.0 if method == "efficientqat" else 12.0)
        widths = sum((g.columns + g.rows) * g.active for g in block.groups)
        found["activations"] = float(PROBED_WINDOWS * text.length * widths * block.itemsize)
    return found


def predict(model: Counter[Block], method: str, text: Text, ranks: int, rates: Rates) -> dict[str, Any]:
    """Return seconds by part, bytes sent by each process, and the largest memory of one, for all blocks."""
    total: dict[str, float] = {}
    for block, count in model.items():
        for name, value in METHODS[method](block, text, ranks, rates).items():
            total[name] = total.get(name, 0.0) + count * value
    sent = total.pop("sent")
    peak = max((memory_of(method, block, text, ranks) for block in model), key=lambda each: sum(each.values()))
    return {"seconds": sum(total.values()), "parts": total, "sent": sent, "memory": peak}


# --------------------------------------------------------------------------------------------------------- the tables


def described(config: PreTrainedConfig) -> LoadedModel:
    """Return the model of a config, on the meta device."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return described_model(ModelConfig(path=folder), weights=False)


def rows_of(
    name: str,
    model: Counter[Block],
    text: Text,
    ranks: Iterable[int],
    rates: Callable[[int], Rates],
    methods: Iterable[str],
) -> Iterator[dict[str, Any]]:
    """Yield a row of the table for each method and number of processes."""
    for method in methods:
        for count in ranks:
            found = predict(model, method, text, count, rates(count))
            yield {"model": name, "method": method, "ranks": count, **asdict(text), **found}


def beside(name: str, model: Counter[Block], measured: list[dict[str, Any]], rates: Rates) -> Iterator[dict[str, Any]]:
    """Yield the predictions of the runs that ``ranks.py`` measured on this model, beside what it measured.

    Where it kept the first blocks only, these are predicted. Predicted memory is that of a method; measured memory is
    that of a process, less what ``rtn`` takes in one process, which is libraries and the model.
    """
    own = [row for row in measured if row["model"] == name]
    base = min((max(row["rank_bytes"]) for row in own if (row["method"], row["ranks"]) == ("rtn", 1)), default=0)
    for row in own:
        if row["method"] in METHODS:
            text = Text(row["windows"], row["length"])
            kept = Counter([*model.elements()][: row["blocks"] or None])
            for found in rows_of(name, kept, text, [row["ranks"]], lambda count: rates, [row["method"]]):
                taken = {"measured_seconds": row["seconds"], "measured_bytes": max(row["rank_bytes"]) - base}
                yield found | taken | {"blocks": row["blocks"] or model.total()}


def shown(rows: list[dict[str, Any]]) -> str:
    """Return rows as a table in Markdown."""
    measured = any("measured_seconds" in row for row in rows)
    head = ["model", "method", "processes", "predicted s", "largest parts", "sent GB", "memory GB"]
    head += ["blocks", "measured s", "measured memory GB"] if measured else []
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        parts = sorted(row["parts"].items(), key=lambda each: -each[1])[:3]
        said = ", ".join(f"{name} {100 * value / row['seconds']:.0f} %" for name, value in parts)
        cells = [row["model"], row["method"], str(row["ranks"]), f"{row['seconds']:.3g}", said]
        cells += [f"{row['sent'] / 1e9:.3g}", f"{sum(row['memory'].values()) / 1e9:.3g}"]
        if measured:
            cells += [str(row["blocks"]), f"{row['measured_seconds']:.3g}", f"{row['measured_bytes'] / 1e9:.3g}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, or predict and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    parser.add_argument("--rates", type=Path, help="file of scale_rates.py")
    parser.add_argument("--measured", type=Path, help="file of ranks.py, shown beside the predictions")
    parser.add_argument("--published", action="store_true", help="7B, 70B and 671B on GPUs, predicted only")
    parser.add_argument("--share", type=float, default=0.4, help="share of the datasheet's FLOP/s of a GPU")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--ranks", default="1,8,64")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    args = parser.parse_args()
    text, methods = Text(args.windows, args.length), args.methods.split(",")
    ranks = [int(each) for each in args.ranks.split(",")]
    rows: list[dict[str, Any]] = []
    if args.published:
        for name, make in PUBLISHED.items():
            model = blocks_of(described(make()))
            rows += rows_of(name, model, text, ranks, lambda count: gpu(args.share, count > 8), methods)
    else:
        rates = Rates(**json.loads(args.rates.read_text()))
        folder = chosen(args)
        name = folder.name
        model = blocks_of(described_model(ModelConfig(path=str(folder)), weights=False))
        if args.measured is None:
            rows += rows_of(name, model, text, ranks, lambda count: rates, methods)
        else:
            rows += beside(name, model, json.loads(args.measured.read_text()), rates)
    print(shown(rows))
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
