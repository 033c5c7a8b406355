"""HDF5 files by h5py alone, with errors that name the file and what is in it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from telos.core.errors import DataError, UsageError


def h5py() -> Any:
    """The package h5py. Raises `UsageError` where it is not installed."""
    try:
        return importlib.import_module("h5py")
    except ImportError:
        raise UsageError("HDF5 files need the package h5py: pip install 'telos[data]'") from None


def opened(path: Path) -> Any:
    """The file, for reading; close it. Raises `DataError` for one that is damaged."""
    try:
        return h5py().File(path, "r")
    except OSError as error:
        problem = f"the HDF5 file is damaged or cut off ({str(error).splitlines()[0]})"
        raise DataError(str(path), problem, "Write or download it again") from None


def array(dataset: Any, place: str) -> np.ndarray:
    """All of a data set. Raises `DataError` at `place`."""
    try:
        return np.asarray(dataset[()])
    except (OSError, TypeError, ValueError) as error:
        raise DataError(place, f"cannot be read: {str(error).splitlines()[0]}", "Write or download the file again") from None
