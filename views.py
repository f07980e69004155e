"""Results as text: aligned, and readable in a narrow terminal too."""

# ---- Output.


def outcome(result: Outcome, *, nothing: str = "nothing to do: everything is as it should be") -> Result:
    """What was done, or would be, one line an action."""
    if not result.actions:
        return Result(result.as_dict(), nothing)
    width = max(len(action.vm) for action in result.actions)
    lead = "would: " if result.planned else ""
    lines = [f"{lead}{f'{a.vm:<{width}}  ' if width else ''}{a.text}" for a in result.actions]
    return Result(result.as_dict(), "\n".join(lines))


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, width: int | None = None) -> str:
    """Aligned columns; where they don't fit the terminal, one block a row instead."""
    if width is None:
        import shutil

        width = shutil.get_terminal_size((200, 24)).columns if sys.stdout.isatty() else 10_000
    columns = [max(len(str(cell)) for cell in column) for column in zip(headings, *rows, strict=True)]
    if sum(columns) + 2 * (len(columns) - 1) <= width:
        return "\n".join(
            "  ".join(f"{cell:<{w}}" for cell, w in zip(row, columns, strict=True)).rstrip()
            for row in (headings, *rows)
        )
    label = max(len(h) for h in headings[1:])
    blocks = []
    for row in rows:
        blocks.append(row[0])
        blocks += [
            f"  {h.lower():<{label}}  {cell}" for h, cell in zip(headings[1:], row[1:], strict=True) if cell
        ]
    return "\n".join(blocks)


