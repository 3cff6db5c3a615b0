"""A packed tree as one safetensors file, its codes entropy-coded. The format: docs/format.md.

A file is read as if it came from a stranger: nothing in it is executed, every size is checked
before memory is taken for it, and all of it has checksums. What `save` is about to write passes the
same checks first, so that what is saved loads.
"""
