"""Data-set layouts → `Sample` records. `open_source(path)` finds the layout; `KINDS` lists them."""

from extract.sources.base import (
    AnnotationError,
    Boxes,
    Payload,
    Sample,
    Samples,
    Source,
    SourceError,
    content_digest,
)
from extract.sources.detect import KINDS, detect_kind, open_source
from imaging.clips import sample_frame_indices

__all__ = [
    "KINDS",
    "AnnotationError",
    "Boxes",
    "Payload",
    "Sample",
    "Samples",
    "Source",
    "SourceError",
    "content_digest",
    "detect_kind",
    "open_source",
    "sample_frame_indices",
]
