"""Products of other libraries with quantized weights on CPU, where they are installed."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import common

_BLOCK = 32  # weights that share a scale, as in most models of four bits


def linear(weight: np.ndarray, x: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Return what multiplies x [vectors, rows] with a weight [rows, columns], by name.

    PyTorch in float32 and with weights and inputs of eight bits (dynamic quantization), and
    onnxruntime with weights of four bits in blocks of 32 of a column, its inputs in eight bits
    where that is faster (`accuracy_level` 4). Their weights are random where time does not tell.
    """
    rows, columns = weight.shape
    return _of_torch(weight, x) | _of_onnxruntime(rows, columns, x)


def _of_torch(weight: np.ndarray, x: np.ndarray) -> dict[str, Callable[[], Any]]:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {}
    torch.set_num_threads(common.cores())
    layer = torch.nn.Linear(*weight.shape, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight.T.copy()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a module that is about to move
        narrow = torch.ao.quantization.quantize_dynamic(
            torch.nn.Sequential(layer), {torch.nn.Linear}, dtype=torch.qint8
        )
    inputs = torch.from_numpy(x.copy())

    def run(module: Any) -> Callable[[], Any]:
        def product() -> Any:
            with torch.inference_mode():
                return module(inputs)

        return product

    return {"torch float32": run(layer), "torch int8": run(narrow)}


def _of_onnxruntime(rows: int, columns: int, x: np.ndarray) -> dict[str, Callable[[], Any]]:
    try:
        import onnx  # pyright: ignore[reportMissingImports]
        import onnxruntime  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {}
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (columns, rows // _BLOCK, _BLOCK // 2), np.uint8)
    scales = np.full(columns * rows // _BLOCK, 0.01, np.float32)
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales"],
        ["y"],
        domain="com.microsoft",
        K=rows,
        N=columns,
        bits=4,
        block_size=_BLOCK,
        accuracy_level=4,
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", floats, ["vectors", rows])],
        [helper.make_tensor_value_info("y", floats, ["vectors", columns])],
        [
            onnx.numpy_helper.from_array(codes, "codes"),
            onnx.numpy_helper.from_array(scales, "scales"),
        ],
    )
    sets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=sets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = common.cores()
    # Its threads would else spin when it is the turn of others.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return {"onnxruntime int4": lambda: session.run(None, {"x": x})}
