"""A figure that a notebook shows; imported where matplotlib is there."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.figure import Figure


class Picture(Figure):
    """A figure that shows as the last expression of a cell.

    matplotlib registers how figures show with IPython only once pyplot is imported.
    """

    def savefig(self, *args: Any, **kwargs: Any) -> None:
        """Write the figure on its own ground: that of the settings may be dark, as letters are."""
        super().savefig(*args, **{"facecolor": self.get_facecolor(), **kwargs})

    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        self.savefig(png, format="png")
        return png.getvalue()
