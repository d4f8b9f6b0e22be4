"""The arrays of a checkpoint, written and read slice by slice, so that no stack of layers need be in memory.

What is written is Orbax's layout without its database: a folder for each array, named by its path, which holds it as
zarr in uncompressed chunks, and `_METADATA`, the tree. Orbax restores it like any other. What is read may as well be
an item that Orbax wrote, database and compression included.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

Shape = tuple[int, ...]
Place = tuple[int | slice, ...]


class ArrayInfo(NamedTuple):
    """An array and the chunks it is stored in."""

    dtype: np.dtype
    shape: Shape
    chunk: Shape

    @property
    def stored_bytes(self) -> int:
        """Chunks are stored whole."""
        rounded = (-(-n // c) * c for n, c in zip(self.shape, self.chunk, strict=True))
        return math.prod(rounded) * self.dtype.itemsize


class ArrayWriter:
    """A new item of a checkpoint, such as `STEP/variables`."""

    def __init__(self, folder: str | os.PathLike[str], arrays: Mapping[str, ArrayInfo]) -> None:
        """Creates the folder and the empty arrays, which are named by paths like `params/llm/head`."""
        folder = Path(folder).absolute()
        folder.mkdir()
        tree = {}
        for path, info in arrays.items():
            value = {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(info.shape)}
            keys = path.split("/")
            key_metadata = [{"key": key, "key_type": 2} for key in keys]  # of dictionaries
            tree[str(tuple(keys))] = {"key_metadata": key_metadata, "value_metadata": value}
        metadata = {
            "tree_metadata": tree,
            "use_ocdbt": False,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        (folder / "_METADATA").write_text(json.dumps(metadata), encoding="utf-8")
        self._stores = {path: self._create(folder / path.replace("/", "."), info) for path, info in arrays.items()}

    def _create(self, folder: Path, info: ArrayInfo) -> Any:
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{folder}/", "file_io_sync": False},  # the commit marker syncs
            "metadata": {"chunks": list(info.chunk), "compressor": None},
            "store_data_equal_to_fill_value": True,
        }
        return ts.open(spec, create=True, dtype=info.dtype.name, shape=info.shape).result()

    def write(self, path: str, place: Place, value: np.ndarray) -> None:
        """Writes a part of an array, best a whole chunk."""
        self._stores[path][place].write(value).result()


class ArrayReader:
    """An item of a checkpoint; `infos` says what it holds."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Opens all arrays. Raises ValueError: the folder is no such item."""
        folder = Path(folder).absolute()
        metadata = json.loads((folder / "_METADATA").read_text(encoding="utf-8"))
        driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
        self._stores: dict[str, Any] = {}
        for entry in metadata["tree_metadata"].values():
            if entry["value_metadata"]["skip_deserialize"]:
                continue  # an empty group
            keys, base = [key["key"] for key in entry["key_metadata"]], {"driver": "file", "path": f"{folder}/"}
            kvstore: Any = {"driver": "ocdbt", "base": base} if metadata["use_ocdbt"] else base
            name = f"{'.'.join(keys)}/"
            kvstore = {**kvstore, "path": kvstore.get("path", "") + name}
            self._stores["/".join(keys)] = ts.open({"driver": driver, "kvstore": kvstore}, open=True, read=True)
        self._stores = {path: store.result() for path, store in self._stores.items()}
        self.infos = {
            path: ArrayInfo(store.dtype.numpy_dtype, tuple(store.shape), tuple(store.chunk_layout.read_chunk.shape))
            for path, store in self._stores.items()
        }

    def read(self, path: str, place: Place = ()) -> np.ndarray:
        """A part of an array; all of it by default."""
        return self._stores[path][place].read().result()
