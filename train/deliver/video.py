"""Annotated videos: pictures, one after the other, as an MP4 file."""

from __future__ import annotations

import contextlib
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image

from files.writing import publish, writing

# The first that PyAV's build has; every player shows both.
CODECS = ("libx264", "mpeg4")


class VideoOutput:
    """Writes pictures as an MP4 file, which has its name only when it is complete.

    Args:
        source: the video that the pictures belong to.
        path: the file.
        rate: pictures a second.
        size: (width, height) of every picture; an odd side is made even, as the codecs want.
    """

    def __init__(self, source: Path, path: Path, rate: Fraction, size: tuple[int, int]) -> None:
        import av

        self.source, self.path = source, path
        self.partial = path.with_name(f".partial-{path.name}")
        self.size = (size[0] + size[0] % 2, size[1] + size[1] % 2)
        codec = next(name for name in CODECS if name in av.codecs_available)
        with writing(path):
            self.container: Any = av.open(str(self.partial), "w", format="mp4")
            stream: Any = self.container.add_stream(codec, rate=rate.limit_denominator(1000))
        stream.width, stream.height = self.size
        stream.pix_fmt = "yuv420p"
        self.stream = stream

    def add(self, picture: Image.Image) -> None:
        import av

        even = picture
        if picture.size != self.size:
            even = Image.new("RGB", self.size)
            even.paste(picture)
        with writing(self.path):
            self.container.mux(self.stream.encode(av.VideoFrame.from_image(even)))

    def close(self) -> None:
        """Finish the file and give it its name."""
        with writing(self.path):
            self.container.mux(self.stream.encode())
            self.container.close()
            publish(self.partial, self.path)

    def discard(self) -> None:
        """Leave nothing of a video whose frames did not all come."""
        with contextlib.suppress(OSError, ValueError):  # what is lost here was to be removed
            self.container.close()
        self.partial.unlink(missing_ok=True)
