"""Unpacking of compressed logs: gzip and zstd, in bounded memory, as far as they unpack.

Told by what a file begins with, never by its name. Several members or frames in one file are one content, as gzip and
zstd themselves see it. Never decides what a file that ends too early means: it may still be being written.
"""

import os
import zlib
from collections.abc import Iterator
from typing import BinaryIO, Literal, Protocol

import zstandard

Compression = Literal["gzip", "zstd"]

_GZIP_MAGIC, _ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
# What pzstd begins with.
_ZSTD_SKIPPABLE_MAGICS = tuple(bytes((first,)) + b"\x2a\x4d\x18" for first in range(0x50, 0x60))
MAGIC_BYTES = 4
GZIP_SIZE_MODULUS = 2**32
ENDS_EARLY = "it ends in the middle"
# What is unpacked in one step is bounded by what goes into it: gzip makes at most 1,032 bytes of one, zstd 32,768.
_STEP_BYTES: dict[Compression, int] = {"gzip": 16 * 1024, "zstd": 512}
_GZIP_WINDOW = 31  # zlib's code for: a gzip header, and its checksum


class Damaged(Exception):
    """A compressed file can't be unpacked any further; all that could be was handed out before."""


class _Member(Protocol):
    """One member or frame being unpacked: zlib's and zstandard's common part."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def compression_of(beginning: bytes) -> Compression | None:
    """How a file is compressed, by its first `MAGIC_BYTES` bytes; None when it is not."""
    if beginning.startswith(_GZIP_MAGIC):
        return "gzip"
    return "zstd" if beginning.startswith((_ZSTD_MAGIC, *_ZSTD_SKIPPABLE_MAGICS)) else None


def declared_size(fd: int, compression: Compression) -> int | None:
    """What a file with one member says that it holds, in bytes (gzip: modulo 2^32). Raises OSError."""
    if compression == "gzip":
        return int.from_bytes(os.pread(fd, 4, max(0, os.fstat(fd).st_size - 4)), "little")
    try:
        size = zstandard.get_frame_parameters(os.pread(fd, 18, 0)).content_size
    except zstandard.ZstdError:
        return None
    return None if size == zstandard.CONTENTSIZE_UNKNOWN else size


def unpack(file: BinaryIO, compression: Compression) -> Iterator[bytes]:
    """The content of a file, from its beginning, in pieces of at most 16 MiB.

    Raises: Damaged once all that unpacks was yielded, saying why no more does; OSError as reading does.
    """
    unpacker = Unpacker(compression)
    while data := file.read(_STEP_BYTES[compression]):
        yield from unpacker.feed(data)
    unpacker.end()


class Unpacker:
    """Unpacks what comes bit by bit: all members or frames of it, one after the other."""

    def __init__(self, compression: Compression) -> None:
        self._compression = compression
        self._member: _Member | None = None
        self._members = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What `data` unpacks to, in pieces of at most 16 MiB. Raises Damaged, and must not be fed again then."""
        step = _STEP_BYTES[self._compression]
        for begin in range(0, len(data), step):
            yield from self._feed_step(data[begin : begin + step])

    def _feed_step(self, data: bytes) -> Iterator[bytes]:
        while data:
            if self._member is None:
                if self._members and self._compression == "gzip":
                    # Tapes and some writers fill the end with NULs; gzip ignores them, too.
                    data = data.lstrip(b"\0")
                    if not data:
                        return
                self._member, self._members = _new_member(self._compression), self._members + 1
            yield from _unpacked(self._member, data)
            data = self._member.unused_data if self._member.eof else b""
            if self._member.eof:
                self._member = None

    def end(self) -> None:
        """There is no more. Raises Damaged where there should be."""
        if self._member is not None:
            raise Damaged(ENDS_EARLY)


def _unpacked(member: _Member, data: bytes) -> Iterator[bytes]:
    """What `data` unpacks to; where it is damaged, what stands before the damage."""
    before = member.copy() if isinstance(member, _ZLIB_MEMBER) else None
    try:
        piece = member.decompress(data)
    except (zlib.error, zstandard.ZstdError) as error:
        if before is not None:
            yield from _up_to_damage(before, data)
        raise Damaged(str(error)) from None
    if piece:
        yield piece


def _up_to_damage(member: _Member, data: bytes) -> Iterator[bytes]:
    """Byte by byte: zlib hands nothing out of a step that fails."""
    for position in range(len(data)):
        try:
            piece = member.decompress(data[position : position + 1])
        except zlib.error:
            return
        if piece:
            yield piece


def _new_member(compression: Compression) -> _Member:
    if compression == "gzip":
        return zlib.decompressobj(_GZIP_WINDOW)
    return zstandard.ZstdDecompressor().decompressobj()


_ZLIB_MEMBER = type(zlib.decompressobj())
