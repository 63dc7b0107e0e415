"""Unpacking: out comes the content or the beginning of it, never anything else. Numbers are those of the cases."""

import gzip
import io
import itertools
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from metershipper.archive import MAGIC_BYTES, Compression, Damaged, Unpacker, compression_of, unpack

MIB = 1024 * 1024
CONTENT = b"".join(b'{"number":%d,"digest":"%08x"}\n' % (n, zlib.crc32(b"%d" % n)) for n in range(300))


def gzipped(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


def zstandardised(data: bytes) -> bytes:
    """With a checksum, as the command makes it."""
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def skippable(data: bytes) -> bytes:
    """A zstd frame that holds no content: what pzstd and others put their own notes in."""
    return struct.pack("<II", 0x184D2A50, len(data)) + data


COMPRESS: dict[Compression, Callable[[bytes], bytes]] = {"gzip": gzipped, "zstd": zstandardised}
both = pytest.mark.parametrize("kind", ["gzip", "zstd"])


def unpacked(data: bytes, kind: Compression) -> tuple[bytes, str | None]:
    """What comes out, and why no more does."""
    found: list[bytes] = []
    try:
        for piece in unpack(io.BytesIO(data), kind):
            found.append(piece)
    except Damaged as damaged:
        return b"".join(found), str(damaged)
    return b"".join(found), None


@both
@given(parts=st.lists(st.binary(max_size=200), min_size=1, max_size=4))
def test_what_was_compressed_comes_out_however_many_members_it_has(kind: Compression, parts: list[bytes]) -> None:
    """Parallel compressors and appended files make several (case 29)."""
    packed = b"".join(map(COMPRESS[kind], parts))
    assert compression_of(packed[:MAGIC_BYTES]) == kind
    assert unpacked(packed, kind) == (b"".join(parts), None)


@pytest.mark.parametrize(
    "data", [b"", b"\x1f", b"\x1f\x8c\x08\0", b"\x28\xb5\x2f", b"\x28\xb5\x2f\xfe", b'{"a":1}\n', b"\0\0\x1f\x8b"]
)
def test_what_begins_otherwise_is_not_compressed(data: bytes) -> None:
    """The name says nothing: a `.gz` may be plain (case 29)."""
    assert compression_of(data) is None


def test_nothing_compressed_is_empty_and_not_damaged() -> None:
    """An empty log that was rotated and compressed (case 29)."""
    assert unpacked(gzipped(b""), "gzip") == (b"", None)
    assert unpacked(zstandardised(b""), "zstd") == (b"", None)
    assert unpacked(b"", "gzip") == unpacked(b"", "zstd") == (b"", None)


@pytest.mark.parametrize("count", [1, 512, 40_000], ids=["one", "a block", "several steps"])
def test_nuls_that_fill_up_the_end_of_a_gzip_are_no_damage(count: int) -> None:
    """Tapes and some writers leave them; gzip ignores them, too (case 29)."""
    assert unpacked(gzipped(CONTENT) + bytes(count), "gzip") == (CONTENT, None)


@pytest.mark.parametrize("at", ["middle", "end"])
def test_a_skippable_frame_holds_no_content(at: str) -> None:
    """(case 29)"""
    frames = zstandardised(CONTENT[:999]), skippable(b"note" * 5000), zstandardised(CONTENT[999:])
    packed = b"".join(frames) if at == "middle" else frames[0] + frames[2] + frames[1]
    assert unpacked(packed, "zstd") == (CONTENT, None)


def test_a_skippable_frame_at_the_beginning_is_zstd_too() -> None:
    """pzstd writes nothing but such files: taken for plain, they would be lines of garbage (case 29)."""
    packed = skippable(b"\x0c\0\0\0") + zstandardised(CONTENT)
    assert compression_of(packed[:MAGIC_BYTES]) == "zstd"
    assert unpacked(packed, "zstd") == (CONTENT, None)


@both
def test_a_file_that_ends_too_early_gives_the_beginning_and_then_damage(kind: Compression) -> None:
    """Cut at every byte: never a wrong one comes out, and never less than from a shorter file (cases 28, 29)."""
    packed = COMPRESS[kind](CONTENT[:600]) + COMPRESS[kind](CONTENT[600:1200])
    members_end = {len(COMPRESS[kind](CONTENT[:600])): CONTENT[:600]}
    most = 0
    for size in range(MAGIC_BYTES, len(packed)):
        content, damage = unpacked(packed[:size], kind)
        if size in members_end:
            assert (content, damage) == (members_end[size], None)
        else:
            assert damage == "it ends in the middle"
            assert CONTENT.startswith(content)
        assert len(content) >= most
        most = len(content)


def test_a_gzip_cut_in_the_middle_gives_most_of_what_is_there() -> None:
    """A line in a file that is still being written is not held back until it is whole (case 29)."""
    packed = gzipped(CONTENT)
    content, damage = unpacked(packed[: len(packed) // 2], "gzip")
    assert damage is not None and len(content) > len(CONTENT) // 3


@pytest.mark.parametrize("garbage", [b"garbage", b"\0\0garbage", b"\xff" * 70_000], ids=["text", "after NULs", "much"])
@both
def test_garbage_at_the_end_is_damage_behind_the_whole_content(kind: Compression, garbage: bytes) -> None:
    """(case 29)"""
    content, damage = unpacked(COMPRESS[kind](CONTENT) + garbage, kind)
    assert content == CONTENT
    assert damage and damage != "it ends in the middle"


def test_a_flipped_byte_of_a_gzip_is_damage_and_what_stands_before_it_comes_out() -> None:
    """Of the 10 bytes of the header only what has no meaning here may differ (case 29)."""
    packed = gzipped(CONTENT)
    meaningless = range(4, 10)  # time, and what made it
    for position in range(MAGIC_BYTES, len(packed), 23):
        flipped = bytearray(packed)
        flipped[position] ^= 0xFF
        content, damage = unpacked(bytes(flipped), "gzip")
        if position in meaningless:
            assert (content, damage) == (CONTENT, None)
            continue
        assert damage is not None
        sound, _ = unpacked(packed[:position], "gzip")
        assert content.startswith(sound[: max(0, len(sound) - 258)]) or sound.startswith(content)


def test_damage_late_in_a_large_gzip_costs_nothing_that_stands_before_it() -> None:
    """zlib hands nothing out of a step that fails: what it holds back is fetched byte by byte (case 29)."""
    packed = bytearray(gzipped(CONTENT * 20))
    first = gzipped(CONTENT)
    broken = first + b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + b"\x06"  # a second member with a block of a type there is not
    assert unpacked(broken, "gzip")[0] == CONTENT
    packed[-8] ^= 1  # the checksum
    content, damage = unpacked(bytes(packed), "gzip")
    assert content == CONTENT * 20
    assert damage is not None and "check" in damage


def test_a_flipped_byte_of_a_zstd_is_damage_behind_whole_blocks() -> None:
    """A block comes out whole or not at all (case 29)."""
    frames = [zstandardised(CONTENT[at : at + 1000]) for at in range(0, 5000, 1000)]
    packed = bytearray(b"".join(frames))
    packed[sum(map(len, frames[:3])) + len(frames[3]) // 2] ^= 0xFF
    content, damage = unpacked(bytes(packed), "zstd")
    assert damage is not None
    assert content.startswith(CONTENT[:3000])


@pytest.mark.parametrize(("kind", "size"), [("gzip", 256 * MIB), ("zstd", 256 * MIB)])
def test_a_bomb_is_unpacked_in_bounded_memory(kind: Compression, size: int) -> None:
    """A thousandfold or more; who reads on bounds how much (cases 29, 58)."""
    bomb = _bomb(kind, size)
    assert len(bomb) < size // 900
    largest = total = 0
    tracemalloc.start()
    try:
        for piece in unpack(io.BytesIO(bomb), kind):
            largest, total = max(largest, len(piece)), total + len(piece)
            if total >= 40 * MIB:
                break
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total >= 40 * MIB
    assert largest <= 33 * MIB
    assert peak < 100 * MIB


def _bomb(kind: Compression, size: int) -> bytes:
    if kind == "zstd":
        packer = zstandard.ZstdCompressor(level=1).compressobj()
        return b"".join(packer.compress(bytes(MIB)) for _ in range(size // MIB)) + packer.flush()
    # The same compressed megabyte again and again, each ended by a full flush: nothing but a raw header before.
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    one = deflate.compress(bytes(16 * MIB)) + deflate.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + one * (size // (16 * MIB))


@both
def test_a_file_that_is_being_written_is_read_as_far_as_it_goes(kind: Compression, tmp_path: Path) -> None:
    """Each look gives at least as much as the one before, and the last one all (case 29)."""
    packed, path, before = COMPRESS[kind](CONTENT), tmp_path / "log.gz", 0
    with path.open("wb", buffering=0) as writer:
        for at in range(0, len(packed), 997):
            writer.write(packed[at : at + 997])
            with path.open("rb") as file:
                content, damage = unpacked(file.read(), kind)
            assert CONTENT.startswith(content) and len(content) >= before
            assert (damage is None) == (at + 997 >= len(packed))
            before = len(content)
    assert before == len(CONTENT)


def test_a_file_whose_reading_fails_is_not_damaged() -> None:
    """A network file system that does not answer is no reason to give up what is there."""

    class Failing(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell():
                raise OSError(5, "Input/output error")
            return super().read(20)

    with pytest.raises(OSError, match="Input/output error"):
        list(unpack(Failing(gzipped(CONTENT)), "gzip"))


# --- what comes bit by bit, as a request does


def unpacked_in_pieces(data: bytes, kind: Compression, sizes: list[int]) -> tuple[bytes, str | None]:
    """What comes out of data that comes in pieces of these sizes, again and again, and why no more does."""
    unpacker, found, position = Unpacker(kind), bytearray(), 0
    try:
        for size in itertools.cycle(sizes):
            for piece in unpacker.feed(data[position : position + size]):
                found += piece
            position += size
            if position >= len(data):
                break
        unpacker.end()
    except Damaged as damaged:
        return bytes(found), str(damaged)
    return bytes(found), None


@both
@given(parts=st.lists(st.binary(max_size=200), min_size=1, max_size=3), sizes=st.lists(st.integers(1, 50), min_size=1))
def test_pieces_of_any_size_give_the_same(kind: Compression, parts: list[bytes], sizes: list[int]) -> None:
    packed = b"".join(map(COMPRESS[kind], parts))
    assert unpacked_in_pieces(packed, kind, sizes) == unpacked_in_pieces(packed, kind, [1]) == (b"".join(parts), None)


@both
@given(end=st.integers(0, 400), sizes=st.lists(st.integers(1, 50), min_size=1))
def test_pieces_of_something_that_ends_too_early_give_what_unpacks(
    kind: Compression, end: int, sizes: list[int]
) -> None:
    packed = COMPRESS[kind](CONTENT)
    found, problem = unpacked_in_pieces(packed[:end], kind, sizes)
    assert CONTENT.startswith(found)
    assert (problem is None) == (end in (0, len(packed)))
    assert found == unpacked(packed[:end], kind)[0]


@given(at=st.integers(20, 800), sizes=st.lists(st.integers(1, 50), min_size=1))
def test_pieces_of_something_damaged_give_what_stands_before(at: int, sizes: list[int]) -> None:
    packed = bytearray(gzipped(CONTENT))
    packed[at] ^= 0xFF
    found, problem = unpacked_in_pieces(bytes(packed), "gzip", sizes)
    assert found.startswith(unpacked(bytes(packed[:at]), "gzip")[0])
    assert problem is not None


def test_nuls_at_the_end_are_padding_however_they_come() -> None:
    """But not in the place of the first member."""
    packed = gzipped(CONTENT) + bytes(100) + gzipped(b"more") + bytes(7)
    for size in (1, 3, 1000):
        assert unpacked_in_pieces(packed, "gzip", [size]) == (CONTENT + b"more", None)
    assert unpacked_in_pieces(bytes(5), "gzip", [1])[1] is not None


def test_of_a_bomb_only_a_step_is_unpacked_at_once() -> None:
    """(case 58)"""
    for kind, packed in (("gzip", gzipped(bytes(64 * MIB))), ("zstd", zstandardised(bytes(64 * MIB)))):
        pieces = list(map(len, Unpacker(kind).feed(packed)))  # type: ignore[arg-type]
        assert sum(pieces) == 64 * MIB
        assert max(pieces) <= 16 * MIB + 128 * 1024
