"""A figure that a notebook shows; imported where matplotlib is there."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class Picture(Figure):
    """A figure that shows as the last expression of a cell.

    matplotlib registers how figures show with IPython only once pyplot is imported.
    """

    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        self.savefig(png, format="png")
        return png.getvalue()
