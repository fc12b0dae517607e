"""llmstudioctl: a client of the admin socket, nothing more."""
