"""Cutting bytes into whole lines. Pure; offsets are bytes."""

import re

# What rotation leaves beside the log that is followed; these can't be continued at an offset as they are.
COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz", ".lz4")


def whole_lines(data: bytes) -> int:
    """Length of the part of `data` that ends with its last newline; 0 when no line is complete.

    A line is complete with its newline and not before: what a timer would cut off may be half an entry.
    """
    return data.rfind(b"\n") + 1


def first_line(data: bytes) -> bytes:
    """The first complete line with its newline; empty when none is complete."""
    return data[: data.find(b"\n") + 1]


def is_rotated_name(name: str, base: str) -> bool:
    """Whether `name` is what logrotate and its like make of `base`, uncompressed.

    usage.log becomes usage.log.1, usage.log-20261121, usage-20261121.log or usage.1.log.
    """
    if name == base or name.endswith((*COMPRESSED_SUFFIXES, "~", ".swp", ".tmp")):
        return False
    stem, dot, suffix = base.rpartition(".")
    dated = rf"{re.escape(stem)}[.\-_]\d[\d\-_T:.]*{re.escape(dot + suffix)}"
    return bool(re.fullmatch(rf"{re.escape(base)}[.\-_]\d[\w\-.:]*|{dated}", name))
