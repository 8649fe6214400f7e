"""What a decoding process sets up before its first image."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from os import getpid

from PIL import Image

from extract.decode.pool import begin_worker


def test_memory_of_decoded_images_is_kept_for_the_next_one() -> None:
    """Else Pillow returns it to the system after each image and gets it back page by page."""
    with ProcessPoolExecutor(
        1, mp_context=get_context("spawn"), initializer=begin_worker, initargs=(getpid(),)
    ) as pool:
        assert pool.submit(Image.core.get_blocks_max).result() >= 16
