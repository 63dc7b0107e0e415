"""Cutting bytes into whole lines. Pure; offsets are bytes."""

# Up to here a line is read as a whole; what AI plugins log of a request and its answer is well below.
MAX_LINE_BYTES = 16 * 1024 * 1024


def whole_lines(data: bytes) -> int:
    """Length of the part of `data` that ends with its last newline; 0 when no line is complete.

    A line is complete with its newline and not before: what a timer would cut off may be half an entry.
    """
    return data.rfind(b"\n") + 1


def first_line(data: bytes) -> bytes:
    """The first complete line with its newline; empty when none is complete."""
    return data[: data.find(b"\n") + 1]
