"""Plain text tables for the commands that describe a recipe."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """Columns of equal width; numbers to the right, the columns `left` to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
    return "\n".join(lines)
