"""What reads the outside world for the core: files, GGUF headers, the llama-server binary."""
