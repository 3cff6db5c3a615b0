"""Weight-clustering quantization for JAX: single- and multiple-level quantization (SLQ, MLQ)."""

from jaxquant import product
from jaxquant.calibration.allocate import Allocation, allocate
from jaxquant.calibration.calibrate import calibrate
from jaxquant.calibration.in_order import quantize_in_order
from jaxquant.calibration.moments import input_moments
from jaxquant.clustering.codebooks import assign, num_centroids, reconstruct
from jaxquant.clustering.kmeans import KMeansResult, kmeans
from jaxquant.clustering.options import Clustering
from jaxquant.packing.arrays import PackedArray, ProductArray, pack_array
from jaxquant.packing.function import packed
from jaxquant.packing.lut_b import from_lut_b, to_lut_b
from jaxquant.packing.ops import conv, matmul
from jaxquant.packing.report import LayerReport, Report, report
from jaxquant.packing.storage.api import load, read_metadata, save
from jaxquant.packing.storage.entries import Limits
from jaxquant.packing.trees import pack, unpack
from jaxquant.rounds.calibration import Calibration
from jaxquant.rounds.centroids import centroid_gradients, set_centroids
from jaxquant.rounds.quantize import RoundInfo, init, quantize_round
from jaxquant.rounds.schedules import Plan, inq, mlq, slq
from jaxquant.rounds.selection import LayerRule, Selection, select
from jaxquant.rounds.state import QuantState, is_on_codebook
from jaxquant.rounds.straight_through import release, settle, straight_through
from jaxquant.rounds.transforms import IncrementalState, freeze_quantized, incremental, quant_state

__version__ = "0.1.0"

__all__ = [
    "Allocation",
    "Calibration",
    "Clustering",
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
    "allocate",
    "assign",
    "calibrate",
    "centroid_gradients",
    "conv",
    "freeze_quantized",
    "from_lut_b",
    "incremental",
    "init",
    "input_moments",
    "inq",
    "is_on_codebook",
    "kmeans",
    "load",
    "matmul",
    "mlq",
    "num_centroids",
    "pack",
    "pack_array",
    "packed",
    "product",
    "quant_state",
    "quantize_in_order",
    "quantize_round",
    "read_metadata",
    "reconstruct",
    "release",
    "report",
    "save",
    "select",
    "set_centroids",
    "settle",
    "slq",
    "straight_through",
    "to_lut_b",
    "unpack",
]
