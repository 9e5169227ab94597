"""One torch operation: how it is spelled, what it takes, what is run in its place, and by which rule."""
