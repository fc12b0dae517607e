"""llmstudio-launcher: the only part that may start something. Everything else runs without any right."""
