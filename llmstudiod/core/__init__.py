"""The pure part: events in, actions out; no I/O, clocks or logging."""
