"""llmstudiod: one OpenAI endpoint for the GGUF models of a Linux box."""

__version__ = "0.1.0"
