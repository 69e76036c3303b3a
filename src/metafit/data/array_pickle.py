"""Reads a pickle that holds one plain NumPy array, and refuses everything else that a pickle can do."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np

from metafit.errors import BadInput


def loads(content: bytes, what: str) -> np.ndarray:
    """The array in a pickle made by ``pickle.dump(array)``; ``what`` names it in messages.

    Only an empty array and a dtype can be made, and only their state be set: no other name is ever looked up.

    Raises:
        BadInput: the pickle asks for anything else, is damaged, or holds no numeric array.
    """
    try:
        array = _ArrayUnpickler(io.BytesIO(content)).load()
    except BadInput:
        raise
    except Exception as error:  # a damaged pickle fails in any way it likes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{what}: not a readable array ({reason}); fetch the file again") from error
    if not isinstance(array, np.ndarray) or array.dtype.hasobject:
        raise BadInput(f"{what}: it holds {type(array).__name__}, not a numeric array; it is not loaded")
    return array


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _empty_array
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise BadInput(f"a pickled array asks for {module}.{name}; only plain arrays are read, it is not loaded")

    def persistent_load(self, pid: Any) -> Any:
        raise BadInput("a pickled array refers to an outside object; only plain arrays are read, it is not loaded")


def _empty_array(kind: type, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Stands for NumPy's own ``_reconstruct``, for plain arrays alone."""
    if kind is not np.ndarray:
        raise BadInput("a pickled array is of a subclass; only plain arrays are read, it is not loaded")
    return np.ndarray.__new__(np.ndarray, shape, dtype)
