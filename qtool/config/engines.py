"""What each engine reads: the one table of facts, from which refusals, plans and the documentation are made.

A row of ``FORMATS`` says what a format of qtool holds exactly, and a row of ``READS`` what an engine computes of it. An
engine loads a checkpoint in a format if the format holds it and the engine reads it; ``loadable.py`` decides that from
the grids of the linears alone, so that it is known before anything runs. A pair that has no row is not read.

Each row of ``READS`` says how the fact was found, and with which versions: ``run`` (the engine loaded such folders and
computed the same), ``source`` (the engine's code was read) or ``docs`` (its documentation says so). Facts change with
engines: ``Engine.version`` is the version that they are about. Needs only the standard library.
"""

from typing import Literal, NamedTuple

BOTH = (True, False)
ANY_BITS = (2, 3, 4, 8)


class Grids(NamedTuple):
    """Affine grids: those with one of ``bits``, one of ``symmetric``, and such groups."""

    bits: tuple[int, ...] = ANY_BITS
    symmetric: tuple[bool, ...] = BOTH
    sizes: tuple[int, ...] = ()
    """Numbers of channels of a group; -1 is a whole row. Empty: every size that ``multiple_of`` divides."""
    multiple_of: int = 1
    """The number of channels of a group is a multiple of it, also where the group is a row."""


class Format(NamedTuple):
    """The grids, tables and activations that a format holds exactly."""

    name: str
    grids: tuple[Grids, ...]
    mixed: bool = True
    """True if linears may have different grids."""
    scale_dtypes: tuple[str, ...] = ("float16", "bfloat16", "float32")
    """Dtypes of scales that it holds, whatever their values."""
    float_zeros: bool = False
    """True if it holds zero points between codes."""
    k_quants: bool = False
    """True if it holds the grids of ``grids.BLOCK_GRIDS``, those of llama.cpp's own types."""
    int8: bool = False
    """True if it says that inputs are rounded to 8 bits, symmetrically, with a range for each token."""
    any_activations: bool = False
    """True if it holds every rounding of inputs, keys and values."""
    embedding: bool = False
    head: bool = True
    """True if it holds a quantized output head that has a table of its own."""
    asymmetric_experts: bool = True
    """True if it holds zero points of experts."""
    alignment: int = 1
    """Numbers of rows and of columns of a linear are multiples of it."""
    note: str = ""


class Reads(NamedTuple):
    """The grids, tables and activations of a format that an engine computes with."""

    engine: str
    format: str
    load: str
    """The command or the Python code that loads a folder; ``{folder}`` is its path."""
    how: Literal["run", "source", "docs"]
    versions: str
    """The software, and the versions, with which the fact was found."""
    grids: tuple[Grids, ...] = (Grids(),)
    k_quants: bool = True
    int8: tuple[Grids, ...] = ()
    """Grids of weights that it multiplies by inputs of 8 bits."""
    embedding: bool = True
    head: Literal["any", "as linears", ""] = "any"
    """The grids of a quantized output head with a table of its own; empty: none."""
    packages: tuple[str, ...] = ()
    """Packages that the engine needs besides itself."""
    on_request: bool = False
    """True if it is used only where a recipe names it in ``export``: another format suits the engine better."""
    note: str = ""
    """The processors that the engine needs, and other conditions, for users."""


class Engine(NamedTuple):
    """An engine, and the version that the facts are about."""

    name: str
    package: str
    version: str
    fused: bool
    """True if it makes one matrix of q, k and v, and of gate and up, which therefore need one grid."""
    code: Literal["console", "python"]
    """The language of ``Reads.load``."""


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("vllm", "vllm", "0.33", True, "console"),
        Engine("sglang", "sglang", "0.5.23", True, "console"),
        Engine("llama.cpp", "llama-cpp-python", "0.3.36", False, "python"),
        Engine("mlx", "mlx-lm", "0.32", False, "console"),
        Engine("transformers", "transformers", "5.24", False, "python"),
        Engine("onnxruntime", "onnxruntime", "1.32", False, "python"),
    )
}

ROWS_OR_GROUPS = (-1, 32, 64, 128)  # groups of the kernels Marlin and humming
GGUF_GRIDS = (Grids((2, 3, 4), BOTH, (), 32), Grids((8,), (True,), (), 32))
GPTQ_GRIDS = (Grids(ANY_BITS, BOTH),)

FORMATS = {
    format.name: format
    for format in (
        Format("native", (Grids(),), float_zeros=True, k_quants=True, any_activations=True, embedding=True),
        Format("dense", (Grids(),), float_zeros=True, k_quants=True, embedding=True, note="weights in floating point"),
        Format("compressed-tensors", (Grids(),), int8=True, embedding=True, asymmetric_experts=False),
        Format("gptq", GPTQ_GRIDS, mixed=False, scale_dtypes=("float16",), alignment=32),
        Format("gptq-v2", GPTQ_GRIDS, mixed=False, scale_dtypes=("float16",), alignment=32),
        Format("auto-round", GPTQ_GRIDS, scale_dtypes=("float16",), alignment=32),
        Format(
            "awq", (Grids((2, 3, 4), BOTH, (), 16),), scale_dtypes=("float16",), head=False, note="2 and 3 bits take 4"
        ),
        Format("gguf", GGUF_GRIDS, scale_dtypes=("float16",), k_quants=True, embedding=True),
        Format("mlx", (Grids(multiple_of=32),), scale_dtypes=("float16", "bfloat16"), embedding=True),
        Format("onnx", (Grids(multiple_of=16),), embedding=True, note="3 bits take 4; scales of 32 bits"),
        Format("gemma", (Grids(ANY_BITS, (True,), (-1,)),), note="3 bits take 4"),
    )
}

MARLIN = (Grids((4, 8), (True,), ROWS_OR_GROUPS),)
AWQ_GROUPS = (Grids((4,), BOTH, ROWS_OR_GROUPS),)
NO_TQ2_0 = (  # types of GGUF without TQ2_0, in which symmetric 2 bits in groups of 256 are written
    Grids((2,), (True,), (32, 64, 128)),
    Grids((2,), (False,), (), 32),
    Grids((3, 4), BOTH, (), 32),
    Grids((8,), (True,), (), 32),
)
ROW8 = Grids((8,), (True,), (-1,))

VLLM = "vllm serve {folder}"
SGLANG = "python -m sglang.launch_server --model-path {folder}"
MLX = 'mlx_lm.generate --model {folder} --prompt "Once upon a time"'
LLAMA_CPP = (
    "from llama_cpp import Llama\n\n"
    'model = Llama("{folder}/model.gguf")\n'
    'print(model("Once upon a time", max_tokens=32)["choices"][0]["text"])'
)
TRANSFORMERS = (
    "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    'model = AutoModelForCausalLM.from_pretrained("{folder}")\n'
    'tokenizer = AutoTokenizer.from_pretrained("{folder}")'
)
GGUF_IN_TRANSFORMERS = TRANSFORMERS.replace(
    'from_pretrained("{folder}")\nt', 'from_pretrained("{folder}", gguf_file="model.gguf")\nt'
)
ONNX = 'import onnxruntime\n\nsession = onnxruntime.InferenceSession("{folder}/model.onnx")'

GPU = "NVIDIA GPUs"
GPTQMODEL = ("gptqmodel", "optimum")

# The rows of an engine are in order: the first format that it loads is the one that it reads best.
READS = (
    Reads(
        "vllm",
        "compressed-tensors",
        VLLM,
        "source",
        "vllm 0.33.0",
        (Grids(ANY_BITS, BOTH, ROWS_OR_GROUPS),),
        int8=(Grids(ANY_BITS, BOTH, ROWS_OR_GROUPS),),
        embedding=False,
        note=f"{GPU} from Turing; processors at 4 bits only; 2 and 3 bits by the kernel humming, not tried on a GPU",
    ),
    Reads("vllm", "gptq", VLLM, "source", "vllm 0.33.0", MARLIN, note=GPU),
    Reads("vllm", "gptq-v2", VLLM, "source", "vllm 0.33.0", MARLIN, note=GPU),
    Reads("vllm", "awq", VLLM, "source", "vllm 0.33.0", AWQ_GROUPS, note=GPU),
    Reads("vllm", "auto-round", VLLM, "source", "vllm 0.33.0", (Grids(ANY_BITS, (True,), ROWS_OR_GROUPS),), note=GPU),
    Reads(
        "vllm",
        "gguf",
        "vllm serve {folder}/model.gguf --tokenizer {folder}",
        "docs",
        "vllm 0.33.0",
        NO_TQ2_0,
        packages=("vllm-gguf-plugin",),
        on_request=True,
        note="experimental, says vLLM",
    ),
    Reads("vllm", "dense", VLLM, "docs", "vllm 0.33.0", on_request=True),
    Reads(
        "sglang",
        "compressed-tensors",
        SGLANG,
        "source",
        "sglang 0.5.23",
        (Grids((4, 8), BOTH, ROWS_OR_GROUPS),),
        int8=(ROW8,),
        embedding=False,
        head="",
        note=GPU,
    ),
    Reads("sglang", "gptq", SGLANG, "source", "sglang 0.5.23", MARLIN, note=GPU),
    Reads("sglang", "gptq-v2", SGLANG, "source", "sglang 0.5.23", MARLIN, note=GPU),
    Reads("sglang", "awq", SGLANG, "source", "sglang 0.5.23", AWQ_GROUPS, note=GPU),
    Reads("sglang", "auto-round", SGLANG, "source", "sglang 0.5.23", MARLIN, note=GPU),
    Reads(
        "sglang",
        "gguf",
        "python -m sglang.launch_server --model-path {folder}/model.gguf --load-format gguf --quantization gguf",
        "source",
        "sglang 0.5.23",
        NO_TQ2_0,
        packages=("gguf",),
        on_request=True,
        note=GPU,
    ),
    Reads("sglang", "dense", SGLANG, "docs", "sglang 0.5.23", on_request=True),
    Reads(
        "llama.cpp",
        "gguf",
        LLAMA_CPP,
        "run",
        "llama-cpp-python 0.3.36",
        note="llama.cpp rounds the input of each linear to 8 bits",
    ),
    Reads("mlx", "mlx", MLX, "run", "mlx 0.32.4, mlx-lm 0.32.2", note="Apple machines, and any other that has MLX"),
    Reads("mlx", "dense", MLX, "run", "mlx 0.32.4, mlx-lm 0.32.2", on_request=True),
    Reads(
        "transformers",
        "compressed-tensors",
        TRANSFORMERS,
        "run",
        "compressed-tensors 0.20.1, transformers 5.24",
        (Grids(ANY_BITS, (True,)),),
        int8=(Grids(ANY_BITS, (True,)),),
        packages=("compressed-tensors",),
        note="asymmetric grids only with CompressedTensorsConfig(dequantize=True), if all linears have one grid",
    ),
    Reads(
        "transformers",
        "auto-round",
        TRANSFORMERS,
        "run",
        "auto-round 0.16.1",
        packages=("auto-round",),
        note="on a processor, weights are rounded to 16 bits before they are multiplied",
    ),
    Reads("transformers", "gptq-v2", TRANSFORMERS, "run", "gptqmodel 7.7", head="as linears", packages=GPTQMODEL),
    Reads("transformers", "gptq", TRANSFORMERS, "run", "gptqmodel 7.7", head="as linears", packages=GPTQMODEL),
    Reads(
        "transformers",
        "awq",
        TRANSFORMERS,
        "run",
        "gptqmodel 7.7, transformers 5.24",
        (Grids((2, 3, 4), BOTH, (), 32),),
        packages=GPTQMODEL,
    ),
    Reads(
        "transformers",
        "gemma",
        TRANSFORMERS,
        "run",
        "transformers 5.24",
        note="weights are unpacked at each use, in the dtype of the model: float32, unless another is asked for",
    ),
    Reads(
        "transformers",
        "gguf",
        GGUF_IN_TRANSFORMERS,
        "run",
        "transformers 5.24, gguf 0.19",
        packages=("gguf",),
        on_request=True,
        note="expanded to floating point; biases and scaled rotary frequencies of Llama are left out",
    ),
    Reads("transformers", "native", f"import qtool\n{TRANSFORMERS}", "run", "transformers 5.24", packages=("qtool",)),
    Reads("transformers", "dense", TRANSFORMERS, "run", "transformers 5.24", on_request=True),
    Reads(
        "onnxruntime",
        "onnx",
        ONNX,
        "run",
        "onnxruntime 1.32, onnxruntime-genai 0.18",
        note="processors; Ernie 4.5, Gemma 1 to 3, Granite, Llama, Mistral, Phi-3, Qwen 2 and 3",
    ),
)

GPTQMODEL_LOAD = 'from gptqmodel import GPTQModel\n\nmodel = GPTQModel.load("{folder}")'
# Libraries that load folders, and are no target of a recipe: ``qtool verify --engine`` runs them too.
LIBRARIES = (
    Reads("gptqmodel", "gptq", GPTQMODEL_LOAD, "run", "gptqmodel 7.7", packages=("gptqmodel",)),
    Reads("gptqmodel", "gptq-v2", GPTQMODEL_LOAD, "run", "gptqmodel 7.7", packages=("gptqmodel",)),
    Reads("gptqmodel", "awq", GPTQMODEL_LOAD, "docs", "gptqmodel 7.7", AWQ_GROUPS, packages=("gptqmodel",)),
    Reads("auto-round", "auto-round", TRANSFORMERS, "run", "auto-round 0.16.1", packages=("transformers",)),
)
# transformers and compressed-tensors 0.18 to 0.20, of a folder with one asymmetric grid
DEQUANTIZED = TRANSFORMERS.replace("import Auto", "import CompressedTensorsConfig, Auto").replace(
    'from_pretrained("{folder}")\nt',
    'from_pretrained(\n    "{folder}", quantization_config=CompressedTensorsConfig(dequantize=True)\n)\nt',
)


def reads(engine: str, format: str) -> Reads | None:
    """Return what the engine, or the library, reads of the format; ``None``: nothing."""
    rows = (*READS, *LIBRARIES)
    return next((row for row in rows if (row.engine, row.format) == (engine, format)), None)


def formats_of(engine: str) -> tuple[str, ...]:
    """Return the formats that the engine reads, the best first."""
    return tuple(row.format for row in READS if row.engine == engine)


def load_commands(format: str, engine: str, folder: str = "FOLDER") -> str:
    """Return the command or the Python code with which ``engine`` loads ``folder``, which was written as ``format``.

    ``ENGINES[engine].code`` is its language.

    Raises:
        KeyError: the engine reads nothing of the format.
    """
    row = reads(engine, format)
    if row is None:
        raise KeyError(f"{engine} does not read {format}")
    return row.load.replace("{folder}", folder)
