"""Relevance: the score, or a probability, shared out backwards from layer to layer.

The rules that do so are in `pullback.rules`. They catch operations, so they are right on any architecture without
preparation: skips, in-place additions, concatenation, shared layers, attention.

Layer-wise relevance propagation is covered by patents in some places: before you use it in a product, check.
"""
