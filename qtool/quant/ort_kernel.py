"""ONNX Runtime's ``MatMulNBits`` on a processor: 2, 4 and 8 bits, with the input rounded to 8 bits.

The weight is exact: the codes (3 bits as 4), the zero points and the scales, as float32, are those of the grid. The
input is not: ONNX Runtime rounds it, in blocks of the weight's group or in rows, to multiples of ``max |x| / 127``. So
an output is off by at most ``max |x| / 127 * sum_j |w_j|``, and for an input without a pattern by a random number with

    sigma <= max |x| / 127 / sqrt(12) * sqrt(sum_j w_j**2)

which comes to 0.4 to 0.8 % of a layer's output (norm of the error over norm of the output, normal inputs).
``tolerance`` is ``SIGMAS`` of them; a kernel that is further off is not used. ``docs/deploy/decode.md`` has measured
errors.

Each linear has a session of one node. ONNX Runtime copies the weight into the layout of its kernel when the session is
made, and frees the arrays that it was given. So a weight is in memory twice: as the packed words, from which prompts,
gradients, the state dict and exports are computed, and in the kernel's layout. The threads of a session sleep when its
product is done (``allow_spinning``), so that torch has the processor; a linear has one thread for ``THREAD_BYTES`` of
its weight, and no more than torch. One pool for all sessions would be smaller, but its threads cannot be kept from
spinning.
"""

from importlib.util import find_spec
from math import sqrt
from typing import Any, NoReturn

import numpy as np
import torch
from packaging.version import Version
from torch import Tensor

from qtool.config.quant import QuantSpec
from qtool.quant import affine
from qtool.quant.affine import QuantizedWeight
from qtool.system.distribution import install

BLOCKS = (
    128,
    64,
    32,
    16,
)  # channels with one scale that the kernels know; larger groups are cut, their scales repeated
WIDTHS = {2: 2, 3: 4, 4: 4, 8: 8}  # bits of a grid -> bits in the kernel
OLDEST = "1.28"  # the first version that multiplies 2-bit codes by an 8-bit input
INT8 = 4  # accuracy_level of MatMulNBits: 8-bit input, 32-bit sums
SIGMAS = 8.0
FLOAT_ERROR = 2.0**-16  # rounding of float32 sums, relative to the sum of the absolute values of all their terms
THREAD_BYTES = 1 << 20  # a thread takes some 30 us to wake, in which another one reads 300 kB
OPSETS = (("", 21), ("com.microsoft", 1))
IR_VERSION = 10


def missing() -> str | None:
    """Return the reason why the packages cannot be used, or ``None``."""
    absent = [name for name in ("onnxruntime", "onnx") if find_spec(name) is None]
    if absent:
        return f"{' and '.join(absent)} not installed: {install('ort')}"
    import onnxruntime as ort

    old = Version(ort.__version__) < Version(OLDEST)
    return f"onnxruntime {ort.__version__} is older than {OLDEST}: {install('ort')}" if old else None


def refuses(spec: QuantSpec, out: int, in_: int) -> str | None:
    """Return the reason why a weight ``[out, in]`` on this grid cannot be held, or ``None``."""
    if spec.num_bits not in WIDTHS:
        return f"no kernel for {spec.num_bits} bits"
    if spec.float_zero:
        return "no kernel for zero points between codes"
    if _block(spec, in_) is None:
        size = in_ if spec.group_size == -1 else spec.group_size
        return f"groups of {size} channels are not a multiple of {_smallest(spec)}"
    return None


def _smallest(spec: QuantSpec) -> int:
    return 32 if spec.num_bits == 2 else 16


def _block(spec: QuantSpec, in_features: int) -> int | None:
    """Return the largest block that divides every group of ``spec``; ``None`` if there is none."""
    size = in_features if spec.group_size == -1 else spec.group_size
    return next((block for block in BLOCKS if block >= _smallest(spec) and size % block == 0), None)


class Product:
    """A session that multiplies by one weight. The weight never changes, so copies of a layer share it."""

    def __init__(self, session: Any, nbytes: int) -> None:
        """Keep ``session``, whose weight takes ``nbytes``."""
        self.session, self.nbytes = session, nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """Map ``x [rows, in]`` float32 to ``[rows, out]``; ONNX Runtime reads and torch gets the same memory."""
        outputs = self.session.run(["y"], {"x": x.detach().numpy()})
        return torch.from_numpy(outputs[0])

    def __deepcopy__(self, memo: dict[int, Any]) -> "Product":
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a layer with an ort kernel cannot be pickled: call use_backend(model, 'exact') before")


def prepare(weight: QuantizedWeight) -> tuple[Any, ...]:
    """Return the session of ``weight``, as the state of a kernel."""
    codes, scale, zero_point, spec = weight
    (out_features, in_features), block, bits = codes.shape, _block(spec, codes.shape[1]), WIDTHS[spec.num_bits]
    assert block is not None
    assert spec.symmetric or torch.equal(zero_point, zero_point.round()), "a zero point between two codes"
    repeats = in_features // block // scale.shape[1]
    if spec.symmetric:  # without zero points the kernel subtracts the middle of its own width
        codes = codes + (2 ** (bits - 1) - spec.middle)
    blocks = {
        "codes": _bytes(codes, bits).view(out_features, in_features // block, -1).numpy(),
        "scale": scale.repeat_interleave(repeats, 1).float().numpy(),
    }
    if not spec.symmetric:
        blocks["zero_point"] = _bytes(zero_point.to(torch.uint8).repeat_interleave(repeats, 1), bits).numpy()
    session = _session(blocks, in_features, block, bits)
    # the kernel's layout has a sum for each block beside its codes; the scales are kept as they were given
    return (Product(session, blocks["codes"].nbytes + 2 * blocks["scale"].nbytes),)


def _bytes(codes: Tensor, bits: int) -> Tensor:
    """Pack ``codes [out, n]`` into ``[out, bytes]``, the first code of a byte in its lowest bits."""
    each = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % each)).view(len(codes), -1, each)
    packed = codes[..., 0].clone()
    for position in range(1, each):
        packed |= codes[..., position] << (bits * position)
    return packed


def _session(blocks: dict[str, Any], in_features: int, block: int, bits: int) -> Any:
    """Return an ONNX Runtime session of one ``MatMulNBits``, from ``x [rows, in]`` to ``y [rows, out]``."""
    import onnxruntime as ort
    from onnx import TensorProto, helper

    out_features = len(blocks["codes"])
    node = helper.make_node(
        "MatMulNBits",
        ["x", *blocks],
        ["y"],
        domain="com.microsoft",
        K=in_features,
        N=out_features,
        bits=bits,
        block_size=block,
        accuracy_level=INT8,
    )
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", size])
        for name, size in (("x", in_features), ("y", out_features))
    ]
    held = [_held_outside(name, array) for name, array in blocks.items()]
    graph = helper.make_graph([node], "linear", ends[:1], ends[1:], held)
    opsets = [helper.make_opsetid(*each) for each in OPSETS]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)

    options = ort.SessionOptions()
    weight_bytes = blocks["codes"].nbytes
    options.intra_op_num_threads = max(1, min(torch.get_num_threads(), weight_bytes // THREAD_BYTES))
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    options.enable_cpu_mem_arena = False  # an arena takes memory in powers of two
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    flat = [array.reshape(-1).view(np.uint8) for array in blocks.values()]
    options.add_external_initializers_from_files_in_memory(list(blocks), flat, [each.nbytes for each in flat])
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _held_outside(name: str, array: Any) -> Any:
    """Return the tensor ``name`` of a model whose numbers are in a buffer of that name."""
    from onnx import TensorProto

    kind = TensorProto.FLOAT if array.dtype == np.float32 else TensorProto.UINT8
    tensor = TensorProto(name=name, data_type=kind, dims=array.shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", name), ("offset", "0"), ("length", str(array.nbytes))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def matmul(x: Tensor, product: Product) -> Tensor:
    """Map ``x [rows, in]`` float32 to ``[rows, out]``."""
    y: Tensor = product(x)
    return y


def tolerance(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """Return the largest allowed error of each output ``[rows, out]`` for rows ``x [rows, in]`` of random numbers."""
    codes, scale, zero_point, spec = weight
    dense = affine.dequantize(*weight)
    sigma = x.abs().amax(-1, keepdim=True) / 127 / sqrt(12) * dense.norm(dim=1)
    terms = scale.abs().unsqueeze(-1) * (affine.grouped(codes, spec).float() + zero_point.unsqueeze(-1))
    found: Tensor = SIGMAS * sigma + FLOAT_ERROR * x.abs() @ terms.flatten(1).T
    return found
