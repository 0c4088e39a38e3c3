"""Tables as text of at most 100 columns, as Markdown, and as HTML for notebooks; numbers and
shapes."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterable, Sequence
from html import escape
from itertools import zip_longest

#: Columns of a screen that a table may take.
WIDTH = 100
_LEAST = 20  # characters that are left of a name, or of a column whose cells are wrapped


def columns(
    rows: Sequence[Sequence[str]],
    *,
    right: Collection[int] = (),
    optional: Sequence[int] = (),
    wrapped: int = 1,
) -> list[str]:
    """Return the lines of a table, one for each row unless a cell is wrapped.

    Where it is wider than ``WIDTH``, the last columns are wrapped, and optional ones left out where
    that is not enough; last of all the first cells, names, are shortened in the middle.

    Args:
        rows: The cells.
        right: Columns that are aligned at the right; the others are at the left.
        optional: Columns that may be left out, in this order.
        wrapped: How many columns, the last ones, may be wrapped.
    """
    kept = list(range(len(rows[0])))
    natural = [max(len(row[i]) for row in rows) for i in kept]
    least = [min(n, _LEAST) if len(kept) - i <= wrapped else n for i, n in enumerate(natural)]
    for i in optional:
        if _total(least[i] for i in kept) > WIDTH:
            kept.remove(i)
    for i in reversed(optional):  # a wide one left out may have made room for a narrow one
        if i not in kept and _total(least[j] for j in (*kept, i)) <= WIDTH:
            kept = sorted((*kept, i))
    widths = [natural[i] for i in kept]
    last = range(len(kept) - wrapped, len(kept))
    for i in (*sorted(last, key=lambda i: -widths[i]), 0):
        too_wide = _total(widths) - WIDTH
        widths[i] -= max(0, min(too_wide, widths[i] - _LEAST))
    lines = []
    for row in rows:
        cells = [[row[i]] for i in kept]
        cells[0] = [_shortened(row[0], widths[0])]
        for i in last:
            cells[i] = textwrap.wrap(row[kept[i]], widths[i]) or [""]
        for parts in zip_longest(*cells, fillvalue=""):
            padded = (
                part.rjust(width) if i in right else part.ljust(width)
                for part, width, i in zip(parts, widths, kept, strict=True)
            )
            lines.append("  ".join(padded).rstrip())
    return lines


def _total(widths: Iterable[int]) -> int:
    return sum(width + 2 for width in widths) - 2


def _shortened(name: str, width: int) -> str:
    if len(name) <= width:
        return name
    return f"{name[: (width - 1) // 2]}…{name[-(width // 2) :]}"


def html(totals: Sequence[Sequence[str]], rows: Sequence[Sequence[str]], what: str) -> str:
    """Return a table of the totals, and one of all rows that unfolds.

    Args:
        totals: Rows of it.
        rows: Rows of the other one, first its header.
        what: What is written where it unfolds.
    """
    head, *body = rows
    return (
        f"<table><tbody>{_html_rows(totals)}</tbody></table>"
        f"<details><summary>{escape(what)}</summary><table>"
        f"<thead>{_html_rows([head], 'th')}</thead><tbody>{_html_rows(body)}</tbody>"
        "</table></details>"
    )


def _html_rows(rows: Sequence[Sequence[str]], tag: str = "td") -> str:
    # Notebooks would put all of it at the right.
    cell = f'<{tag} style="text-align:left">{{}}</{tag}>'
    return "".join(f"<tr>{''.join(cell.format(escape(text)) for text in row)}</tr>" for row in rows)


def percent(share: float) -> str:
    """Return ``39.9 %``; with another digit where it is less than 1."""
    digits = 2 if 0 < abs(share) < 0.01 else 1
    return f"{100 * share:.{digits}f} %"


def aligned(rows: Sequence[Sequence[str]], align: str = "l") -> list[str]:
    """Return a line for each row, its cells below those of the other rows.

    Args:
        rows: Of equal length.
        align: ``"l"`` or ``"r"`` for each column; the last letter stands for all that follow.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    letters = align.ljust(len(widths), align[-1])
    put = [str.ljust if letter == "l" else str.rjust for letter in letters]
    return [
        "  ".join(p(cell, width) for p, cell, width in zip(put, row, widths, strict=True)).rstrip()
        for row in rows
    ]


def table(rows: Sequence[Sequence[str]], align: str = "l", total: bool = False) -> str:
    """Return :func:`aligned` with a rule below the first row and, for a total, above the last."""
    lines = aligned(rows, align)
    rule = "-" * max(map(len, lines))
    last = [rule, lines.pop()] if total else []
    return "\n".join([lines[0], rule, *lines[1:], *last])


def markdown(rows: Sequence[Sequence[str]], align: str = "l") -> str:
    """Return a table as Markdown has it, the first row its head; ``align`` as of aligned."""
    letters = align.ljust(len(rows[0]), align[-1])
    rule = ["---" if letter == "l" else "---:" for letter in letters]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])


def counted(n: int, what: str) -> str:
    """Return ``1 layer``, ``2 layers``: a number of things, ``what`` being one of them."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def sizes(shape: Iterable[int]) -> str:
    """Return ``8x3x224x224``."""
    return "x".join(map(str, shape))


def one_line(text: object, limit: int = 600) -> str:
    """Return a text on one line of at most ``limit`` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
