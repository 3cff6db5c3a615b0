"""Weight-clustering quantization for JAX: single- and multiple-level quantization (SLQ, MLQ)."""

from jaxquant import product
from jaxquant.centroids import centroid_gradients, set_centroids
from jaxquant.codebooks import assign, num_centroids, reconstruct
from jaxquant.kmeans import KMeansResult, kmeans
from jaxquant.metrics import LayerReport, Report, report
from jaxquant.moments import input_moments
from jaxquant.ops import conv, intercept_linen, matmul
from jaxquant.packing import PackedArray, ProductArray, pack, pack_array, unpack
from jaxquant.quantize import QuantState, RoundInfo, init, is_on_codebook, quantize_round
from jaxquant.schedules import Plan, inq, mlq, slq
from jaxquant.selection import LayerRule, Selection, select
from jaxquant.storage import Limits, load, read_metadata, save
from jaxquant.transforms import IncrementalState, freeze_quantized, incremental, quant_state

__version__ = "0.1.0"

__all__ = [
    "IncrementalState",
    "KMeansResult",
    "LayerReport",
    "LayerRule",
    "Limits",
    "PackedArray",
    "Plan",
    "ProductArray",
    "QuantState",
    "Report",
    "RoundInfo",
    "Selection",
    "assign",
    "centroid_gradients",
    "conv",
    "freeze_quantized",
    "incremental",
    "init",
    "input_moments",
    "inq",
    "intercept_linen",
    "is_on_codebook",
    "kmeans",
    "load",
    "matmul",
    "mlq",
    "num_centroids",
    "pack",
    "pack_array",
    "product",
    "quant_state",
    "quantize_round",
    "read_metadata",
    "reconstruct",
    "report",
    "save",
    "select",
    "set_centroids",
    "slq",
    "unpack",
]
