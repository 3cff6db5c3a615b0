"""Arrays to codebooks: one-dimensional k-means, where it starts, and what its clusters lose."""
