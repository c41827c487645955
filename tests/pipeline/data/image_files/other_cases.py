"""BMP, GIF, WebP and AVIF files, and what is no image that is read."""

import functools
import struct

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from tests.pipeline.data.image_files.cases import (
    GREY,
    HEIGHT,
    LOSSY,
    PICTURE,
    WHITE,
    WIDTH,
    Case,
    encode,
    over_white,
    refused,
    shown,
)

MASKS = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
_TABLE = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)
_ALPHA = np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))


def bmp(
    rows: NDArray[np.uint8],
    bits: int,
    *,
    header: int = 40,
    compression: int = 0,
    masks: bytes = b"",
    palette: bytes = b"",
    size: tuple[int, int] = (WIDTH, HEIGHT),
) -> bytes:
    """A BMP of given rows, bottom first, each filled up to 4 bytes."""
    rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 4)))
    head = struct.pack("<IiiHHIIiiII", header, *size, 1, bits, compression, rows.size, 2835, 2835, len(palette) // 4, 0)
    rest = (head[:40] + masks).ljust(header, b"\0") if header > 40 else head + masks
    start = 14 + len(rest) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + rows.size, 0, 0, start) + rest + palette + rows[::-1].tobytes()


def bmp_cases() -> dict[str, Case]:
    def four(fourth: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.dstack([PICTURE[..., ::-1], fourth]).reshape(HEIGHT, -1)

    nothing = np.zeros((HEIGHT, WIDTH), np.uint8)
    v4, v5 = {"header": 108, "compression": 3, "masks": MASKS}, {"header": 124, "compression": 3, "masks": MASKS}
    some = nothing.copy()
    some[0, 0] = 255
    plain = encode(PICTURE, "BMP")
    indexed = PIL.Image.fromarray(GREY, "P")
    indexed.putpalette(_TABLE.tobytes())
    five = PICTURE >> 3
    words = (five[..., 0].astype(np.uint16) << 10) | (five[..., 1].astype(np.uint16) << 5) | five[..., 2]
    words = words.astype("<u2").view(np.uint8).reshape(HEIGHT, -1)
    runs = np.concatenate(
        [np.dstack([np.ones_like(GREY), GREY]).reshape(HEIGHT, -1), np.zeros((HEIGHT, 2), np.uint8)], axis=1
    )
    grey_table = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 4, axis=1).tobytes()
    return {
        "BMP": shown(plain),
        "BMP, grey": shown(encode(GREY, "BMP"), GREY),
        "BMP, palette": shown(encode(indexed, "BMP"), _TABLE[GREY]),
        "BMP, one bit": shown(encode(PIL.Image.fromarray(GREY > 99), "BMP"), (GREY > 99) * 255),
        "BMP, 15 bits": shown(bmp(words, 16), five * 8, 8),
        "BMP, top row first": shown(
            bmp(PICTURE[::-1, :, ::-1].reshape(HEIGHT, -1), 24, size=(WIDTH, -HEIGHT))
        ),
        "BMP, runs": shown(bmp(runs, 8, compression=1, palette=grey_table), GREY),
        "BMP, 32 bits, the fourth byte 0": shown(bmp(four(nothing), 32)),
        "BMP, 32 bits, the fourth byte 255": shown(bmp(four(nothing + 255), 32)),
        "BMP, 32 bits, the fourth byte anything": shown(bmp(four(_ALPHA), 32)),
        "BMP, version 4, alpha 0 everywhere": shown(bmp(four(nothing), 32, **v4)),
        "BMP, version 5, alpha 0 everywhere": shown(bmp(four(nothing), 32, **v5)),
        "BMP, version 4, alpha": shown(bmp(four(_ALPHA), 32, **v4), over_white(PICTURE, _ALPHA), 1),
        "BMP, version 5, alpha": shown(bmp(four(_ALPHA), 32, **v5), over_white(PICTURE, _ALPHA), 1),
        "BMP, version 5, one pixel opaque": shown(
            bmp(four(some), 32, **v5), np.where(some[..., None] > 0, PICTURE, WHITE)
        ),
        "BMP, without the filling of its last row": shown(plain[: len(plain) - (-3 * WIDTH % 4)]),
        "BMP, something behind its end": shown(plain + b"garbage" * 9),
        "BMP, a byte of its last row missing": refused(plain[: len(plain) - (-3 * WIDTH % 4) - 1], "undecodable"),
        "BMP, half of it": refused(plain[: len(plain) // 2], "undecodable"),
        "BMP, its header alone": refused(plain[:54], "undecodable"),
        "BMP, an unknown header": refused(plain[:14] + struct.pack("<I", 77) + plain[18:], "undecodable"),
        "BMP, 60000 x 60000": refused(
            plain[:18] + struct.pack("<ii", 60000, 60000) + plain[26:], "too_large", "pixels"
        ),
        "BMP, 0 x 0": refused(plain[:18] + bytes(8) + plain[26:], "undecodable"),
    }  # fmt: skip


def gif_cases() -> dict[str, Case]:
    image = PIL.Image.fromarray(GREY, "P")
    image.putpalette(_TABLE.tobytes())
    colours = _TABLE[GREY]
    other = PIL.Image.fromarray(255 - GREY, "P")
    other.putpalette(_TABLE.tobytes())
    key = int(GREY[4, 4])
    plain = encode(image, "GIF", optimize=False)
    two = encode(image, "GIF", save_all=True, append_images=[other], optimize=False)
    partial = bytearray(plain)
    partial[6:10] = struct.pack("<HH", WIDTH + 4, HEIGHT + 2)
    at = partial.index(b",\0\0\0\0")
    partial[at + 1 : at + 5] = struct.pack("<HH", 3, 1)
    on_canvas = np.full((HEIGHT + 2, WIDTH + 4, 3), 255, np.uint8)
    on_canvas[1:-1, 3:-1] = colours
    beyond = bytearray(plain)
    beyond[6:10] = struct.pack("<HH", 4, 3)
    huge = bytearray(plain)
    huge[6:10] = struct.pack("<HH", 60000, 60000)
    comment = b"!\xfe" + (b"\xff" + b"c" * 255) * 5000 + b"\0"
    at = plain.index(b",\0\0\0\0")
    return {
        "GIF": shown(plain, colours),
        "GIF, grey": shown(encode(GREY, "GIF"), GREY),
        "GIF, one colour transparent": shown(
            encode(image, "GIF", transparency=key, optimize=False), np.where((key == GREY)[..., None], 255, colours)
        ),
        "GIF, grey, one level transparent": shown(
            encode(GREY, "GIF", transparency=key, optimize=False), np.where(key == GREY, 255, GREY)
        ),
        "GIF, interlaced": shown(encode(image, "GIF", interlace=1, optimize=False), colours),
        "GIF, two frames": shown(two, colours),
        "GIF, cut off in its second frame": shown(two[:-20], colours),
        "GIF, a first frame that does not fill the canvas": shown(bytes(partial), on_canvas),
        "GIF, a frame larger than the canvas": shown(bytes(beyond), colours),
        "GIF, a megabyte of comment": shown(plain[:at] + comment + plain[at:], colours),
        "GIF, without its end": shown(plain[:-1], colours),
        "GIF, cut off in its picture": refused(plain[:-30], "undecodable"),
        "GIF, its header alone": refused(plain[:13], "undecodable"),
        "GIF, 60000 x 60000": refused(bytes(huge), "too_large", "pixels"),
    }


def webp_cases() -> dict[str, Case]:
    alpha = np.dstack([PICTURE, _ALPHA])
    lossless = encode(PICTURE, "WEBP", lossless=True)
    animated = encode(PICTURE, "WEBP", save_all=True, append_images=[PIL.Image.fromarray(255 - PICTURE)], lossless=True)
    canvas = bytearray(animated)
    canvas[24:30] = (16383).to_bytes(3, "little") * 2
    return {
        "WebP, lossless": shown(lossless),
        "WebP, lossy": shown(encode(PICTURE, "WEBP", quality=95), tolerance=50),
        "WebP, alpha": shown(encode(alpha, "WEBP", lossless=True, exact=True), over_white(PICTURE, _ALPHA), 1),
        "WebP, two frames": shown(animated),
        "WebP, a profile that is none": shown(encode(PICTURE, "WEBP", lossless=True, icc_profile=b"none")),
        "WebP, XMP that is none": shown(encode(PICTURE, "WEBP", lossless=True, xmp=b"\xff" * 99)),
        "WebP, something behind its end": shown(lossless + b"garbage" * 9),
        "WebP, half of it": refused(lossless[: len(lossless) // 2], "undecodable"),
        "WebP, its header alone": refused(lossless[:20], "undecodable"),
        "WebP, 16384 x 16384": refused(bytes(canvas), "too_large", "pixels"),
    }


def avif_cases() -> dict[str, Case]:
    best = {"quality": 100, "subsampling": "4:4:4"}
    plain = encode(PICTURE, "AVIF", **best)
    return {
        "AVIF": shown(plain, tolerance=LOSSY),
        "AVIF, alpha": shown(encode(np.dstack([PICTURE, _ALPHA]), "AVIF", **best), over_white(PICTURE, _ALPHA), LOSSY),
        "AVIF, two frames": shown(
            encode(PICTURE, "AVIF", save_all=True, append_images=[PIL.Image.fromarray(255 - PICTURE)], **best),
            tolerance=LOSSY,
        ),
        "AVIF, a profile that is none": shown(encode(PICTURE, "AVIF", icc_profile=b"none", **best), tolerance=LOSSY),
        "AVIF, half of it": refused(plain[: len(plain) // 2], "undecodable"),
        "AVIF, its header alone": refused(plain[:32], "undecodable"),
    }


def media(brand: bytes, *others: bytes) -> bytes:
    body = b"ftyp" + brand + bytes(4) + b"".join(others)
    return struct.pack(">I", len(body) + 4) + body + b"\0\0\0\x08mdat" + bytes(100)


def foreign_cases() -> dict[str, Case]:
    """Files of other kinds under the name of an image."""
    format_ = "unsupported_format"
    named = {
        "HEIC": media(b"heic", b"mif1", b"heic"), "HEIC in general clothes": media(b"mif1", b"heic"),
        "HEIC, animated": media(b"hevc", b"msf1"), "HEIF": media(b"mif1", b"mif1"),
        "JPEG 2000": encode(PICTURE, "JPEG2000"), "JPEG 2000 stream": encode(PICTURE, "JPEG2000", no_jp2=True),
        "JPEG XL": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50), "JPEG XL stream": b"\xff\x0a" + bytes(50),
        "JPEG XR": b"II\xbc\1" + bytes(50), "Photoshop (PSD)": b"8BPS\0\1" + bytes(50),
        "GIMP (XCF)": b"gimp xcf v011\0",
        "PostScript (EPS)": encode(PICTURE, "EPS"), "PDF": encode(PICTURE, "PDF"), "ICO": encode(PICTURE, "ICO"),
        "PNM": encode(PICTURE, "PPM"), "DDS": encode(PICTURE, "DDS"), "QOI": encode(PICTURE, "QOI"),
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "SVG with a declaration": b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- made by hand -->\n<svg width="9"/>',
        "OpenEXR": b"\x76\x2f\x31\1\2\0\0\0" + bytes(50), "Radiance HDR": b"#?RADIANCE\n" + bytes(50),
        "FITS": b"SIMPLE  =" + b" " * 50, "DICOM": bytes(128) + b"DICM" + bytes(50), "DjVu": b"AT&TFORM" + bytes(50),
        "a camera's raw file: CR3": media(b"crx ", b"isom"),
        "a camera's raw file: RAF": b"FUJIFILMCCD-RAW " + bytes(50),
        "a camera's raw file: ORF": b"IIRO\x08\0\0\0" + bytes(50),
        "a camera's raw file: RW2": b"IIU\0\x18\0\0\0" + bytes(50),
    }  # fmt: skip
    made = {}
    for name, data in named.items():
        kind = name.partition(":")[0]
        for longer in (" in general clothes", ", animated", " stream", " with a declaration"):
            kind = kind.removesuffix(longer)
        made[name] = refused(data, format_, f"{kind} is not read; convert it to PNG or JPEG")
    made["a video"] = refused(media(b"isom", b"mp42"), format_, "a video is not read")
    made["no bytes"] = refused(b"", "empty", "the file is empty")
    others = {
        "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        "a web page": (b"\n<!DOCTYPE html><html><body>404</body></html>", "a page or an answer of a web server"),
        "an error of S3": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a web server"),
        "an answer in JSON": (b'{"error": "not found"}', "a web server"),
        "a ZIP archive": (b"PK\x03\x04" + bytes(50), "a ZIP archive"),
        "a gzip archive": (b"\x1f\x8b\x08" + bytes(50), "a gzip archive"),
        "a NumPy array": (b"\x93NUMPY\1\0" + bytes(50), "a NumPy array"),
        "nothing but zeros": (bytes(5000), "5000 bytes, all of them 0"),
        "a text": (b"not an image\n" * 10, "PNG, JPEG, WebP, BMP, TIFF, GIF, AVIF"),
        "one byte": (b"\xff", "1 bytes"),
        "a PNG whose line ends were changed": (b"\x89PNG\n\x1a\n" + bytes(50), "no image"),
    }
    return made | {name: refused(data, "undecodable", says) for name, (data, says) in others.items()}


@functools.cache
def cases() -> dict[str, Case]:
    return bmp_cases() | gif_cases() | webp_cases() | avif_cases() | foreign_cases()
