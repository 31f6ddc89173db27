"""Images as clients send them."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Any

from PIL import Image


def png(width: int = 56, height: int = 28, color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), color).save(buffer, "PNG")
    return buffer.getvalue()


def rotated_jpeg(width: int = 56, height: int = 28) -> bytes:
    """Return an image that its EXIF data rotates by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "blue").save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def bomb(side: int = 20_000) -> bytes:
    """Return a small file that claims to hold side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def image_part(data: bytes, **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(data)}, **fields}


def embeds_part(uuid: str | None, **metadata: Any) -> dict[str, Any]:
    return {"type": "image_embeds", "image_embeds": metadata, "uuid": uuid}


def chat(*parts: dict[str, Any] | str, **fields: Any) -> dict[str, Any]:
    """Return a chat of one message; strings are text parts."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"messages": [{"role": "user", "content": content}], **fields}
