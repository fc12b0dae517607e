"""The embedded engine: llama.cpp's HTTP server inside a Python process, started with ``llama-server``'s flags.

It stands in for ``llama-server`` where only pip can install things: ``python -m llmstudiod.engine -m MODEL ...``.
The server itself comes from the package ``xllamacpp`` (CPU only as published).
"""
