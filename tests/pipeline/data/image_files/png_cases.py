"""PNG files: samples of every kind, transparency, and everything that surrounds a picture and is none."""

import functools
import struct
import zlib

import numpy as np

from tests.pipeline.data.image_files.cases import (
    GREY,
    HEIGHT,
    PICTURE,
    WIDTH,
    Case,
    chunk,
    exif,
    orientation,
    over_white,
    png,
    refused,
    rgb_png,
    shown,
)

_SIZE = (WIDTH, HEIGHT)
_ALPHA = np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))
_WIDE = PICTURE.astype(np.uint16) * 256 + 37  # 16 bits, whose lower byte must not count


def _big(samples: np.ndarray) -> np.ndarray:
    """Rows of 16-bit samples as PNG stores them."""
    return samples.astype(">u2").reshape(HEIGHT, -1).view(np.uint8)


def _packed(indices: np.ndarray, bits: int) -> np.ndarray:
    """Rows of samples of less than a byte."""
    spread = (indices[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(spread.reshape(len(indices), -1).astype(np.uint8), axis=1)


def colours() -> dict[str, Case]:
    made = {
        "PNG, RGB": shown(rgb_png()),
        "PNG, grey": shown(png(GREY, 0, 8), GREY),
        "PNG, 16-bit RGB": shown(png(_big(_WIDE), 2, 16, size=_SIZE)),
        "PNG, 16-bit grey": shown(png(_big(GREY.astype(int) * 256 + 200), 0, 16, size=_SIZE), GREY),
        "PNG, grey with alpha": shown(
            png(np.dstack([GREY, _ALPHA]).reshape(HEIGHT, -1), 4, 8, size=_SIZE),
            over_white(np.repeat(GREY[..., None], 3, 2), _ALPHA), 1,
        ),
        "PNG, RGB with alpha": shown(
            png(np.dstack([PICTURE, _ALPHA]).reshape(HEIGHT, -1), 6, 8, size=_SIZE), over_white(PICTURE, _ALPHA), 1
        ),
        "PNG, 16-bit RGB with alpha": shown(
            png(_big(np.dstack([_WIDE, _ALPHA.astype(int) * 257])), 6, 16, size=_SIZE), over_white(PICTURE, _ALPHA), 1
        ),
        "PNG, 16-bit grey with alpha": shown(
            png(_big(np.dstack([GREY.astype(int) * 256 + 99, _ALPHA.astype(int) * 257])), 4, 16, size=_SIZE),
            over_white(np.repeat(GREY[..., None], 3, 2), _ALPHA), 1,
        ),
        "PNG, wholly transparent": shown(
            png(np.dstack([PICTURE, _ALPHA * 0]).reshape(HEIGHT, -1), 6, 8, size=_SIZE), PICTURE * 0 + 255
        ),
    }  # fmt: skip
    for bits in (1, 2, 4):
        levels = GREY >> (8 - bits)
        grey = (levels * (255 // (2**bits - 1))).astype(np.uint8)
        made[f"PNG, {bits}-bit grey"] = shown(png(_packed(levels, bits), 0, bits, size=_SIZE), grey)
        key = int(levels[5, 7])
        made[f"PNG, {bits}-bit grey, one level transparent"] = shown(
            png(_packed(levels, bits), 0, bits, chunk(b"tRNS", struct.pack(">H", key)), size=_SIZE),
            np.where(levels == key, 255, grey),
        )
        table = PICTURE.reshape(-1, 3)[: 2**bits]
        made[f"PNG, palette of {bits} bits"] = shown(
            png(_packed(levels, bits), 3, bits, chunk(b"PLTE", table.tobytes()), size=_SIZE), table[levels]
        )
    return made


def interlaced(samples: np.ndarray, colour: int, depth: int, *extra: bytes) -> bytes:
    """A PNG in Adam7's seven passes of [h, w, bytes of a pixel]."""
    height, width = samples.shape[:2]
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = [row for top, left, down, right in passes for row in samples[top::down, left::right] if row.size]
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 1)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def transparent_colours() -> dict[str, Case]:
    key = PICTURE[4, 6]
    rgb_key = struct.pack(">3H", *key.tolist())
    is_key = (key == PICTURE).all(2)[..., None]
    wide = _WIDE.copy()
    wide[0, 0] = wide[4, 6] + 1  # the same upper bytes: Pillow cannot tell them apart
    wide_key = chunk(b"tRNS", struct.pack(">3H", *wide[4, 6].tolist()))
    like_wide_on_white = np.where(is_key, 255, PICTURE)
    like_wide_on_white[0, 0] = key
    table = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)
    indices = (GREY % 200).astype(np.uint8)
    alphas = np.arange(255, 55, -1).astype(np.uint8)
    grey16 = GREY.astype(int) * 256 + 11
    one = np.full(7, 255, np.uint8)
    one[6] = 0
    return {
        "PNG, one colour transparent": shown(
            rgb_png(chunk(b"tRNS", rgb_key)), np.where(is_key, 255, PICTURE)
        ),
        "PNG, 16-bit RGB, one colour transparent": shown(
            png(_big(wide), 2, 16, wide_key, size=_SIZE), like_wide_on_white
        ),
        "PNG, interlaced": shown(interlaced(PICTURE, 2, 8)),
        "PNG, interlaced 16-bit RGB, one colour transparent": shown(
            interlaced(_big(wide).reshape(HEIGHT, WIDTH, 6), 2, 16, wide_key), like_wide_on_white
        ),
        "PNG, grey, one level transparent": shown(
            png(GREY, 0, 8, chunk(b"tRNS", struct.pack(">H", int(GREY[3, 3])))), np.where(GREY[3, 3] == GREY, 255, GREY)
        ),
        "PNG, 16-bit grey, one level transparent": shown(
            png(_big(grey16), 0, 16, chunk(b"tRNS", struct.pack(">H", int(grey16[3, 3]))), size=_SIZE),
            np.where(GREY[3, 3] == GREY, 255, GREY),
        ),
        "PNG, palette with alpha": shown(
            png(indices, 3, 8, chunk(b"PLTE", table.tobytes()), chunk(b"tRNS", alphas.tobytes())),
            over_white(table[indices], np.concatenate([alphas, np.full(56, 255, np.uint8)])[indices]), 1,
        ),
        "PNG, palette with one transparent colour": shown(
            png(indices, 3, 8, chunk(b"PLTE", table.tobytes()), chunk(b"tRNS", one.tobytes())),
            np.where((indices == 6)[..., None], 255, table[indices]),
        ),
        "PNG, transparency with a wrong checksum": shown(rgb_png(chunk(b"tRNS", rgb_key, is_sound=False))),
        "PNG, transparency of a wrong length": shown(rgb_png(chunk(b"tRNS", rgb_key + b"\0"))),
        "PNG, grey, transparency too short": shown(png(GREY, 0, 8, chunk(b"tRNS", b"\0")), GREY),
        "PNG, transparency of RGB with alpha": shown(
            png(np.dstack([PICTURE, _ALPHA * 0 + 255]).reshape(HEIGHT, -1), 6, 8, chunk(b"tRNS", bytes(6)), size=_SIZE)
        ),
        "PNG, transparency behind the pixels": shown(rgb_png(after=chunk(b"tRNS", rgb_key))),
        "PNG, more transparency than palette": shown(
            png(indices, 3, 8, chunk(b"PLTE", table.tobytes()), chunk(b"tRNS", bytes(300))), table[indices]
        ),
    }  # fmt: skip


def surroundings() -> dict[str, Case]:
    """Chunks that are no picture."""
    bomb = zlib.compress(bytes(200 << 20), 1)
    few = zlib.compress(b"x" * (2 << 20))
    text, profile = b"Comment\0\0", b"icc\0\0"
    frame = struct.pack(">IIIIIHHBB", 0, WIDTH, HEIGHT, 0, 0, 1, 10, 0, 0)
    extras = {
        "2 MiB of zTXt": (chunk(b"zTXt", text + few),),
        "200 MiB of zTXt": (chunk(b"zTXt", text + bomb),),
        "2 MiB of iTXt": (chunk(b"iTXt", b"Comment\0\1\0\0\0" + few),),
        "200 MiB of iTXt": (chunk(b"iTXt", b"Comment\0\1\0\0\0" + bomb),),
        "XMP in iTXt": (chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0tiff:Orientation="6"'),),
        "200 MiB of profile": (chunk(b"iCCP", profile + bomb),),
        "a profile that is none": (chunk(b"iCCP", profile + zlib.compress(b"no profile")),),
        "a profile that does not inflate": (chunk(b"iCCP", profile + b"abc"),),
        "a profile packed in an unknown way": (chunk(b"iCCP", b"icc\0\7" + few),),
        "a profile without a name": (chunk(b"iCCP", b""),),
        "texts of 70 MiB": tuple(chunk(b"tEXt", b"Comment\0" + bytes(14 << 20)) for _ in range(5)),
        "a text packed in an unknown way": (chunk(b"zTXt", b"Comment\0\7abc"),),
        "a text without a keyword": (chunk(b"tEXt", b""), chunk(b"zTXt", b""), chunk(b"iTXt", b"")),
        "short chunks": tuple(chunk(name, b"\0") for name in (b"gAMA", b"cHRM", b"pHYs", b"tIME", b"bKGD", b"hIST")),
        "an empty sRGB": (chunk(b"sRGB", b""),),
        "a gamma of 0": (chunk(b"gAMA", bytes(4)),),
        "wrong checksums in what is no picture": (
            chunk(b"tEXt", b"a\0b", is_sound=False), chunk(b"pHYs", bytes(9), is_sound=False),
        ),
        "chunks that nobody knows": (chunk(b"vpAg", bytes(9)), chunk(b"iDOT", bytes(28))),
        "a palette that RGB does not need": (chunk(b"PLTE", bytes(7)),),
        "a broken animation": (chunk(b"acTL", b"\0"), chunk(b"fcTL", b"\0")),
        "an animation whose frames are out of order": (
            chunk(b"acTL", struct.pack(">II", 2, 0)), chunk(b"fcTL", b"\0\0\0\7" + frame[4:]),
        ),
        "an animation": (chunk(b"acTL", struct.pack(">II", 2, 0)), chunk(b"fcTL", frame)),
    }  # fmt: skip
    made = {f"PNG with {name}": shown(rgb_png(*chunks)) for name, chunks in extras.items()}
    for name in ("2 MiB of zTXt", "200 MiB of iTXt", "an animation whose frames are out of order", "short chunks"):
        made[f"PNG with {name}, behind the pixels"] = shown(rgb_png(after=b"".join(extras[name])))
    second = chunk(b"fcTL", struct.pack(">I", 1) + frame[4:]) + chunk(
        b"fdAT", struct.pack(">I", 2) + zlib.compress(b"".join(b"\0" + bytes(WIDTH * 3) for _ in range(HEIGHT)))
    )
    made["PNG with an animation of two frames"] = shown(rgb_png(*extras["an animation"], after=second))
    return made


def damage() -> dict[str, Case]:
    whole = rgb_png()
    pixels = whole.index(b"IDAT")
    length = int.from_bytes(whole[pixels - 4 : pixels], "big")
    body = whole[pixels + 4 : pixels + 4 + length]
    head = whole[: pixels - 4]
    end = chunk(b"IEND", b"")
    flipped = bytearray(whole)
    flipped[pixels + 4 + length // 2] ^= 0xFF
    header = bytearray(whole)
    header[29] ^= 1
    parts = b"".join(chunk(b"IDAT", body[at : at + 5]) for at in range(0, length, 5))
    return {
        "PNG, pixels in many chunks": shown(head + parts + end),
        "PNG, an empty chunk of pixels": shown(head + chunk(b"IDAT", b"") + chunk(b"IDAT", body) + end),
        "PNG, without its end": shown(head + chunk(b"IDAT", body)),
        "PNG, cut off within its end": shown(whole[:-5]),
        "PNG, cut off within the checksum of its pixels": shown(head + chunk(b"IDAT", body)[:-2]),
        "PNG, cut off within the sum of its pixels": shown(head + chunk(b"IDAT", body)[:-6]),
        "PNG, something behind its end": shown(whole + b"garbage" * 100),
        "PNG, a wrong checksum of the pixels": shown(head + chunk(b"IDAT", body, is_sound=False) + end),
        "PNG, cut off in its pixels": refused(whole[: pixels + 4 + length - 12], "undecodable"),
        "PNG, half of it": refused(whole[: len(whole) // 2], "undecodable"),
        "PNG, its header alone": refused(whole[:33], "undecodable"),
        "PNG, its first bytes alone": refused(whole[:8], "undecodable"),
        "PNG, one byte of its pixels flipped": refused(bytes(flipped), "undecodable"),
        "PNG, a wrong checksum of the header": refused(bytes(header), "undecodable"),
        "PNG, no pixels": refused(head + end, "undecodable"),
        "PNG, a palette image without a palette": refused(png(GREY, 3, 8), "undecodable"),
        "PNG, a width of 0": refused(png(GREY, 0, 8, size=(0, HEIGHT)), "undecodable"),
        "PNG, an unknown colour type": refused(png(GREY, 5, 8), "undecodable"),
        "PNG, 60000 x 60000": refused(png(GREY, 0, 8, size=(60000, 60000)), "too_large", "pixels"),
        "PNG, 12000 x 12000": refused(png(GREY, 0, 8, size=(12000, 12000)), "too_large", "12000 x 12000 pixels"),
        "PNG, a pixel more than allowed": refused(png(GREY, 0, 8, size=(10_000_001, 1)), "too_large", "max_pixels"),
        "PNG, EXIF of 20 MiB": shown(
            rgb_png(chunk(b"eXIf", exif([orientation()]) + bytes(20 << 20)), picture=np.rot90(PICTURE, 1))
        ),
    }  # fmt: skip


@functools.cache
def cases() -> dict[str, Case]:
    return colours() | transparent_colours() | surroundings() | damage()
