"""The one kind of CSV row that everything timed here becomes: of a layer, of a network, anywhere.

What is compared (one layer or network, on one device, in one setting) has a row for each side and
each mode. benchmarks/README.md says what each column means.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any, get_type_hints

import torch

from ssprop_patch._csv_table import CsvTable
from ssprop_patch._text import sizes
from ssprop_patch.timing import Quantiles, device_name


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is compared, and where: the columns that are alike for all sides and modes."""

    name: str
    device: str
    dtype: str
    memory_format: str
    shape: str
    drop_rate: float
    selection: str
    options: str
    iterations: int
    threads: int
    torch: str
    timm: str
    python: str

    @classmethod
    def here(
        cls,
        device: torch.device,
        *,
        shape: Sequence[int],
        dtype: torch.dtype,
        amp: bool,
        memory_format: torch.memory_format,
        **others: Any,
    ) -> Setting:
        """Add what this process and this machine say of themselves.

        Args:
            device: What computes.
            shape: Of the input.
            dtype: Of the parameters and the input.
            amp: Whether the forward runs under autocast to bfloat16.
            memory_format: Of the input and the weights.
            **others: The columns ``name``, ``drop_rate``, ``selection``, ``options`` and
                ``iterations``.
        """
        return cls(
            device=device_name(device),
            shape=sizes(shape),
            dtype="bfloat16 autocast" if amp else _word(dtype),
            memory_format=_word(memory_format).removesuffix("_format"),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            timm=version("timm"),
            python=platform.python_version(),
            **others,
        )


@dataclass(frozen=True, kw_only=True)
class Row(Setting):
    """One side in one mode. Milliseconds and MiB; None where a column says nothing."""

    side: str
    mode: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    share_of_dense: float
    limit_ms: float | None
    kernel: str
    peak_memory_mib: float | None

    @property
    def setting(self) -> Setting:
        """The columns that it shares with the other sides and modes."""
        return Setting(**{f.name: getattr(self, f.name) for f in fields(Setting)})

    @property
    def limit(self) -> float | None:
        """``limit_ms`` as a share of dense, as ``share_of_dense`` is."""
        return None if self.limit_ms is None else self.share_of_dense * self.limit_ms / self.p50_ms


#: The columns, in order. Who computes what comes first, versions come last.
FIELDS = (
    "name",
    "device",
    "dtype",
    "memory_format",
    "shape",
    "drop_rate",
    "selection",
    "options",
    "side",
    "mode",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "share_of_dense",
    "limit_ms",
    "kernel",
    "peak_memory_mib",
    "iterations",
    "threads",
    "torch",
    "timm",
    "python",
)


def compare(
    setting: Setting,
    modes: Sequence[str],
    seconds: Mapping[str, Sequence[Quantiles]],
    left: Mapping[str, float],
    *,
    kernels: Mapping[str, str] | None = None,
    peaks: Mapping[str, float | None] | None = None,
) -> list[Row]:
    """Make the rows of one comparison.

    Args:
        setting: What was compared.
        modes: What was timed: ``"forward"``, ``"backward"`` and, last, the whole, which also gets
            the peak.
        seconds: For each side, ``"dense"`` among them, the quantiles of each mode.
        left: For each side the part of the dense backward that its arithmetic leaves, in (0, 1].
        kernels: For some sides, how their backward is computed.
        peaks: For some sides, their peak memory in MiB.
    """
    dense = {mode: 1e3 * q.p50 for mode, q in zip(modes, seconds["dense"], strict=True)}
    rows = []
    for side, quantiles in seconds.items():
        # Were the backward all that shrinks, and free of everything but its arithmetic.
        spared = dense["backward"] * (1 - left[side])
        for mode, q in zip(modes, quantiles, strict=True):
            p20, p50, p80 = (1e3 * s for s in q)
            peak = (peaks or {}).get(side) if mode == modes[-1] else None
            rows.append(
                Row(
                    **asdict(setting),
                    side=side,
                    mode=mode,
                    p20_ms=round(p20, 5),
                    p50_ms=round(p50, 5),
                    p80_ms=round(p80, 5),
                    share_of_dense=round(p50 / dense[mode], 4),
                    limit_ms=None if mode == "forward" else round(dense[mode] - spared, 5),
                    kernel=(kernels or {}).get(side, ""),
                    peak_memory_mib=None if peak is None else round(peak, 2),
                )
            )
    return rows


def table(path: Path) -> CsvTable:
    """Return the CSV at ``path``, of which no row need be there yet."""
    return CsvTable(path, FIELDS)


def append(path: Path, rows: Iterable[Row]) -> None:
    """Write ``rows`` at the end of a CSV, which is begun if it is not there.

    Raises:
        ValueError: If the file has other columns, or its folder is missing.
    """
    found = table(path)
    found.check()
    found.append(map(asdict, rows))


def read(path: Path) -> list[Row]:
    """Return the rows of a CSV, without one that a killed process left unfinished.

    Raises:
        ValueError: If there is no such file, it has other columns, or a cell is not of its
            column's type.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    hints = get_type_hints(Row)
    found = []
    for number, cells in enumerate(table(path).read(), 2):
        try:
            found.append(Row(**{name: _value(hints[name], cells[name]) for name in FIELDS}))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return found


def _value(hint: Any, text: str | None) -> Any:
    if text is None:
        raise ValueError("the line is too short")
    if hint == float | None:
        return float(text) if text else None
    return hint(text)


def _word(constant: torch.dtype | torch.memory_format) -> str:
    return str(constant).removeprefix("torch.")


def version(package: str) -> str:
    """Return the version of a package; empty if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
