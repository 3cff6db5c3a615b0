"""Weight-clustering quantization for JAX: single- and multiple-level quantization (SLQ, MLQ)."""

from jaxquant.centroids import centroid_gradients, set_centroids
from jaxquant.codebooks import assign, num_centroids, reconstruct
from jaxquant.kmeans import KMeansResult, kmeans
from jaxquant.metrics import LayerReport, Report, report
from jaxquant.quantize import QuantState, RoundInfo, init, is_on_codebook, quantize_round
from jaxquant.schedules import Plan, mlq, slq
from jaxquant.selection import LayerRule, Selection, select
from jaxquant.transforms import freeze_quantized

__version__ = "0.1.0"

__all__ = [
    "KMeansResult",
    "LayerReport",
    "LayerRule",
    "Plan",
    "QuantState",
    "Report",
    "RoundInfo",
    "Selection",
    "assign",
    "centroid_gradients",
    "freeze_quantized",
    "init",
    "is_on_codebook",
    "kmeans",
    "mlq",
    "num_centroids",
    "quantize_round",
    "reconstruct",
    "report",
    "select",
    "set_centroids",
    "slq",
]
