"""TIFF files: samples of every kind, several pages, tags that are odd, and cameras' raw files, which are TIFF too."""

import functools
import io
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from tests.pipeline.data.image_files.cases import (
    GREY,
    HEIGHT,
    LOSSY,
    PICTURE,
    WIDTH,
    Case,
    encode,
    entry,
    long,
    odd_entries,
    orientation,
    over_white,
    refused,
    short,
    shown,
    turned,
)
from tests.pipeline.data.image_files.icc_profile import cmyk_profile, srgb_of
from tests.pipeline.data.image_files.jpeg_cases import CYAN, CYAN_BY_PROFILE, INKS

BLACK_IS_0, RGB, PALETTE, CMYK = 1, 2, 3, 5


def tiff(
    samples: NDArray[Any],
    *entries: bytes,
    photometric: int | None = None,
    bits: int | None = None,
    order: str = "<",
    size: tuple[int, int] | None = None,
    following: int = 0,
    num_channels: int | None = None,
) -> bytes:
    """An uncompressed TIFF of one strip.

    Args:
        samples: [h, w] or [h, w, c] as numpy has them.
        entries: Further entries of its directory, before all others.
        photometric: TIFF's number; None: by the channels.
        bits: Of a sample, if not those of the array's type.
        order: "<" or ">".
        size: Width and height, if not those of the array.
        following: Offset of the next directory.
        num_channels: If not those of the array.
    """
    height, width = samples.shape[:2] if size is None else size[::-1]
    channels = num_channels or (samples.shape[2] if samples.ndim == 3 else 1)
    bits = bits or samples.dtype.itemsize * 8
    photometric = (BLACK_IS_0, RGB)[channels > 2] if photometric is None else photometric
    pixels = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    depths = short(bits, order) * channels
    start = 8 + 2 + 12 * (len(entries) + 8) + 4
    depth = depths if channels <= 2 else long(start, order)
    made = [
        *entries,
        entry(256, 4, 1, long(width, order), order), entry(257, 4, 1, long(height, order), order),
        entry(258, 3, channels, depth, order), entry(259, 3, 1, short(1, order), order),
        entry(262, 3, 1, short(photometric, order), order), entry(273, 4, 1, long(start + len(depths), order), order),
        entry(277, 3, 1, short(channels, order), order), entry(279, 4, 1, long(len(pixels), order), order),
    ]  # fmt: skip
    head = (b"II*\0" if order == "<" else b"MM\0*") + long(8, order) + short(len(made), order)
    return b"".join([head, *made, long(following, order), depths, pixels])


@functools.cache
def cases() -> dict[str, Case]:
    return {**_samples(), **_packed(), **_refused(), **_tags(), **_damage()}


def _samples() -> dict[str, Case]:
    made: dict[str, Case] = {}
    grey16 = GREY.astype(np.uint16) * 256 + 99
    alpha = np.tile(np.linspace(255, 20, WIDTH).astype(np.uint8), (HEIGHT, 1))
    for name, order in (("II", "<"), ("MM", ">")):
        made |= {
            f"TIFF, RGB, {name}": shown(tiff(PICTURE, order=order)),
            f"TIFF, grey, {name}": shown(tiff(GREY, order=order), GREY),
            f"TIFF, grey with white at 0, {name}": shown(tiff(255 - GREY, photometric=0, order=order), GREY),
            f"TIFF, 16-bit grey, {name}": shown(tiff(grey16, order=order), GREY),
            f"TIFF, 16-bit grey with white at 0, {name}": shown(
                tiff(65535 - grey16, photometric=0, order=order), GREY
            ),
            f"TIFF, 16-bit RGB, {name}": shown(tiff(PICTURE.astype(np.uint16) * 256 + 50, order=order)),
            f"TIFF, inks, {name}": shown(tiff(INKS, photometric=CMYK, order=order), tolerance=1),
            f"TIFF, alpha, {name}": shown(
                tiff(np.dstack([PICTURE, alpha]), entry(338, 3, 1, short(2, order), order), order=order),
                over_white(PICTURE, alpha), 1,
            ),
            f"TIFF, a fourth channel that is no alpha, {name}": shown(
                tiff(np.dstack([PICTURE, alpha]), entry(338, 3, 1, short(0, order), order), order=order)
            ),
        }  # fmt: skip
    premultiplied = np.dstack([GREY * (alpha / 255), alpha]).round().astype(np.uint8)
    levels = (GREY.astype(int) * 16 + 7).reshape(-1, 2)  # 12 bits, two samples in three bytes
    twelve = np.stack([levels[:, 0] >> 4, (levels[:, 0] & 15) << 4 | levels[:, 1] >> 8, levels[:, 1] & 255], 1)
    lab = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    lab[...] = (round(50 * 255 / 100), 10, 256 - 40)
    return made | {
        "TIFF, grey with premultiplied alpha": shown(
            tiff(premultiplied, entry(338, 3, 1, short(1)), photometric=BLACK_IS_0),
            over_white(np.repeat(GREY[..., None], 3, 2), alpha), 4,
        ),
        "TIFF, 12-bit grey": shown(tiff(twelve.astype(np.uint8), bits=12, size=(WIDTH, HEIGHT), num_channels=1), GREY),
        "TIFF, CIELAB": shown(tiff(lab, photometric=8), np.broadcast_to(srgb_of((50.2, 10, -40)), PICTURE.shape), 2),
        "TIFF, inks with a profile": shown(
            encode(PIL.Image.frombytes("CMYK", (WIDTH, HEIGHT), CYAN.tobytes()), "TIFF", icc_profile=cmyk_profile()),
            CYAN_BY_PROFILE, 2,
        ),
        "TIFF, one bit": shown(encode(PIL.Image.fromarray(GREY > 99), "TIFF"), (GREY > 99) * 255),
    }  # fmt: skip


def _packed() -> dict[str, Case]:
    """Compressions, tiles, pages."""
    made = {
        f"TIFF, packed by {name}": shown(
            encode(PICTURE, "TIFF", compression=name), tolerance=LOSSY if name == "jpeg" else 0
        )
        for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd", "lzma", "jpeg")
    }
    black = PIL.Image.fromarray(GREY > 99)
    for name in ("group3", "group4"):
        made[f"TIFF, packed by {name}"] = shown(encode(black, "TIFF", compression=name), (GREY > 99) * 255)
    second = PIL.Image.fromarray(255 - PICTURE)
    made["TIFF, two pages"] = shown(encode(PICTURE, "TIFF", save_all=True, append_images=[second]))
    made["TIFF, two pages, packed"] = shown(
        encode(PICTURE, "TIFF", save_all=True, append_images=[second], compression="tiff_lzw")
    )
    made["BigTIFF"] = shown(encode(PICTURE, "TIFF", big_tiff=True))
    made["BigTIFF, packed"] = shown(encode(PICTURE, "TIFF", big_tiff=True, compression="tiff_lzw"))
    indexed = PIL.Image.fromarray(GREY, "P")
    table = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)
    indexed.putpalette(table.tobytes())
    made["TIFF, palette"] = shown(encode(indexed, "TIFF"), table[GREY])
    return made


def _refused() -> dict[str, Case]:
    five = np.dstack([PICTURE, PICTURE[..., :2]])
    signed, floating = entry(339, 3, 1, short(2)), entry(339, 3, 1, short(3))
    unsupported = "unsupported_pixels"
    return {
        "TIFF, floating-point": refused(
            tiff(GREY.astype(np.float32), floating), unsupported, "32-bit floating-point samples"
        ),
        "TIFF, floating-point RGB": refused(tiff(PICTURE.astype(np.float32), floating), unsupported, "floating-point"),
        "TIFF, double": refused(tiff(GREY.astype(np.float64), floating), unsupported, "64-bit floating-point"),
        "TIFF, half": refused(tiff(GREY.astype(np.float16), floating), unsupported, "16-bit floating-point"),
        "TIFF, signed": refused(tiff(GREY.astype(np.int16), signed), unsupported, "16-bit signed"),
        "TIFF, 32 bits": refused(tiff(GREY.astype(np.uint32)), unsupported, "32-bit unsigned"),
        "TIFF, five channels": refused(tiff(five, photometric=BLACK_IS_0), unsupported, "5 channels"),
        "TIFF, 60000 channels": refused(tiff(GREY, num_channels=60000), unsupported, "60000 channels"),
        "a raw file, DNG": refused(tiff(PICTURE, entry(50706, 1, 4, b"\1\4\0\0")), "unsupported_format", "raw file"),
        "a raw file, of a mosaic": refused(tiff(GREY, photometric=32803), "unsupported_format", "raw file"),
        "a raw file, NEF": refused(
            tiff(PICTURE, entry(254, 4, 1, long(1)), entry(330, 4, 1, long(8))), "unsupported_format", "raw file"
        ),
        "a raw file, CR2": refused(tiff(PICTURE)[:4] + long(16) + b"CR\2\0" + bytes(4) + tiff(PICTURE)[8:],
                                   "unsupported_format", "raw file"),
        "TIFF, a tile of 60000 x 60000": refused(_tile(60000), "too_large", "a tile of 3600000000 pixels"),
        "TIFF, 60000 x 60000": refused(tiff(GREY, size=(60000, 60000)), "too_large", "pixels"),
    }  # fmt: skip


def _tile(side: int) -> bytes:
    """A small picture in one huge tile, packed: a decoder that believes it takes 3.6 GB."""
    data = encode(GREY, "TIFF", compression="tiff_adobe_deflate")
    (start,) = struct.unpack_from("<I", data, 4)
    (num,) = struct.unpack_from("<H", data, start)
    entries = [data[start + 2 + 12 * at : start + 14 + 12 * at] for at in range(num)]
    renamed = {273: 324, 279: 325}
    moved = [
        struct.pack("<H", renamed.get(tag, tag)) + raw[2:] for raw in entries if (tag := raw[0] + 256 * raw[1]) != 278
    ]
    moved += [entry(322, 4, 1, long(side)), entry(323, 4, 1, long(side))]
    moved.sort(key=lambda raw: raw[0] + 256 * raw[1])
    return data[:4] + long(len(data)) + data[8:] + short(len(moved)) + b"".join(moved) + long(0)


def _tags() -> dict[str, Case]:
    made = {}
    stored = np.ascontiguousarray(turned(PICTURE, 6))
    for order, name in (("<", "II"), (">", "MM")):
        for what, odd in odd_entries(order).items():
            if what == "negative width":
                continue  # that tag is the picture's own
            made[f"TIFF, turned, tag: {what}, {name}"] = shown(tiff(stored, odd, orientation(6, order), order=order))
    stored_lzw = encode(stored, "TIFF", compression="tiff_lzw", tiffinfo={274: 6})
    return made | {
        "TIFF, packed and turned": shown(stored_lzw),
        "TIFF, orientation 9": shown(tiff(PICTURE, orientation(9))),
        "TIFF, next directory is this one": shown(tiff(PICTURE, following=8)),
        "TIFF, next directory beyond the end": shown(tiff(PICTURE, following=0x7FFFFFF0)),
        "TIFF, XMP that is none": shown(tiff(PICTURE, entry(700, 2, 100, long(8)))),
        "TIFF, XMP of a number": shown(tiff(PICTURE, entry(700, 3, 1, short(7)))),
        "TIFF, Photoshop blocks that are none": shown(tiff(PICTURE, entry(34377, 7, 60, long(8)))),
        "TIFF, a profile that is none": shown(tiff(PICTURE, entry(34675, 7, 60, long(8)))),
        "TIFF, a resolution of 0/0": shown(tiff(PICTURE, entry(282, 5, 1, long(4)), entry(283, 5, 1, long(4)))),
    }


def _damage() -> dict[str, Case]:
    whole, packed = tiff(PICTURE), encode(PICTURE, "TIFF", compression="tiff_lzw")
    kinds: Sequence[tuple[str, bytes]] = (
        ("half of it", whole[: len(whole) // 2]),
        ("packed, half of it", packed[: len(packed) // 2]),
        ("a byte missing", whole[:-1]),
        ("its header alone", whole[:8]),
        ("no directory", b"II*\0" + long(0x7FFFFFF0)),
        ("an empty directory", b"II*\0" + long(8) + bytes(6)),
        ("no width", tiff(PICTURE).replace(entry(256, 4, 1, long(WIDTH)), entry(258, 4, 1, long(WIDTH)))),
        (
            "strips beyond the end",
            whole.replace(whole[8 + 2 + 12 * 5 : 8 + 2 + 12 * 6], entry(273, 4, 1, long(1 << 30))),
        ),
        ("an unknown compression", tiff(PICTURE).replace(entry(259, 3, 1, short(1)), entry(259, 3, 1, short(9999)))),
    )
    return {f"TIFF, {name}": refused(data, "undecodable") for name, data in kinds}


def page_sizes(data: bytes) -> list[tuple[int, int]]:
    """Of all pages, by Pillow."""
    with PIL.Image.open(io.BytesIO(data)) as image:
        return [(image.seek(number), image.size)[1] for number in range(image.n_frames)]  # type: ignore[attr-defined]
