"""Train a small Llama, or a mixture of experts (Qwen3-MoE), from scratch on one text file, on the CPU or one GPU.

    python scripts/train_builtin_model.py train.txt.xz --heldout heldout.txt --tokens 15600000 --out my-llama

The text is cut into documents, each becomes tokens that end with ``<|endoftext|>``, and all tokens in a row are cut
into windows. Muon trains the matrices of the blocks and AdamW the rest (embedding, norms, experts); the learning rates
are constant, then fall linearly. The routers of a mixture also learn from the load-balancing loss.

Work happens in ``<out>.partial`` and may be killed at any time: the same command goes on from the last checkpoint and
ends with the same weights. The windows of a step follow from the seed and the step, and nothing draws random numbers
after the first weights, so weights and optimizer states are all there is to restore. Other settings are refused.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import lzma
import math
import os
import shlex
import shutil
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import small_models

if TYPE_CHECKING:  # loaded later: bad input should not wait for them
    import torch
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

END_OF_TEXT = "<|endoftext|>"
MAY_BE_ZERO = ("decay", "seed", "experts")  # options
BALANCE = 0.01  # weight of the load-balancing loss of a mixture
# options that may change when a run is resumed: they affect neither weights nor losses
FREE_OPTIONS = ("text", "out", "heldout", "tokenizer", "note", "checkpoint_every")


class InputError(Exception):
    """An error that the user can correct; shown without a traceback."""


def parse_args() -> Namespace:
    parser = ArgumentParser(description="Train a small Llama on a text file; run it again to resume.")
    add = parser.add_argument
    add("text", type=Path, help="training text, UTF-8, .txt or .txt.xz")
    add("--out", type=Path, required=True, help="folder to write; must not exist yet")
    add("--heldout", type=Path, required=True, help="text of the same kind, not part of TEXT, to measure on")
    add("--heldout-windows", type=int, default=64, help="windows to measure on, its first ones (%(default)s)")
    add("--separator", default=r"\n\n\n", help="between two documents; \\n and \\t are understood (%(default)s)")
    add("--tokenizer", type=Path, help="tokenizer.json, or a folder with one (default: train one on TEXT)")
    add("--vocab", type=int, default=4096, help="size of the tokenizer to train (%(default)s)")
    add("--hidden", type=int, default=256, help="width of the model (%(default)s)")
    add("--layers", type=int, default=4, help="blocks (%(default)s)")
    add("--heads", type=int, default=4, help="attention heads (%(default)s)")
    add("--kv-heads", type=int, default=2, help="key and value heads (%(default)s)")
    add("--mlp", type=int, default=512, help="width inside the MLP, or inside each expert (%(default)s)")
    add("--experts", type=int, default=0, help="experts of each block; 0: a dense model (%(default)s)")
    add("--chosen", type=int, default=2, help="experts that each token goes to (%(default)s)")
    add("--context", type=int, default=1024, help="longest input the model states, in tokens (%(default)s)")
    add("--window", type=int, default=512, help="tokens in a training window (%(default)s)")
    add("--batch-tokens", type=int, default=8192, help="tokens in a step, a multiple of the window (%(default)s)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="steps to train (default: TEXT once)")
    length.add_argument("--tokens", type=int, help="tokens to train on, instead of --steps; rounded up to full steps")
    add("--muon-lr", type=float, default=0.02, help="learning rate of the matrices of the blocks (%(default)s)")
    add("--adamw-lr", type=float, default=3e-3, help="learning rate of everything else (%(default)s)")
    add("--decay", type=float, default=0.4, help="share of the steps with falling learning rates (%(default)s)")
    add("--seed", type=int, default=0, help="seed of initial weights and window order (%(default)s)")
    add("--precision", choices=("bf16", "fp32"), default="bf16", help="precision of matrix products (%(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (%(default)s)")
    add("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads; affect the last bits (%(default)s)")
    add("--checkpoint-every", type=int, default=100, help="steps between checkpoints and measurements (%(default)s)")
    add("--note", default="", help="sentence for the model card: source and licence of the text")
    return parser.parse_args()


def option_faults(args: Namespace) -> list[str]:
    """Return all faults of the options; no file is opened for it."""
    numbers = {name: value for name, value in vars(args).items() if isinstance(value, int | float)}
    if small := [k for k, value in numbers.items() if value < 0 or (value == 0 and k not in MAY_BE_ZERO)]:
        return [f"--{name.replace('_', '-')} is {numbers[name]}, which is too small" for name in small]
    no_gpu = args.device == "cuda" and not importlib.import_module("torch").cuda.is_available()
    rules = [
        (args.hidden % (2 * args.heads), f"--hidden {args.hidden} must be an even multiple of --heads {args.heads}"),
        (args.heads % args.kv_heads, f"--heads {args.heads} must be a multiple of --kv-heads {args.kv_heads}"),
        (args.window > args.context, f"--window {args.window} is longer than --context {args.context}"),
        (args.batch_tokens % args.window, f"--batch-tokens {args.batch_tokens}: no multiple of --window {args.window}"),
        (args.vocab < 257, f"--vocab {args.vocab}: the bytes and {END_OF_TEXT} make 257"),
        (args.experts and args.chosen > args.experts, f"--chosen {args.chosen} is more than --experts {args.experts}"),
        (args.decay > 1, f"--decay {args.decay} is not a share from 0 to 1"),
        (not args.separator, "--separator is empty"),
        (no_gpu, "--device cuda: PyTorch finds no GPU"),
    ]
    return [fault for broken, fault in rules if broken]


def read_text(path: Path) -> str:
    """Read a UTF-8 file, .txt or .txt.xz, and keep its line ends."""
    try:
        raw = path.read_bytes()
        return (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} as UTF-8 text: {error}") from error


def check_amount(found: int, unit: str, name: str, args: Namespace) -> None:
    """Raise if the bytes or tokens ``found`` in a text cannot fill its windows; a token is a byte or more."""
    option = {"text": "batch_tokens", "heldout": "heldout_windows"}[name]
    needed = getattr(args, option) * (args.window if name == "heldout" else 1) + 1
    if found < needed:
        text = f"{getattr(args, name)} has {found:,} {unit} and {needed:,} are needed"
        raise InputError(f"too little text: {text}; give more, or a smaller --{option.replace('_', '-')}")


def train_tokenizer(documents: list[str], vocab: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer that splits digits; ``<|endoftext|>`` is token 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    if (found := tokenizer.get_vocab_size()) != vocab:
        raise InputError(f"too little text: it gives {found} different tokens and --vocab is {vocab}; ask for fewer")
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer in a file or a folder; it must know ``<|endoftext|>``."""
    from tokenizers import Tokenizer

    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"cannot read the tokenizer {file}: {error}") from error
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise InputError(f"the tokenizer {file} has no token {END_OF_TEXT} to end documents with")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def split(text: str, separator: str) -> list[str]:
    """Return the documents of ``text`` that are not blank."""
    mark = separator.replace(r"\n", "\n").replace(r"\t", "\t")
    return [document for part in text.split(mark) if (document := part.strip())]


def encode(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """Return the tokens of all documents in a row, with the end-of-text token after each."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    rows = [np.array([], np.int32)]
    for i in range(0, len(documents), 256):  # in batches, since an encoding takes far more memory than its ids
        encodings = tokenizer.encode_batch_fast(documents[i : i + 256], add_special_tokens=False)
        rows += [np.array([*encoding.ids, end], np.int32) for encoding in encodings]
    return np.concatenate(rows)


def prepare(args: Namespace, work: Path, sources: dict[str, str]) -> None:
    """Write the tokenizer and the tokens of both texts to ``work``, unless an earlier start has done so."""
    settings = {name: value for name, value in vars(args).items() if name not in FREE_OPTIONS}
    settings |= {f"sha256 of {name}": hashlib.sha256(text.encode()).hexdigest() for name, text in sources.items()}
    settings["torch"] = importlib.metadata.version("torch")
    file = work / "settings.json"  # written last: marks the other files as complete
    if file.exists():
        started = json.loads(file.read_text("utf-8"))
        if changed := [key for key in {**started, **settings} if started.get(key) != settings.get(key)]:
            changes = "".join(f"\n  {key}: was {started.get(key)}, now {settings.get(key)}" for key in changed)
            advice = f"use the earlier settings to resume, or delete {work} to start again"
            raise InputError(f"{work} belongs to a run with other settings; {advice}{changes}")
        return
    documents = {name: split(sources[name], args.separator) for name in ("text", "heldout")}
    print(f"preparing {len(documents['text']):,} documents of {args.text}", flush=True)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else train_tokenizer(documents["text"], args.vocab)
    write(work / "tokenizer.json", tokenizer.to_str(pretty=True))
    for name, texts in documents.items():
        tokens = encode(tokenizer, texts)
        check_amount(len(tokens), "tokens", name, args)
        np.save(work / f"{name}.npy", tokens)
    write(file, json.dumps(settings, indent=2))


def read_windows(file: Path, window: int) -> np.ndarray:
    """Return windows ``[n, window + 1]``; neighbours share one token, so that every token is predicted once."""
    tokens = np.load(file, mmap_mode="r")
    return np.lib.stride_tricks.sliding_window_view(tokens, window + 1)[::window]


@functools.lru_cache(maxsize=2)  # a batch can touch two epochs
def epoch_order(num_windows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_windows)


def batch_at(windows: np.ndarray, step: int, args: Namespace) -> np.ndarray:
    """Return the windows of a step (from 1): every epoch goes through all windows in an order of its own."""
    size = args.batch_tokens // args.window
    places = (divmod(i, len(windows)) for i in range((step - 1) * size, step * size))
    return windows[[epoch_order(len(windows), args.seed, epoch)[place] for epoch, place in places]]


def mean_loss(model: PreTrainedModel, windows: np.ndarray, args: Namespace, precision: str) -> torch.Tensor:
    """Return the cross entropy in nats per token."""
    import torch

    batch = torch.from_numpy(windows.astype(np.int64)).to(args.device)
    with torch.autocast(args.device, torch.bfloat16, enabled=precision == "bf16"):
        out = model(input_ids=batch[:, :-1], use_cache=False)
    loss = torch.nn.functional.cross_entropy(out.logits.float().flatten(0, 1), batch[:, 1:].flatten())
    return loss + BALANCE * out.aux_loss if args.experts and torch.is_grad_enabled() else loss


def measure(model: PreTrainedModel, heldout: np.ndarray, args: Namespace, precision: str) -> float:
    """Return the loss of the held-out windows in nats per token."""
    import torch

    size = args.batch_tokens // args.window
    parts = [heldout[i : i + size] for i in range(0, len(heldout), size)]
    with torch.no_grad():
        return sum(mean_loss(model, part, args, precision).item() * len(part) for part in parts) / len(heldout)


def train(args: Namespace, work: Path, model: PreTrainedModel, windows: np.ndarray, heldout: np.ndarray) -> float:
    """Train ``model`` in place, from the checkpoint in ``work`` if there is one; return the seconds of all starts."""
    import torch

    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or not name.startswith("model.layers.")]
    muon = torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=0.0)
    adamw = torch.optim.AdamW(rest, lr=args.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0)
    parts: dict[str, Any] = {"model": model, "muon": muon, "adamw": adamw}
    start, seconds = 0, 0.0
    if (work / "checkpoint.pt").exists():
        checkpoint = torch.load(work / "checkpoint.pt", map_location="cpu")
        start, seconds = checkpoint["step"], checkpoint["seconds"]
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        print(f"resuming after step {start:,}", flush=True)
    began = time.monotonic() - seconds
    with open_log(work / "train_log.jsonl", start) as log:
        for step in range(start + 1, args.steps + 1):
            # constant until the last `decay` of the steps, then linear, to 0 at the step after the last
            share = min(1.0, (args.steps + 1 - step) / max(1.0, args.decay * args.steps))
            muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"] = args.muon_lr * share, args.adamw_lr * share
            loss = mean_loss(model, batch_at(windows, step, args), args, args.precision)
            line = {"step": step, "tokens": step * args.batch_tokens, "lr_share": share, "loss": loss.item()}
            if not math.isfinite(line["loss"]):
                raise InputError(f"the loss is {line['loss']} at step {step}; start again with lower learning rates")
            model.zero_grad()
            loss.backward()
            muon.step()
            adamw.step()
            checkpoint_due = step == args.steps or step % args.checkpoint_every == 0
            if checkpoint_due:
                line["heldout_loss"] = measure(model, heldout, args, args.precision)
            log.write(json.dumps(line) + "\n")
            log.flush()
            if checkpoint_due:
                seconds = time.monotonic() - began
                states = {name: part.state_dict() for name, part in parts.items()}
                states |= {"step": step, "seconds": seconds}
                put(work / "checkpoint.pt", functools.partial(torch.save, states))
                losses = f"loss {line['loss']:.3f}, held-out {line['heldout_loss']:.3f}"
                print(f"step {step:,} of {args.steps:,}: {losses}, {seconds:,.0f} s", flush=True)
    return seconds


def put(path: Path, save: Callable[[Path], object]) -> None:
    """Call ``save`` with a temporary path and rename that to ``path``, which then is never half written."""
    part = path.with_name(path.name + ".tmp")
    save(part)
    part.replace(path)


def write(path: Path, text: str) -> None:
    put(path, lambda part: part.write_text(text, "utf-8"))


def open_log(path: Path, steps: int) -> TextIO:
    """Cut the loss log to ``steps`` lines (later ones are of a killed run) and return it open for appending."""
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
    write(path, "".join(lines[:steps]))
    return path.open("a", encoding="utf-8")


CARD = """# {out.name}

A small {kind} trained from scratch: {num_parameters:,} parameters (tied embeddings), {layers} blocks, hidden \
{hidden}, MLP {mlp}, {heads} heads of {head_dim}, {kv_heads} KV heads, vocabulary {vocab_size} ({bpe}), context \
{context}, bf16.

Training: {num_seen:,} tokens, {passes:.2f} times {text.name}, in {steps:,} steps of {batch_tokens:,} (windows of \
{window}); Muon for the matrices of the blocks (lr {muon_lr:g}), AdamW for the rest (lr {adamw_lr:g}), constant then \
linear decay over the last {decay:.0%}, seed {seed}, {precision} on {device}, {minutes:.1f} minutes.

Held-out loss: {loss:.4f} nats per token (perplexity {perplexity:.2f}), of these weights in fp32, on \
{heldout_windows} windows of {window} tokens from the start of {heldout.name}. Loss of each step: `train_log.jsonl`.

Command: `{command}`

{note}
"""


def run(args: Namespace) -> None:
    """Check what can be checked early, then prepare, train and write the model."""
    if faults := option_faults(args):
        raise InputError("; ".join(faults))
    if args.out.exists():
        raise InputError(f"{args.out} exists already; remove it or choose another --out")
    sources = {name: read_text(getattr(args, name)) for name in ("text", "heldout")}
    for name, text in sources.items():
        check_amount(len(text.encode()), "bytes", name, args)
    if args.tokenizer is not None:
        sources["tokenizer"] = load_tokenizer(args.tokenizer).to_str(pretty=True)

    work = args.out.with_name(args.out.name + ".partial")
    work.mkdir(parents=True, exist_ok=True)
    prepare(args, work, sources)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # CUDA reads it at its start; matmuls differ without it
    import torch

    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(args.threads)
    windows = read_windows(work / "text.npy", args.window)
    heldout = read_windows(work / "heldout.npy", args.window)[: args.heldout_windows]
    args.steps = args.steps or math.ceil((args.tokens or len(windows) * args.window) / args.batch_tokens)
    model = small_models.build(args, load_tokenizer(work / "tokenizer.json"))
    seconds = train(args, work, model, windows, heldout)

    with torch.no_grad():
        for parameter in model.parameters():  # measure the bfloat16 weights that are saved
            parameter.copy_(parameter.bfloat16())
    loss = measure(model, heldout, args, "fp32")
    folder = work / "model"
    shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed here
    model.bfloat16().save_pretrained(folder)
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # its own mode is for the owner only
    shutil.copy(work / "train_log.jsonl", folder)
    shutil.copy(work / "tokenizer.json", folder)
    config = {"model_max_length": args.context, "tokenizer_class": "PreTrainedTokenizerFast"}
    config |= dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    write(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    measured = {
        "kind": f"Qwen3-MoE of {args.experts} experts, {args.chosen} for each token," if args.experts else "Llama",
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bpe": f"tokenizer of {args.tokenizer.name}" if args.tokenizer else "byte-level BPE, digits split",
        "num_seen": args.steps * args.batch_tokens,
        "passes": args.steps * args.batch_tokens / (len(windows) * args.window),
        "minutes": seconds / 60,
        "loss": loss,
        "perplexity": math.exp(loss),
        "command": f"python {shlex.join(sys.argv)}",
    }
    write(folder / "README.md", CARD.format(**{**model.config.to_dict(), **vars(args), **measured}).rstrip() + "\n")
    folder.rename(args.out)
    shutil.rmtree(work)
    print(args.out)


if __name__ == "__main__":
    try:
        run(parse_args())
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; run the same command to resume")
