"""Many targets of one input: one forward, and pulls in chunks."""
