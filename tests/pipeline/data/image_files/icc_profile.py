"""A profile of inks, made by hand: littleCMS makes none, and those of printers belong to somebody."""

import struct

CYAN_LAB = (50.0, 10.0, -40.0)
"""The colour of this printer's cyan: L*a*b* under D50."""
_PAPER, _BLACK, _OTHERS = (100.0, 0.0, 0.0), (0.0, 0.0, 0.0), (60.0, 50.0, 0.0)


def cmyk_profile() -> bytes:
    """An ICC profile (version 2) of a printer whose cyan is a blue, which no formula would guess."""
    colours = [
        _BLACK if black else CYAN_LAB if cyan else _OTHERS if magenta or yellow else _PAPER
        for cyan in (0, 1) for magenta in (0, 1) for yellow in (0, 1) for black in (0, 1)
    ]  # fmt: skip
    levels = b"".join(bytes([round(lab[0] * 255 / 100), round(lab[1] + 128), round(lab[2] + 128)]) for lab in colours)
    ramp = bytes(range(256))
    table = b"".join(
        [b"mft1", bytes(4), bytes([4, 3, 2, 0]), struct.pack(">9i", *(65536 if at % 4 == 0 else 0 for at in range(9))),
         ramp * 4, levels, ramp * 3]
    )  # fmt: skip
    text = b"desc" + bytes(4) + struct.pack(">I", 5) + b"inks\0" + bytes(78)
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    rights = b"text" + bytes(4) + b"none\0"
    tags, bodies, at = b"", b"", 128 + 4 + 4 * 12
    for name, body in ((b"desc", text), (b"cprt", rights), (b"wtpt", white), (b"A2B0", table)):
        body += bytes(-len(body) % 4)
        tags += name + struct.pack(">II", at + len(bodies), len(body))
        bodies += body
    head = b"".join(
        [struct.pack(">I", at + len(bodies)), bytes(4), struct.pack(">I", 0x02100000), b"prtr", b"CMYK", b"Lab ",
         struct.pack(">6H", 2026, 12, 1, 0, 0, 0), b"acsp", bytes(28), struct.pack(">3i", 63190, 65536, 54061)]
    )  # fmt: skip
    return head.ljust(128, b"\0") + struct.pack(">I", 4) + tags + bodies


def srgb_of(lab: tuple[float, float, float]) -> tuple[int, int, int]:
    """A colour in sRGB: the formulas of CIE 15 and IEC 61966-2-1, with Bradford's adaptation from D50 (Lindbloom)."""
    y = (lab[0] + 16) / 116
    cubes = [
        (t**3 if t > 6 / 29 else 3 * (6 / 29) ** 2 * (t - 4 / 29)) for t in (y + lab[1] / 500, y, y - lab[2] / 200)
    ]
    xyz = [cube * white for cube, white in zip(cubes, (0.96422, 1.0, 0.82521), strict=True)]
    matrix = (
        (3.1338561, -1.6168667, -0.4906146), (-0.9787684, 1.9161415, 0.0334540), (0.0719453, -0.2289914, 1.4052427),
    )  # fmt: skip
    linear = [sum(a * b for a, b in zip(row, xyz, strict=True)) for row in matrix]
    red, green, blue = (round(255 * (12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055)) for c in linear)
    return red, green, blue
