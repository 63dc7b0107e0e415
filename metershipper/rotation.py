"""The names that rotation gives to a log: which file is a part of which log. Pure; nothing is looked up.

Of logrotate: usage.log.1, usage.log-20261121, usage-20261121.log (`extension .log`), each perhaps with .gz or .zst; of
a container runtime: 0.log.20261121-101010.gz. A name says what may be a part, the content (`content`) says whether.
"""

import re
from collections.abc import Iterator
from functools import lru_cache

COMPRESSED_SUFFIXES = (".gz", ".zst")
# What could be a part of a log, but can't be unpacked here.
FOREIGN_SUFFIXES = (".bz2", ".xz", ".lz4", ".Z", ".zip")

_NUMBERED = re.compile(r"\d[\w\-.:]*").fullmatch  # usage.log|.1, usage.log|-2026-11-21T10:00
_DATED = re.compile(r"\.\d[\d\-_T:.]*|[\-_](?=(?:\D*\d){6})\d[\d\-_T:.]*").fullmatch  # usage|-2026-11-21|.log
LEFT_BEHIND = ("~", ".swp", ".tmp", ".bak")


def is_compressed_name(name: str) -> bool:
    """Whether a name is one of a compressed file, whatever it may be compressed with."""
    return name.endswith((*COMPRESSED_SUFFIXES, *FOREIGN_SUFFIXES))


@lru_cache(maxsize=4096)
def logs_of(name: str) -> tuple[str, ...]:
    """The names of the logs that a file of this name may be a part of; the longest first.

    usage-1.log.1 is one of usage-1.log, if there is such a log, and else of usage.log.
    """
    return tuple(_logs_of(name))


def _logs_of(name: str) -> Iterator[str]:
    plain = next((name.removesuffix(suffix) for suffix in COMPRESSED_SUFFIXES if name.endswith(suffix)), name)
    if not plain or plain.endswith((*FOREIGN_SUFFIXES, *LEFT_BEHIND)):
        return
    if plain != name:
        yield plain  # compressed by hand, or by a rotation that does nothing else
    last_dot = plain.rfind(".")
    for at in range(len(plain) - 2, 0, -1):
        if plain[at] in ".-_" and plain[at + 1].isdigit():
            if at < last_dot and _DATED(plain, at, last_dot):
                yield plain[:at] + plain[last_dot:]
            if _NUMBERED(plain, at + 1):
                yield plain[:at]
