"""What `cli predict --out` writes: records, pictures, annotated videos and the embeddings of label-free students."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from console.output import plain_json
from files.writing import publish, whole_file, writing
from train.deliver.predict import Prediction, VideoSummary
from train.run_folder import make_folder

RECORDS_FILE = "predictions.jsonl"
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


MATRIX_FILE, TABLE_FILE = "embeddings.npy", "embeddings.parquet"
HEADER_BYTES = 128
ROWS_AT_ONCE = 1024


class EmbeddingFiles:
    """`embeddings.npy` float32 [N, D] and `embeddings.parquet` (key, embedding), rows in the same order.

    Both appear when the context ends well; memory holds `ROWS_AT_ONCE` rows.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows, self.width = 0, 0
        self.keys: list[str] = []
        self.pending: list[NDArray[np.float32]] = []
        self.matrix: Any = None
        self.table: Any = None
        self.stack = contextlib.ExitStack()

    def add(self, key: str, embedding: NDArray[np.float32]) -> int:
        """Append a row [D]; returns its number."""
        self.keys.append(key)
        self.pending.append(np.ascontiguousarray(embedding, np.float32))
        self.rows += 1
        if len(self.pending) >= ROWS_AT_ONCE:
            self.flush()
        return self.rows - 1

    def open_files(self, width: int) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        matrix = self.stack.enter_context(whole_file(self.folder / MATRIX_FILE))
        table = self.stack.enter_context(whole_file(self.folder / TABLE_FILE))
        self.matrix = self.stack.enter_context(matrix.open("wb"))
        self.matrix.write(npy_header(0, width))
        schema = pa.schema([("key", pa.string()), ("embedding", pa.list_(pa.float32(), width))])
        self.table = self.stack.enter_context(pq.ParquetWriter(table, schema))

    def flush(self) -> None:
        import pyarrow as pa

        if not self.pending:
            return
        rows = np.stack(self.pending)
        with writing(self.folder):
            if self.matrix is None:
                self.width = rows.shape[1]
                self.open_files(self.width)
            self.matrix.write(rows.tobytes())
            column = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), self.width)
            self.table.write_table(pa.table([pa.array(self.keys), column], schema=self.table.schema))
        self.keys, self.pending = [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> bool | None:
        if error[0] is None:
            try:
                self.flush()
                if self.matrix is not None:
                    with writing(self.folder / MATRIX_FILE):
                        self.matrix.seek(0)
                        self.matrix.write(npy_header(self.rows, self.width))
            except BaseException as problem:
                self.stack.__exit__(type(problem), problem, problem.__traceback__)
                raise
        return self.stack.__exit__(*error)


def npy_header(rows: int, width: int) -> bytes:
    """The header of a float32 matrix [rows, width] in NumPy's format 1.0, padded to a fixed size to be rewritten."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {width}), }}"
    body = text.ljust(HEADER_BYTES - 11) + "\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body.encode("ascii")


class PredictionWriter:
    """predictions.jsonl, pictures and annotated videos in a folder; the records of an earlier call are replaced.

    Of label-free students: the embeddings as `.npy` and Parquet (see EmbeddingFiles) in the place of pictures.
    """

    def __init__(self, folder: Path) -> None:
        make_folder(folder)
        self.folder, self.taken = folder, set[str]()
        self.video: VideoOutput | None = None  # the one whose frames are coming in
        self.embeddings = EmbeddingFiles(folder)
        with writing(folder / RECORDS_FILE):
            self.records = (folder / RECORDS_FILE).open("wb", buffering=0)

    def write(self, prediction: Prediction | VideoSummary) -> None:
        """One line, and the picture (for masks also the bare mask); equal names of different folders stay apart."""
        source = Path(prediction.record["file"])
        if isinstance(prediction, VideoSummary):
            self.append(prediction.record)
        elif prediction.embedding is not None:
            self.append(prediction.record)
            file, frame = prediction.record["file"], prediction.record.get("frame")
            self.embeddings.add(file if frame is None else f"{file}#{frame}", prediction.embedding)
        elif prediction.video_rate is not None:
            self.write_frame(source, prediction, prediction.video_rate)
        else:
            self.write_picture(source, prediction)

    def write_picture(self, source: Path, prediction: Prediction) -> None:
        self.close_video()
        assert prediction.image is not None
        stem = self.name(source)
        with whole_file(self.folder / f"{stem}.jpg") as partial:
            prediction.image.save(partial, quality=90)
        if prediction.mask is not None:
            with whole_file(self.folder / f"{stem}-mask.png") as partial:
                prediction.mask.save(partial)
        self.append({**prediction.record, "picture": f"{stem}.jpg"})

    def write_frame(self, source: Path, prediction: Prediction, rate: Fraction) -> None:
        """A frame of the annotated video, which begins with the first frame of another file."""
        assert prediction.image is not None
        if self.video is None or self.video.source != source:
            self.close_video()
            path = self.folder / f"{self.name(source)}.mp4"
            self.video = VideoOutput(source, path, rate, prediction.image.size)
        self.video.add(prediction.image)
        self.append({**prediction.record, "video": self.video.path.name})

    def close_video(self) -> None:
        video, self.video = self.video, None
        if video is not None:
            video.close()

    def append(self, record: dict[str, Any]) -> None:
        """A whole line or none."""
        line = (json.dumps(plain_json(record), ensure_ascii=False) + "\n").encode()
        end = self.records.tell()
        with writing(self.folder / RECORDS_FILE):
            if self.records.write(line) != len(line):  # the disk is full
                self.records.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def name(self, source: Path) -> str:
        """The source's name, with its folders' where that is taken."""
        folders = [part for part in source.parent.parts if part not in (source.anchor, "..", ".")]
        long = "-".join([*folders, source.stem])
        names = itertools.chain([source.stem, long], (f"{long}-{n}" for n in itertools.count(2)))
        free = next(name for name in names if name not in self.taken)
        self.taken.add(free)
        return free

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                self.close_video()
            elif self.video is not None:
                self.video.discard()
            self.embeddings.__exit__(kind, *error)
        finally:
            self.records.close()
