"""Results kept in MongoDB. Needs pymongo, which is imported when a connection is made."""

from __future__ import annotations

import importlib
import io
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pullback.compat.torchray.utils import get_config

__all__ = ["data_from_mongo", "data_to_mongo", "last_lines", "mongo_connect", "mongo_load", "mongo_save"]

_ARRAY = "__array__"


def mongo_connect(database: str) -> Any:
    """Connect to a database on the server that `get_config` names."""
    try:
        pymongo = importlib.import_module("pymongo")
    except ImportError as error:
        raise ImportError("`mongo_connect` needs pymongo: pip install pymongo") from error
    config = get_config()["mongo"]
    return pymongo.MongoClient(config["hostname"], config["port"])[database]


def mongo_save(database: Any, collection_key: str, id_key: str, data: dict[str, Any]) -> None:
    """Keep `data` under a key in a collection, in the place of what was there."""
    database[collection_key].replace_one({"_id": id_key}, {**data_to_mongo(data), "_id": id_key}, upsert=True)


def mongo_load(database: Any, collection_key: str, id_key: str) -> Any:
    """Give what is kept under a key in a collection, or `None`."""
    found = database[collection_key].find_one({"_id": id_key})
    return None if found is None else data_from_mongo({k: v for k, v in found.items() if k != "_id"})


def data_to_mongo(data: Any) -> Any:
    """Write the tensors and arrays in nested dicts and lists as bytes."""
    if isinstance(data, Tensor | np.ndarray):
        buffer = io.BytesIO()
        array = data.detach().cpu().numpy() if isinstance(data, Tensor) else data
        np.save(buffer, array, allow_pickle=False)
        return {_ARRAY: buffer.getvalue(), "tensor": isinstance(data, Tensor)}
    if isinstance(data, dict):
        return {key: data_to_mongo(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [data_to_mongo(value) for value in data]
    return data


def data_from_mongo(data: Any, map_location: Any = None) -> Any:
    """Read what `data_to_mongo` wrote; tensors on `map_location`."""
    if isinstance(data, dict) and _ARRAY in data:
        array = np.load(io.BytesIO(data[_ARRAY]), allow_pickle=False)
        return torch.from_numpy(array).to(map_location or "cpu") if data["tensor"] else array
    if isinstance(data, dict):
        return {key: data_from_mongo(value, map_location) for key, value in data.items()}
    if isinstance(data, list):
        return [data_from_mongo(value, map_location) for value in data]
    return data


def last_lines(string: str, num_lines: int) -> str:
    """Give the last lines of a text."""
    return "\n".join(string.strip().split("\n")[-num_lines:]) if num_lines > 0 else ""
