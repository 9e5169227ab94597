"""One call of a model: parameters, inputs, layers and targets bound together, run, and pulled back."""
