"""Trees to quantized trees: which leaves, when, and rounds that cluster, partition and share."""
