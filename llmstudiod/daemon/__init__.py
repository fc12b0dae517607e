"""The long-running process: sockets, signals, notifications; it builds everything and passes it in."""
