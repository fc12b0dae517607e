"""The demonstration: a tiny model of random weights, and a tour that serves it."""
