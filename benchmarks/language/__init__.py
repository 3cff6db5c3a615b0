"""Real language and embedding models, from packages: what quantization costs them."""
