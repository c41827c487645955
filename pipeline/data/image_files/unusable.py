"""Why an image file makes no image of a dataset; the reasons are counted by their kind."""

from typing import Literal

UnusableKind = Literal["empty", "undecodable", "unsupported_format", "unsupported_pixels", "too_large", "too_small"]


class UnusableImage(ValueError):
    """A file that makes no image of a dataset; the message says why, in one line."""

    def __init__(self, kind: UnusableKind, reason: str) -> None:
        """Keep both.

        Args:
            kind: "empty" (no bytes), "undecodable" (damaged, or no image at all), "unsupported_format" (an image of a
                kind that is not read), "unsupported_pixels" (a format that is read, with samples that have no white,
                or more channels than a picture), "too_large" or "too_small".
            reason: For people; blanks and line ends become single blanks.
        """
        super().__init__(" ".join(reason.split()))
        self.kind: UnusableKind = kind
        """Short and stable, for programs."""
