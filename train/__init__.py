"""The training program: train or load a network, quantize it round by round, report."""
