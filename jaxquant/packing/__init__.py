"""Quantized trees to small ones that run: packed codes, products with them, files, reports."""
