"""One-line messages for errors of the `datasets` library."""

from anchor.errors import first_line


def differing_columns(error: Exception) -> str | None:
    """Describe the columns that differ between the files of a dataset; return None for any other error.

    The library's own text begins with "Couldn't cast" and shows two schemas, or only announces types in its first line.
    """
    found, first = (getattr(error, name, None) for name in ("table_column_names", "requested_column_names"))
    if found is not None and first is not None:
        more = [name for name in found if name not in first]
        less = [name for name in first if name not in found]
        said = [f"has {_columns(more)} that the first file lacks"] if more else []
        said += [f"lacks {_columns(less)} that the first file has"] if less else []
        return f"a file {' and '.join(said)}"
    if isinstance(error, TypeError) and str(error).startswith("Couldn't cast array"):
        return f"a column differs in type between files: {' '.join(str(error).split())}"
    return None


def datasets_line(error: Exception) -> str:
    """Return one line that explains an error of `datasets`."""
    cause = error.__cause__
    return differing_columns(error) or (isinstance(cause, Exception) and differing_columns(cause)) or first_line(error)


def _columns(names: list[str]) -> str:
    return f"{'column' if len(names) == 1 else 'columns'} {', '.join(repr(name) for name in names)}"
