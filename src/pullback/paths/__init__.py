"""Integrals of the gradient along a path.

A *path* leads from a baseline to the input, or from a baseline's activation at a layer to the input's. Most methods
here are one sum, `integral`: over points of the path, of a weight times a term made of point and velocity. They
differ in the points, and in the term: velocity times gradient for the family of integrated gradients.
"""

from pullback.paths.adaptive import discretised_integrated_gradients as discretised_integrated_gradients
from pullback.paths.adaptive import guided_integrated_gradients as guided_integrated_gradients
from pullback.paths.course import Course as Course
from pullback.paths.course import needs_floating as needs_floating
from pullback.paths.course import starts_of as starts_of
from pullback.paths.integrated import blur_integrated_gradients as blur_integrated_gradients
from pullback.paths.integrated import expected_gradients as expected_gradients
from pullback.paths.integrated import idgi as idgi
from pullback.paths.integrated import integrated_gradients as integrated_gradients
from pullback.paths.integrated import integrated_hessians as integrated_hessians
from pullback.paths.quadrature import Path as Path
from pullback.paths.quadrature import Point as Point
from pullback.paths.quadrature import Quadrature as Quadrature
from pullback.paths.quadrature import Tensors as Tensors
from pullback.paths.quadrature import integral as integral
from pullback.paths.quadrature import on_path as on_path
from pullback.paths.quadrature import quadrature_of as quadrature_of
from pullback.paths.quadrature import stacked as stacked
from pullback.paths.quadrature import straight as straight
