"""Integrals of the gradient along a path.

A *path* leads from a baseline to the input, or from a baseline's activation at a layer to the input's. Most methods
here are one sum, `integral`: over points of the path, of a weight times a term made of point and velocity. They
differ in the points, and in the term: velocity times gradient for the family of integrated gradients.
"""
