"""Explain a whole dataset, on one machine or many, into a Zarr store.

`explain_dataset` runs methods over a dataset in one process, or in each of those that `torchrun` starts. Take it on one
machine and on a fixed number of them: it resumes after anything, and its store is the same to the bit however it came
about. `Explainer` is a callable for Ray Data. Take it where there is a Ray cluster, where machines come and go, or
where explanations are one step of a pipeline: results flow on as columns.

The store is plain Zarr, format 3. Nothing of this package is needed to read it:

    zarr.open_group("maps.zarr")["integrated_gradients"][7]       # NumPy
    xarray.open_zarr("maps.zarr", consolidated=False)             # with names of axes
    dask.array.from_zarr("maps.zarr", "integrated_gradients")     # more than memory holds

Needs zarr: ``pip install 'pullback[scale]'``.
"""

from pullback.dataset._ray import Explainer as Explainer
from pullback.dataset._run import explain_dataset as explain_dataset
from pullback.dataset._store import open_store as open_store
from pullback.dataset._store import read as read

__all__ = ["Explainer", "explain_dataset", "open_store", "read"]
