"""Decoding speed of several checkpoints of one model and its dense weights, one token each in turns.

Taking turns makes the ratios hold on a busy machine:

    OMP_NUM_THREADS=1 python scripts/bench/decode_turns.py out/llama/w4g128 out/llama/w8pc --turns 60

All models are in memory at once. ``x`` is the median over turns of the dense model's time over the variant's.
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


def load(folder: Path) -> LoadedModel:
    """Load a checkpoint in bfloat16 on the CPU."""
    return load_model(ModelConfig(path=str(folder), dtype="bfloat16", device="cpu"), quantized=True)


@torch.inference_mode()
def main() -> None:
    """Measure, and print one line for each variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--turns", type=int, default=60)
    args = parser.parse_args()
    transformers.logging.disable_progress_bar()
    prompt = torch.randint(4096, (1, 32), generator=torch.Generator().manual_seed(0))
    dense = load(args.folders[0])
    expand(dense.model, packed_weights(dense.model), dense.dtype)
    decoders = {"dense": bench._Decoder(dense.model, prompt)}
    for folder in args.folders:
        model = load(folder).model
        print(f"{folder.name}: {use_backend(model, 'fast')}")
        decoders[folder.name] = bench._Decoder(model, prompt)
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    for turn in range(args.turns + 2):
        for name, decoder in decoders.items():
            start = time.perf_counter()
            decoder.step()
            if turn >= 2:  # the first ones warm up
                seconds[name].append(time.perf_counter() - start)
    for name, each in seconds.items():
        ratio = median(dense / own for dense, own in zip(seconds["dense"], each, strict=True))
        print(f"{name}: median {median(each) * 1e3:.1f} ms, fastest {min(each) * 1e3:.1f} ms, {ratio:.2f} x")


if __name__ == "__main__":
    main()
