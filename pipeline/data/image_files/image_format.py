"""Which kind of image a file is, by its first bytes and not by its name.

What is read, and what else people have in their folders: an image of another kind is refused by its name and with what
to do. Nothing here decodes, and no decoder but the one of the format is asked, so that none starts a program.
"""

from collections.abc import Callable

from pipeline.data.image_files.bare_image import BareImage
from pipeline.data.image_files.exif import TIFF_MAGICS
from pipeline.data.image_files.jpeg import MAGIC as JPEG_MAGIC
from pipeline.data.image_files.jpeg import bare_jpeg
from pipeline.data.image_files.png import MAGIC as PNG_MAGIC
from pipeline.data.image_files.png import bare_png
from pipeline.data.image_files.tiff import bare_tiff
from pipeline.data.image_files.unusable import UnusableImage
from pipeline.data.image_files.webp_avif import bare_avif, bare_webp

READ = "PNG, JPEG, WebP, BMP, TIFF, GIF, AVIF"
"""The formats that are read."""
IMAGE_EXTENSIONS = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".mpo", ".webp", ".bmp", ".dib", ".tif", ".tiff",
    ".gif", ".avif",
)  # fmt: skip
"""Names of files that are taken for images, in small letters. What they are, their content says."""
CONVERT = "convert it to PNG or JPEG"
"""What to do with an image of a format that is not read."""

_OTHERS = (  # first bytes, where, name
    (b"\0\0\0\x0cjP  ", 0, "JPEG 2000"), (b"\xff\x4f\xff\x51", 0, "JPEG 2000"), (b"\0\0\0\x0cJXL ", 0, "JPEG XL"),
    (b"\xff\x0a", 0, "JPEG XL"), (b"II\xbc", 0, "JPEG XR"), (b"8BPS", 0, "Photoshop (PSD)"),
    (b"gimp xcf", 0, "GIMP (XCF)"), (b"%!PS", 0, "PostScript (EPS)"), (b"\xc5\xd0\xd3\xc6", 0, "PostScript (EPS)"),
    (b"%PDF", 0, "PDF"), (b"\0\0\1\0", 0, "ICO"), (b"\0\0\2\0", 0, "CUR"), (b"icns", 0, "ICNS"),
    (b"\x76\x2f\x31\x01", 0, "OpenEXR"), (b"#?RADIANCE", 0, "Radiance HDR"), (b"DDS ", 0, "DDS"),
    (b"SIMPLE  =", 0, "FITS"), (b"DICM", 128, "DICOM"), (b"qoif", 0, "QOI"), (b"\x8aMNG", 0, "MNG"),
    (b"AT&TFORM", 0, "DjVu"), (b"FUJIFILMCCD-RAW", 0, "a camera's raw file"), (b"IIRO", 0, "a camera's raw file"),
    (b"IIRS", 0, "a camera's raw file"), (b"MMOR", 0, "a camera's raw file"), (b"IIU\0", 0, "a camera's raw file"),
    (b"FOVb", 0, "a camera's raw file"), (b"HEAPCCDR", 6, "a camera's raw file"), (b"\0MRM", 0, "a camera's raw file"),
    *((b"P%d%c" % (kind, blank), 0, "PNM") for kind in range(1, 8) for blank in b"\n\r\t "),
)  # fmt: skip
_NO_IMAGES = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself; fetch it: git lfs pull"),
    (b"\x93NUMPY", "a NumPy array, not an image file"),
    (b"PK\x03\x04", "a ZIP archive; unpack it"),
    (b"\x1f\x8b", "a gzip archive; unpack it"),
    (b"\x1aE\xdf\xa3", "a video; store its frames as PNG or JPEG"),
)
_BRANDS = (  # of ISO media files; the first that a file has is its kind
    ({b"avif", b"avis"}, "AVIF"),
    ({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}, "HEIC"),
    ({b"mif1", b"msf1", b"miaf"}, "HEIF"),
    ({b"crx "}, "a camera's raw file"),
)


def bare_image(data: bytes) -> BareImage:
    """The picture of a file, by its content.

    Raises:
        UnusableImage: If the file is empty, of a format that is not read, no image, or one whose samples have no white.
    """
    if not data:
        raise UnusableImage("empty", "the file is empty")
    read = _reader(data)
    if read is not None:
        return read(data)
    raise _refusal(data)


def _reader(data: bytes) -> Callable[[bytes], BareImage] | None:
    if data.startswith(PNG_MAGIC):
        return bare_png
    if data.startswith(JPEG_MAGIC):
        return bare_jpeg
    if data[:4] in TIFF_MAGICS:
        return bare_tiff
    if data.startswith((b"GIF87a", b"GIF89a")):
        return lambda data: BareImage(format="GIF", data=data)
    if data.startswith(b"BM"):
        return lambda data: BareImage(format="BMP", data=data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return bare_webp
    return bare_avif if _media_kind(data) == "AVIF" else None


def _media_kind(data: bytes) -> str:
    """What an ISO media file (HEIC, AVIF, MP4, ...) is; "" for other files."""
    if data[4:8] != b"ftyp":
        return ""
    end = min(int.from_bytes(data[:4], "big"), 256)
    brands = {data[8:12], *(data[at : at + 4] for at in range(16, end, 4))}
    return next((name for known, name in _BRANDS if brands & known), "video")


def _refusal(data: bytes) -> UnusableImage:
    start = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for magic, what in _NO_IMAGES:
        if data.startswith(magic):
            return UnusableImage("undecodable", f"no image: {what}")
    kind = _media_kind(data)
    if kind == "video":
        return UnusableImage("unsupported_format", "a video is not read; store its frames as PNG or JPEG")
    for magic, at, name in _OTHERS:
        if data[at : at + len(magic)] == magic:
            kind = kind or name
    if start.startswith((b"<?xml", b"<svg", b"<!--", b"<!doctype svg")) and b"<svg" in data[:4096].lower():
        kind = "SVG"
    if kind:
        return UnusableImage("unsupported_format", f"{kind} is not read; {CONVERT}")
    if start.startswith((b"<!doctype html", b"<html", b"<?xml", b"{")):
        return UnusableImage("undecodable", "no image: a page or an answer of a web server; fetch the file again")
    if not data.strip(b"\0"):
        return UnusableImage("undecodable", f"no image: {len(data)} bytes, all of them 0")
    return UnusableImage("undecodable", f"no image of a kind that is read ({READ}): {len(data)} bytes")
