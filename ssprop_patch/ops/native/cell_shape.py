"""Maps divided into cells, as C reads them."""

from __future__ import annotations

import ctypes


class CellShape(ctypes.Structure):
    """The fields of ``CellShape`` in csrc/ssprop.h."""

    _fields_ = (
        ("maps", ctypes.c_int64),
        ("c", ctypes.c_int64),
        ("length", ctypes.c_int64 * 2),
        ("start", ctypes.c_int64 * 2),
        ("size", ctypes.c_int64 * 2),
        ("number", ctypes.c_int64 * 2),
    )
