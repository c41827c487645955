"""Cameras' orientation in EXIF data of every state, in the formats that hold any."""

import functools
import io

import numpy as np
import PIL.Image

from tests.pipeline.data.image_files.cases import (
    LOSSY,
    PICTURE,
    Case,
    chunk,
    encode,
    entry,
    exif,
    exif_segment,
    jpeg,
    long,
    odd_entries,
    orientation,
    rgb_png,
    segment,
    short,
    shown,
    turned,
)

STORED = np.ascontiguousarray(turned(PICTURE, 6))
"""What a camera with orientation 6 stores."""


def turning() -> dict[str, bytes]:
    """EXIF data that say 6."""
    blocks = {}
    for name, order in (("II", "<"), ("MM", ">")):
        o = orientation(6, order)
        for what, odd in odd_entries(order).items():
            blocks[f"{what}, before, {name}"] = exif([odd, o], order)
            blocks[f"{what}, behind, {name}"] = exif([o, odd], order)
        blocks[f"sound, {name}"] = exif([o], order)
        blocks[f"next directory is this one, {name}"] = exif([o], order, following=8)
        blocks[f"next directory beyond the end, {name}"] = exif([o], order, following=0x7FFFFFF0)
        blocks[f"more entries said than there are, {name}"] = exif([o], order, count=60000)
        blocks[f"cut off behind the entry, {name}"] = exif([o], order)[: 8 + 2 + 12]
        blocks[f"as a long, {name}"] = exif([entry(0x0112, 4, 1, long(6, order), order)], order)
        blocks[f"as a byte, {name}"] = exif([entry(0x0112, 1, 1, b"\6", order)], order)
        blocks[f"twice, {name}"] = exif([o, orientation(3, order)], order)
    return blocks


def not_turning() -> dict[str, bytes]:
    """EXIF data that say nothing, though some hold a 6."""
    sound = exif([orientation()])
    return {
        "empty": b"",
        "no header": b"abcdefgh" + sound[8:],
        "header alone": sound[:8],
        "directory beyond the end": sound[:4] + long(0x7FFFFFF0) + sound[8:],
        "cut off within the entry": sound[: 8 + 2 + 9],
        "no entries": exif([]),
        "orientation 0": exif([orientation(0)]),
        "orientation 9": exif([orientation(9)]),
        "orientation of 2 values": exif([entry(0x0112, 3, 2, short(6) * 2)]),
        "orientation of 0 values": exif([entry(0x0112, 3, 0, short(6))]),
        "orientation as text": exif([entry(0x0112, 2, 2, b"6\0")]),
        "orientation of four thousand million values": exif([entry(0x0112, 3, 0xFFFFFFFF, short(6))]),
    }


XMP = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'


@functools.cache
def cases() -> dict[str, Case]:
    made = {}
    for name, block in turning().items():
        made[f"JPEG, turned, EXIF: {name}"] = shown(jpeg(exif_segment(block), picture=STORED), tolerance=LOSSY)
    for name, block in not_turning().items():
        made[f"JPEG, upright, EXIF: {name}"] = shown(jpeg(exif_segment(block)), tolerance=LOSSY)
    few = {name: block for name, block in turning().items() if "before, MM" in name or "said" in name}
    for name, block in few.items():
        made[f"PNG, turned, EXIF: {name}"] = shown(rgb_png(chunk(b"eXIf", block), picture=STORED))
        made[f"WebP, turned, EXIF: {name}"] = shown(encode(STORED, "WEBP", lossless=True, exif=block))
    for name, block in not_turning().items():
        made[f"PNG, upright, EXIF: {name}"] = shown(rgb_png(chunk(b"eXIf", block)))
        if block:
            made[f"WebP, upright, EXIF: {name}"] = shown(encode(PICTURE, "WEBP", lossless=True, exif=block))
    for value in range(1, 9):
        stored = np.ascontiguousarray(turned(PICTURE, value))
        made[f"JPEG, orientation {value}"] = shown(
            jpeg(exif_segment(exif([orientation(value)])), picture=stored), tolerance=LOSSY
        )
        made[f"PNG, orientation {value}"] = shown(rgb_png(chunk(b"eXIf", exif([orientation(value)])), picture=stored))
    sound = exif_segment(exif([orientation()]))
    made |= {
        "JPEG, XMP says another orientation": shown(jpeg(segment(0xE1, XMP), sound, picture=STORED), tolerance=LOSSY),
        "JPEG, XMP alone says an orientation": shown(jpeg(segment(0xE1, XMP)), tolerance=LOSSY),
        "JPEG, EXIF in a second segment": shown(jpeg(exif_segment(b""), sound, picture=STORED), tolerance=LOSSY),
        "JPEG, EXIF in two segments, the first counts": shown(
            jpeg(sound, exif_segment(exif([orientation(3)])), picture=STORED), tolerance=LOSSY
        ),
        "JPEG, EXIF behind the tables": shown(_behind_the_tables(sound), tolerance=LOSSY),
        "PNG, EXIF behind the pixels": shown(rgb_png(picture=STORED, after=chunk(b"eXIf", exif([orientation()])))),
        "PNG, EXIF with a wrong checksum": shown(rgb_png(chunk(b"eXIf", exif([orientation()]), is_sound=False))),
        "PNG, EXIF as a text": shown(rgb_png(chunk(b"tEXt", b"exif\0" + exif([orientation()])))),
    }
    made |= avif_cases()
    return made


def _behind_the_tables(segments: bytes) -> bytes:
    data = jpeg(picture=STORED)
    frame = data.index(b"\xff\xc0")
    return data[:frame] + segments + data[frame:]


def avif_cases() -> dict[str, Case]:
    """AVIF turns by properties of its own; EXIF does not count, however odd."""
    sound = PIL.Image.Exif()
    sound[0x0112] = 6
    sound[0x011A] = 72.0
    turned_file = encode(STORED, "AVIF", quality=100, subsampling="4:4:4", exif=sound)
    kept = encode(PICTURE, "AVIF", quality=100, subsampling="4:4:4", exif=exif([entry(0x010F, 2, 4, b"abc\0")]))
    at = kept.index(b"II*\0") + 10
    made = {"AVIF, turned": shown(turned_file, tolerance=LOSSY), "AVIF, EXIF": shown(kept, tolerance=LOSSY)}
    for name, odd in odd_entries().items():
        data = kept[:at] + odd + kept[at + 12 :]
        made[f"AVIF, upright, EXIF: {name}"] = shown(data, tolerance=LOSSY)
    made["AVIF, upright, EXIF says 6"] = shown(kept[:at] + orientation() + kept[at + 12 :], tolerance=LOSSY)
    made["AVIF, upright, EXIF without a header"] = shown(kept.replace(b"II*\0", b"abcd"), tolerance=LOSSY)
    assert b"\x01\x1a\0\x05" in turned_file, "a rational number"
    odd = turned_file.replace(b"\x01\x1a\0\x05", b"\x01\x1a\0\x01")
    made["AVIF, turned, EXIF: resolution as bytes"] = shown(odd, tolerance=LOSSY)
    return made


def opens_in_pillow(data: bytes) -> bool:
    """Whether Pillow alone decodes and turns a file: what these are odd to."""
    import PIL.ImageOps

    try:
        with PIL.Image.open(io.BytesIO(data)) as image:
            PIL.ImageOps.exif_transpose(image).load()
    except Exception:
        return False
    return True
