"""Tables of text, for terminals and for Markdown."""

from collections.abc import Sequence

Cells = Sequence[str]


def text(
    header: Cells,
    body: Sequence[Cells],
    totals: Sequence[Cells] = (),
    *,
    left_columns: int,
) -> str:
    """Aligns columns: the first left_columns to the left, the others right."""
    columns = zip(header, *body, *totals)
    widths = [max(len(cell) for cell in column) for column in columns]

    def line(row):
        aligned = [
            cell.ljust(width) if i < left_columns else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ]
        return "  ".join(aligned)

    rule = "-" * len(line(header))
    lines = [line(header), rule, *map(line, body)]
    if totals:
        lines += [rule, *map(line, totals)]
    return "\n".join(lines)


def markdown(
    header: Cells,
    body: Sequence[Cells],
    totals: Sequence[Cells] = (),
    *,
    left_columns: int,
) -> str:
    """The same as Markdown."""
    marks = ["---" if i < left_columns else "--:" for i in range(len(header))]
    lines = [header, marks, *body, *totals]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
