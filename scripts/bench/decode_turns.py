"""Decoding speed of checkpoints of one model with every backend, and of its dense weights, one token each in turns.

Taking turns makes the ratios hold on a busy machine:

    OMP_NUM_THREADS=1 python scripts/bench/decode_turns.py out/w2 out/w4 --backends torch,ort,fast --turns 60

All models are in memory at once. The dense weights decode in float32 and in bfloat16; ``x`` is the median over turns of
the time of the faster of the two over that of the variant. Packed models compute in ``--dtype``.
"""

import argparse
import time
from pathlib import Path
from statistics import median

import torch
import transformers

from qtool.config.sections import ModelConfig
from qtool.evaluation import bench
from qtool.models.backend import use_backend
from qtool.models.expanded import expand
from qtool.models.linears import packed_weights
from qtool.models.loaded import LoadedModel
from qtool.models.loading import load_model

WARM = 2  # first turns, which are not counted
DENSE = ("float32", "bfloat16")


def load(folder: Path, dtype: str) -> LoadedModel:
    """Load a checkpoint on the CPU."""
    config = ModelConfig.model_validate({"path": str(folder), "dtype": dtype, "device": "cpu"})
    return load_model(config, quantized=True)


def in_turns(decoders: dict[str, bench._Decoder], turns: int) -> dict[str, list[float]]:
    """Return the seconds of each step of each decoder."""
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    for turn in range(turns + WARM):
        for name, decoder in decoders.items():
            start = time.perf_counter()
            decoder.step()
            if turn >= WARM:
                seconds[name].append(time.perf_counter() - start)
    return seconds


@torch.inference_mode()
def main() -> None:
    """Measure, and print one line for each variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--backends", default="fast", help="names that use_backend knows, with commas between them")
    parser.add_argument("--dtype", default="float32", help="dtype of the packed models")
    parser.add_argument("--turns", type=int, default=60)
    args = parser.parse_args()
    transformers.logging.disable_progress_bar()
    prompt = torch.randint(4096, (1, 32), generator=torch.Generator().manual_seed(0))
    decoders = {}
    for dtype in DENSE:
        dense = load(args.folders[0], dtype)
        expand(dense.model, packed_weights(dense.model), dense.dtype)
        decoders[f"dense {dtype}"] = bench._Decoder(dense.model, prompt)
    for folder in args.folders:
        for backend in args.backends.split(","):
            model = load(folder, args.dtype).model
            print(f"{folder.name} {backend}: {use_backend(model, backend)}")
            decoders[f"{folder.name} {backend}"] = bench._Decoder(model, prompt)
    seconds = in_turns(decoders, args.turns)
    faster = min((f"dense {dtype}" for dtype in DENSE), key=lambda name: median(seconds[name]))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; against {faster}:")
    for name, each in seconds.items():
        ratio = median(dense / own for dense, own in zip(seconds[faster], each, strict=True))
        speed = f"{1 / median(each):.1f} tokens/s"
        print(f"{name}: median {median(each) * 1e3:.1f} ms, fastest {min(each) * 1e3:.1f} ms, {speed}, {ratio:.2f} x")


if __name__ == "__main__":
    main()
