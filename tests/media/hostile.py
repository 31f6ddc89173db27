"""Hostile image files, made in code."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

from PIL import Image


def encode(format: str, side: int = 64, mode: str = "RGB", **options: Any) -> bytes:
    """Return an image of one colour as a file."""
    file = io.BytesIO()
    Image.new(mode, (side, side)).save(file, format, **options)
    return file.getvalue()


def segment(kind: int, content: bytes) -> bytes:
    """Return a segment of a JPEG."""
    return struct.pack(">BBH", 0xFF, kind, len(content) + 2) + content


def jpeg(header: bytes) -> bytes:
    """Return a JPEG with these bytes before its first segment."""
    data = encode("JPEG")
    return data[:2] + header + data[2:]


def jpeg_of_scans(number: int, side: int = 64) -> bytes:
    """Return a progressive JPEG with so many scans, of which those behind the first ten repeat the last one."""
    data = encode("JPEG", side, progressive=True)
    last = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + last * (number - data.count(b"\xff\xda")) + data[-2:]


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(header: bytes = b"", *, tail: bytes = b"", side: int = 64) -> bytes:
    """Return a grey PNG with chunks before and after its pixels."""
    start = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes((side + 1) * side)))
    return b"\x89PNG\r\n\x1a\n" + start + header + pixels + tail + chunk(b"IEND")


def gif(header: bytes) -> bytes:
    """Return a GIF with these blocks before its frame."""
    data = encode("GIF", mode="L")
    start = data.index(b",", 13 + (3 << (data[10] & 7) + 1))
    return data[:start] + header + data[start:]


def webp(chunks: bytes) -> bytes:
    """Return a WebP that has only these chunks behind its header."""
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02" + bytes(9) + chunks
    return b"RIFF" + struct.pack("<I", len(body)) + body


def box(kind: bytes, content: bytes) -> bytes:
    """Return a box of an AVIF."""
    return struct.pack(">I4s", len(content) + 8, kind) + content


def avif(boxes: bytes) -> bytes:
    """Return an AVIF with these boxes before its own."""
    data = encode("AVIF")
    start = int.from_bytes(data[:4], "big")
    return data[:start] + boxes + data[start:]


def tiff_directory(entries: int) -> bytes:
    """Return EXIF data, or a TIFF, whose directory has so many entries."""
    return b"II*\0" + struct.pack("<LH", 8, entries) + struct.pack("<HHLL", 40_000, 3, 1, 0) * entries + bytes(4)


def bmp_of_runs(side: int) -> bytes:
    """Return a BMP whose pixels are runs of one each, which Pillow decodes in Python."""
    head = bytearray(encode("BMP", side, "L")[: 54 + 1024])
    head[30] = 1
    return bytes(head) + (b"\x01\x00" * side + b"\0\0") * side


EXCESSIVE = {
    "JPEG of small EXIF segments": lambda: jpeg(segment(0xE1, b"Exif\0\0" + bytes(12)) * 20_000),
    "JPEG of empty comments": lambda: jpeg(segment(0xFE, b"") * 100_000),
    "JPEG with junk between segments": lambda: jpeg(b"\xff\xe0\0\2" + bytes(4 << 20)),
    "JPEG with bytes that fill": lambda: jpeg(b"\xff" * (4 << 20)),
    "JPEG with markers of restarts": lambda: jpeg(b"\xff\xd0" * (1 << 20)),
    "JPEG with much EXIF data": lambda: jpeg(segment(0xE1, b"Exif\0\0" + bytes(60_000)) * 20),
    "JPEG with much data of Photoshop": lambda: jpeg(segment(0xED, b"Photoshop 3.0\0" + bytes(60_000)) * 20),
    "JPEG with many entries of EXIF data": lambda: jpeg(segment(0xE1, b"Exif\0\0" + tiff_directory(5_000))),
    "JPEG of many scans": lambda: jpeg_of_scans(101),
    "PNG of empty chunks": lambda: png(chunk(b"abCd") * 100_000),
    "PNG with many entries of EXIF data": lambda: png(chunk(b"eXIf", tiff_directory(5_000))),
    "GIF of comments": lambda: gif(b"\x21\xfe\1x\0" * 10_000),
    "GIF of blocks": lambda: gif(b"\x21\xfe" + (b"\xff" + b"x" * 255) * 10_000 + b"\0"),
    "GIF with junk": lambda: gif(b"\1" * 100_000),
    "WebP of frames": lambda: webp((b"ANMF" + struct.pack("<I", 24) + bytes(24)) * 100_000),
    "WebP of chunks": lambda: webp(b"ABCD\0\0\0\0" * 100_000),
    "AVIF of boxes": lambda: avif(box(b"free", b"") * 100_000),
    "AVIF of items": lambda: avif(box(b"meta", bytes(4) + box(b"iloc", bytes(1 << 20)))),
    "AVIF of properties": lambda: avif(box(b"meta", bytes(4) + box(b"iprp", box(b"ipco", box(b"free", b"") * 5_000)))),
    "AVIF of frames": lambda: avif(box(b"moov", bytes(1 << 20))),
    "TIFF of entries": lambda: tiff_directory(1_001),
}
"""Files whose headers cost more than an image needs, by name."""
SLOW = {
    "JPEG of many scans": lambda: jpeg_of_scans(90, 1500),
    "PNG of many chunks behind the pixels": lambda: png(tail=chunk(b"abCd") * 20_000),
    "BMP of runs": lambda: bmp_of_runs(100),
    "TIFF": lambda: encode("TIFF"),
    "AVIF": lambda: encode("AVIF"),
    "animated WebP": lambda: encode("WEBP", save_all=True, append_images=[Image.new("RGB", (64, 64), "red")]),
}
"""Valid files whose header doesn't bound what decoding them takes, by name."""
