"""JPEG files: colour models, scans, markers that are damaged, files that were cut off."""

import functools
import struct

import numpy as np
import PIL.Image
import PIL.ImageCms

from tests.pipeline.data.image_files.cases import (
    GREY,
    LOSSY,
    PICTURE,
    Case,
    entry,
    exif,
    jpeg,
    long,
    refused,
    segment,
    shown,
)
from tests.pipeline.data.image_files.icc_profile import CYAN_LAB, cmyk_profile, srgb_of

INKS = np.dstack([255 - PICTURE, np.zeros(PICTURE.shape[:2], np.uint8)])
"""PICTURE in inks without black, 255 is full."""


_PHOTOSHOP = b"Photoshop 3.0\0" + b"8BIM"
SRGB = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
CYAN = np.zeros_like(INKS)
CYAN[..., 0] = 255
CYAN_BY_PROFILE = np.broadcast_to(srgb_of(CYAN_LAB), PICTURE.shape)


def inks(*segments: bytes, picture: np.ndarray = INKS, **options: object) -> bytes:
    return jpeg(
        *segments,
        picture=PIL.Image.frombytes("CMYK", (picture.shape[1], picture.shape[0]), picture.tobytes()),
        **options,
    )


@functools.cache
def cases() -> dict[str, Case]:
    plain = jpeg()
    return {
        **_colours(plain), **_markers(), **_scans(), **_cut(plain),
        "JPEG, damaged tables": refused(plain.replace(b"\xff\xdb\0\x43", b"\xff\xdb\0\x44"), "undecodable"),
        "JPEG, 65535 x 65535": refused(_resized(plain, 65535), "too_large", "pixels"),
        "JPEG, 0 x 0": refused(_resized(plain, 0), "undecodable"),
    }  # fmt: skip


def _resized(data: bytes, side: int) -> bytes:
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", side, side) + data[at + 4 :]


def _colours(plain: bytes) -> dict[str, Case]:
    ycck = inks()
    at = ycck.index(b"Adobe") + 11
    ycck = ycck[:at] + b"\2" + ycck[at + 1 :]  # the same numbers, taken for YCbCr and black
    y, cb, cr = (PICTURE[..., channel].astype(float) for channel in range(3))
    rgb = np.stack(
        [y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)], axis=-1
    ).clip(0, 255)  # the file holds 255 - ink, which is PICTURE; what YCbCr makes of it is the ink, in Adobe's way
    profile = cmyk_profile()
    parts = [segment(0xE2, b"ICC_PROFILE\0" + bytes([number, 2]) + part)
             for number, part in ((2, profile[900:]), (1, profile[:900]))]  # fmt: skip
    frame = plain.index(b"\xff\xc0")
    return {
        "JPEG": shown(plain, tolerance=LOSSY),
        "JPEG, grey": shown(jpeg(picture=GREY), GREY, LOSSY),
        "JPEG, colours at half the resolution": shown(jpeg(subsampling=2), tolerance=40),
        "JPEG, inks": shown(inks(), tolerance=LOSSY),
        "JPEG, inks as YCCK": shown(ycck, 255 - rgb, 2 * LOSSY),
        "JPEG, inks with a profile": shown(inks(picture=CYAN, icc_profile=profile), CYAN_BY_PROFILE, 4),
        "JPEG, inks with a profile in two parts": shown(inks(*parts, picture=CYAN), CYAN_BY_PROFILE, 4),
        "JPEG, inks with a damaged profile": shown(inks(icc_profile=profile[:300]), tolerance=LOSSY),
        "JPEG, inks with a profile that is none": shown(inks(icc_profile=b"x" * 200), tolerance=LOSSY),
        "JPEG, inks with a profile of screens": shown(inks(icc_profile=SRGB), tolerance=LOSSY),
        "JPEG, a profile of inks in an RGB image": shown(jpeg(icc_profile=profile), tolerance=LOSSY),
        "JPEG, 12 bits": refused(
            plain[: frame + 4] + b"\x0c" + plain[frame + 5 :], "unsupported_pixels", "12 bits per sample"
        ),
    }


def _markers() -> dict[str, Case]:
    icc = b"ICC_PROFILE\0"
    odd = {
        "a Photoshop block that is cut off": segment(0xED, _PHOTOSHOP),
        "a Photoshop block of four thousand million bytes": segment(0xED, _PHOTOSHOP + b"\4\4\0\0\xff\xff\xff\xff"),
        "a Photoshop resolution that is cut off": segment(0xED, _PHOTOSHOP + b"\3\xed\0\0\0\0\0\2ab"),
        "a short JFIF marker": segment(0xE0, b"JFIF\0"),
        "a JFIF marker without a version": segment(0xE0, b"JFIF\0\1"),
        "a short Adobe marker": segment(0xEE, b"Adobe"),
        "a short MPF marker": segment(0xE2, b"MPF\0"),
        "an MPF marker that is none": segment(0xE2, b"MPF\0" + exif([entry(0xB001, 4, 1, long(7))])),
        "an MPF marker whose number is a text": segment(0xE2, b"MPF\0" + exif([entry(0xB001, 2, 1, b"7")])),
        "a short profile marker": segment(0xE2, icc),
        "the second half of a profile": segment(0xE2, icc + b"\2\2abc"),
        "profile parts that are numbered 0": segment(0xE2, icc + b"\0\0abc") * 2,
        "a megabyte of XMP": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"x" * 60000) * 17,
        "a megabyte of comments": segment(0xFE, b"c" * 60000) * 17,
        "an empty comment": segment(0xFE, b""),
        "empty application data": b"".join(segment(marker, b"") for marker in range(0xE0, 0xF0)),
        "FlashPix data": segment(0xE2, b"FPXR\0\1"),
        "a gain map's marker": segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0 hdrgm:Version="1.0"'),
        "junk between markers": segment(0xFE, b"") + b"\0\1\2junk\0",
        "filling before a marker": b"\xff" * 9,
    }  # fmt: skip
    made = {f"JPEG with {name}": shown(jpeg(segments), tolerance=LOSSY) for name, segments in odd.items()}
    made["JPEG with a second picture behind it"] = shown(jpeg() + jpeg(picture=255 - PICTURE), tolerance=LOSSY)
    made["JPEG with something behind its end"] = shown(jpeg() + b"garbage" * 100, tolerance=LOSSY)
    return made


def _scans() -> dict[str, Case]:
    large = PIL.Image.fromarray(PICTURE).resize((70, 50))
    return {
        "JPEG, progressive": shown(jpeg(progressive=True), tolerance=LOSSY),
        "JPEG, restart markers": shown(jpeg(picture=large, restart_marker_blocks=1), np.asarray(large), LOSSY),
        "JPEG, optimised": shown(jpeg(optimize=True), tolerance=LOSSY),
        "JPEG, a row": shown(jpeg(picture=PICTURE[:1]), PICTURE[:1], LOSSY),
        "JPEG, a column": shown(jpeg(picture=PICTURE[:, :1]), PICTURE[:, :1], LOSSY),
    }


def _cut(plain: bytes) -> dict[str, Case]:
    large = np.asarray(PIL.Image.fromarray(PICTURE).resize((70, 50), PIL.Image.Resampling.BICUBIC))
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    restarts = jpeg(picture=noise, restart_marker_blocks=3)
    progressive = jpeg(picture=large, progressive=True)
    last_restart = max(restarts.rfind(bytes([0xFF, 0xD0 + number])) for number in range(8))
    last_scan = progressive.rfind(b"\xff\xda")
    made = {
        "JPEG, without its end": shown(plain[:-2], tolerance=LOSSY),
        "JPEG, cut off within its end": shown(plain[:-1], tolerance=LOSSY),
        "JPEG, progressive, without its end": shown(progressive[:-2], large, LOSSY),
        "JPEG, restart markers, without its end": shown(restarts[:-2], noise, 255),
        "JPEG, cut off before a restart marker": refused(restarts[:last_restart], "undecodable", "truncated"),
        "JPEG, cut off behind a restart marker": refused(restarts[: last_restart + 2], "undecodable", "truncated"),
        "JPEG, progressive, without its last scan": refused(progressive[:last_scan], "undecodable"),
        "JPEG, progressive, cut off in its last scan": refused(progressive[:-40], "undecodable"),
        "JPEG, half of it": refused(plain[: len(plain) // 2], "undecodable"),
        "JPEG, its tables alone": refused(plain[: plain.index(b"\xff\xda")], "undecodable"),
        "JPEG, its first bytes alone": refused(plain[:4], "undecodable"),
        "JPEG, nothing but a beginning and an end": refused(b"\xff\xd8\xff\xd9" + bytes(9), "undecodable"),
    }
    data = jpeg(picture=noise)
    for num_bytes in (3, 5, 9, 33, 200):
        made[f"JPEG, {num_bytes - 2} bytes of its picture missing"] = refused(
            data[:-num_bytes], "undecodable", "truncated"
        )
    return made
