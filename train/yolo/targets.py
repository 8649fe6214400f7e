"""The teacher's features under every cell of an augmented batch.

From a cell of the student's map to its target, in four steps: the cell's center is projected into each source image
(homographies of `geometry`); where that source is visible, the point is mapped into the source's stored grid (the
teacher's resize); the four stored cells around it are mixed bilinearly; and where several sources share a pixel (MixUp)
or several points a cell, the results are averaged by their share. Everything is computed for the whole batch at once,
over the distinct sources only, because mosaics show one source in several images. Shapes: `B` images, `K` sources of one
training image, `h w` student cells, `g g` teacher cells, `D` teacher width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from imaging.geometry import View, cell_centers, flips_horizontally, resize_view
from train.data.prefetch import to_device
from train.distill.losses import full_precision
from train.distill.projector import TargetStandardizer
from train.yolo.geometry import SOURCE_PLACEMENTS, SOURCE_ROWS

PENDING = "teacher_grids"
#: Batches whose grids are in memory at once: one in use, one being copied, one being read.
BUFFERS = 3


@dataclass(frozen=True)
class GatheredGrids:
    """Grids of the distinct sources of a batch: `grids` [U, g, g, D] as stored, `index` int64 [B, K] into them.

    `views` float32 [U, 2, 3] take normalized source coordinates to normalized grid coordinates; `content` float32
    [U, 4] bounds the cells that show the source and not padding, as first x, first y, last x, last y. `ready`: on a
    GPU, the event after which the copies are there.
    """

    grids: Tensor
    index: Tensor
    views: Tensor
    content: Tensor
    ready: torch.cuda.Event | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.grids, self.index, self.views, self.content

    def wait(self) -> GatheredGrids:
        """The same, usable by what is launched from now on; the host does not wait."""
        if self.ready is not None:
            stream = torch.cuda.current_stream(self.grids.device)
            stream.wait_event(self.ready)
            for tensor in self.tensors:
                tensor.record_stream(stream)  # made on the copying stream, used on this one
        return self


class TeacherTargets:
    """Looks up targets for batches of one split.

    `gather(rows, flipped, device)` returns the stored grids [U, g, g, D] of rows int64 [U] on the host, for copying to
    `device`, those of the mirror image where `flipped` [U] is true; they stay valid until `BUFFERS` more calls. `sizes` int [N, 2] are the originals' (width, height); `resize` and
    `teacher_size` (width, height) the teacher's view of them.
    `sources_per_cell` is 2 where MixUp may blend two images into one cell. `exact_flip`: the store has the grids of
    the mirror images, which sources that are shown flipped get. `pending`: the key under which a batch
    carries what is being read.
    """

    def __init__(
        self,
        gather: Callable[[NDArray[np.int64], NDArray[np.bool_], torch.device], Tensor],
        sizes: NDArray[np.integer[Any]],
        standardizer: TargetStandardizer,
        *,
        resize: str,
        teacher_size: tuple[int, int],
        sources_per_cell: int = 1,
        exact_flip: bool = False,
        pending: str = PENDING,
    ) -> None:
        self.gather, self.pending, self.exact_flip = gather, pending, exact_flip
        self.sizes = sizes
        self.standardizer = standardizer
        self.resize = resize
        self.teacher_size = teacher_size
        self.sources_per_cell = sources_per_cell
        self.device = torch.device("cpu")
        self.copies: torch.cuda.Stream | None = None
        self.copying: deque[torch.cuda.Event] = deque()
        self.centers: dict[tuple[int, int], Tensor] = {}
        self.counts: dict[tuple[int, int], Tensor] = {}
        self.views_by_size: dict[tuple[int, ...], tuple[NDArray[np.float64], tuple[float, ...]]] = {}
        # One thread, so that reading overlaps the student's forward pass and batches stay in order.
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="teacher-grids")

    def __deepcopy__(self, memo: dict[int, Any]) -> TeacherTargets:
        """The EMA copy of a model shares the targets: they hold no weights, but a memory map and a thread."""
        return self

    def to(self, device: torch.device) -> TeacherTargets:
        """Targets are made on `device` from now on; on a GPU the grids are copied by a stream of their own."""
        self.standardizer.to(device)
        self.device, self.centers, self.counts = device, {}, {}
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        return self

    def prefetch(self, batch: dict[str, Any]) -> None:
        """Start reading the batch's grids, unless they are; `at` waits for them. `batch` is still on the CPU."""
        if self.pending not in batch:
            batch[self.pending] = self.reader.submit(
                self.read, batch[SOURCE_ROWS].numpy(), batch[SOURCE_PLACEMENTS].numpy()
            )

    def read(self, rows: NDArray[np.int64], placements: NDArray[np.float32]) -> GatheredGrids:
        """The grids of the batch's sources `rows` int64 [B, K], −1 where there is none, and their `placements`.

        A source that is shown flipped in one image and not in another has two grids where both are stored.
        """
        flipped = shown_flipped(placements) if self.exact_flip else np.zeros(rows.shape, np.bool_)
        sources = np.where(rows >= 0, 2 * rows + flipped, -1)
        distinct = np.unique(sources[sources >= 0])
        inverse = np.searchsorted(distinct, np.where(sources >= 0, sources, distinct[0]))
        if len(self.copying) == BUFFERS:
            self.copying.popleft().synchronize()  # from the buffer that is filled next
        distinct_rows, distinct_flipped = distinct // 2, distinct % 2 > 0
        grids = self.gather(distinct_rows, distinct_flipped, self.device)
        views, content = self.teacher_views(distinct_rows, distinct_flipped, grids.shape[1], grids.shape[2])
        return self.upload(
            GatheredGrids(grids, torch.from_numpy(inverse.reshape(rows.shape)), views, content)
        )

    def upload(self, read: GatheredGrids) -> GatheredGrids:
        """What was read, on the device: one copy of each array a batch, through pinned memory."""
        if self.copies is None:
            grids, index, views, content = (tensor.to(self.device) for tensor in read.tensors)
            return GatheredGrids(grids, index, views, content)
        with torch.cuda.stream(self.copies):
            grids, index, views, content = (to_device(tensor, self.device) for tensor in read.tensors)
            ready = torch.cuda.Event()
            ready.record(self.copies)
        self.copying.append(ready)
        return GatheredGrids(grids, index, views, content, ready)

    def teacher_views(
        self, rows: NDArray[np.int64], flipped: NDArray[np.bool_], height: int, width: int
    ) -> tuple[Tensor, Tensor]:
        """Maps float32 [U, 2, 3] source → grid (of the mirror image where `flipped`), and the content's cell bounds [U, 4]."""
        views = np.empty((len(rows), 2, 3), dtype=np.float32)
        content = np.empty((len(rows), 4), dtype=np.float32)
        for n, row in enumerate(rows):
            # Few distinct sizes, each worked out once: this thread and the trainer's share the interpreter's lock.
            size = (int(self.sizes[row][0]), int(self.sizes[row][1]), height, width, bool(flipped[n]))
            if size not in self.views_by_size:
                view = resize_view(self.resize, size[:2], self.teacher_size)
                view = view.compose(View.flip()) if flipped[n] else view
                self.views_by_size[size] = (view.inverse().matrix, content_cells(view, height, width))
            views[n], content[n] = self.views_by_size[size]
        return torch.from_numpy(views), torch.from_numpy(content)

    @torch.no_grad()
    def at(self, batch: Mapping[str, Any], height: int, width: int) -> tuple[Tensor, Tensor]:
        """Targets float32 [B, height, width, D], standardized, and weights float32 [B, height, width].

        A weight is 0 where no source lies under the cell's center, else the share of the pixels that it makes up.
        """
        with full_precision(batch[SOURCE_PLACEMENTS]):  # half precision would misplace cells
            return self.look_up(batch, height, width)

    def look_up(self, batch: Mapping[str, Any], height: int, width: int) -> tuple[Tensor, Tensor]:
        """`at`, wherever it is called."""
        pending = batch.get(self.pending)
        rows = batch[SOURCE_ROWS]
        if isinstance(pending, Future):
            read = pending.result()
        else:
            read = self.read(rows.cpu().numpy(), batch[SOURCE_PLACEMENTS].cpu().numpy())
        read = read.wait()
        values = batch[SOURCE_PLACEMENTS].float()
        # As many points a side as teacher cells fall into a student's cell, so that none is skipped.
        finer = max(1, -(-max(read.grids.shape[1:3]) // max(height, width)))
        points, share = source_points(values, self.centers_of(height * finer, width * finer))
        share = share * (rows >= 0)[..., None]
        views, content = read.views[read.index], read.content[read.index]
        points = points @ views[..., :2].transpose(-1, -2) + views[..., None, :, 2]
        share = share * inside(points, 0.0, 1.0)
        cells, weights = self.neighbors(read.grids, read.index, points, content, share)
        layout = (height, finer, width, finer)
        return self.mixed(read.grids, by_cell(cells, layout), by_cell(weights, layout), finer)

    def centers_of(self, height: int, width: int) -> Tensor:
        """Centers of `height` × `width` cells, float32 [height·width, 2] on the device; made once a size."""
        if (height, width) not in self.centers:
            centers = torch.from_numpy(cell_centers(height, width)).float().view(-1, 2)
            self.centers[height, width] = centers.to(self.device)
        return self.centers[height, width]

    def count_of(self, grids: Tensor) -> Tensor:
        """Columns and rows of the grids [U, g, g, D], float32 [2] on the device; made once."""
        height, width = grids.shape[1:3]
        if (height, width) not in self.counts:
            self.counts[height, width] = torch.tensor([width, height], dtype=torch.float32).to(self.device)
        return self.counts[height, width]

    def neighbors(
        self, grids: Tensor, index: Tensor, points: Tensor, content: Tensor, share: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The stored cells around each point and their weights, both [B, L, P, 4], L sources a point at most."""
        kept, which = share.topk(min(self.sources_per_cell, share.shape[1]), dim=1)
        cells, weights = bilinear_neighbors(points, content, self.count_of(grids))
        cells = cells + (index * grids[0, ..., 0].numel())[..., None, None]
        chosen = which[..., None].expand(-1, -1, -1, 4)
        return cells.gather(1, chosen), kept[..., None] * weights.gather(1, chosen)

    def mixed(self, grids: Tensor, cells: Tensor, weights: Tensor, finer: int) -> tuple[Tensor, Tensor]:
        """The weighted mean of stored cells: `cells`, `weights` [B, h, w, M] → targets [B, h, w, D], weights."""
        total = weights.sum(-1)
        normalized = weights / total.clamp_min(1e-6)[..., None]
        table = grids.reshape(-1, grids.shape[-1]).float()
        stored = functional.embedding_bag(
            cells.flatten(0, 2), table, per_sample_weights=normalized.flatten(0, 2), mode="sum"
        )
        return self.standardizer(stored).view(*total.shape, -1), total / finer**2


class LevelTargets:
    """The targets of each distilled level of the student; levels that learn one layer of the teacher share them."""

    def __init__(self, by_level: Mapping[str, TeacherTargets]) -> None:
        self.by_level = dict(by_level)

    def __getitem__(self, level: str) -> TeacherTargets:
        return self.by_level[level]

    def __deepcopy__(self, memo: dict[int, Any]) -> LevelTargets:
        """Shared by the EMA copy of a model, see `TeacherTargets`."""
        return self

    def to(self, device: torch.device) -> LevelTargets:
        for targets in self.by_level.values():
            targets.to(device)
        return self

    def prefetch(self, batch: dict[str, Any]) -> None:
        """Start reading the batch's grids of every layer, each once."""
        for targets in self.by_level.values():
            targets.prefetch(batch)


def by_cell(values: Tensor, layout: tuple[int, int, int, int]) -> Tensor:
    """[B, L, points, 4] with points in the order of `layout` (h, s, w, s) → [B, h, w, L·s·s·4]."""
    return values.unflatten(2, layout).permute(0, 2, 4, 1, 3, 5, 6).flatten(3)


def content_cells(view: View, height: int, width: int) -> tuple[float, float, float, float]:
    """First and last cell (x, y) of a grid whose center shows the source through the teacher's `view`."""
    low, high = np.sort(view.inverse().apply(np.array([[0.0, 0.0], [1.0, 1.0]])), axis=0).clip(0.0, 1.0)
    count = np.array([width, height])
    first = np.ceil(low * count - 0.5)
    last = np.floor(high * count - 0.5)
    # Content thinner than a cell: the cell it lies in.
    thin = first > last
    middle = np.minimum(np.floor((low + high) / 2 * count), count - 1)
    first, last = np.where(thin, middle, first), np.where(thin, middle, last)
    return float(first[0]), float(first[1]), float(last[0]), float(last[1])


def shown_flipped(placements: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Bool [B, K]: which sources of `placements` [B, K, PACKED_WIDTH] are mirrored left to right in the training image.

    A homography (perspective) is judged by its linear part at the middle of the training image.
    """
    homography = placements[..., :9].astype(np.float64).reshape(*placements.shape[:-1], 3, 3)
    middle = homography @ (0.5, 0.5, 1.0)
    divisor = np.where(np.abs(middle[..., 2:]) < 1e-9, 1e-9, middle[..., 2:])
    point = middle[..., :2] / divisor
    jacobian = (homography[..., :2, :2] - point[..., None] * homography[..., 2:, :2]) / divisor[..., None]
    return flips_horizontally(jacobian)


def source_points(values: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Where the centers [P, 2] of cells are in each source.

    `values` [B, K, PACKED_WIDTH] → normalized source coordinates [B, K, P, 2] and the source's share of the cell
    [B, K, P], 0 where it is not visible.
    """
    homogeneous = functional.pad(centers, (0, 1), value=1.0)
    projected = homogeneous @ values[..., :9].unflatten(-1, (3, 3)).transpose(-1, -2)
    divisor = projected[..., 2:]
    points = projected[..., :2] / torch.where(divisor.abs() < 1e-9, torch.full_like(divisor, 1e-9), divisor)
    visible = values[..., 9:13].unsqueeze(-2)
    shown = inside(points, visible[..., :2], visible[..., 2:])
    region = values[..., 13:17].unsqueeze(-2)
    in_region = inside(centers, region[..., :2], region[..., 2:])
    shown = shown & (in_region == (values[..., 17:18] > 0))
    return points, shown * values[..., 18:19]


def inside(points: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Bool [...]: which points [..., 2] lie in the half-open rectangle."""
    return ((points >= low) & (points < high)).all(-1)


def bilinear_neighbors(points: Tensor, content: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The four cells around each point [B, K, P, 2]: flat indices int64 and weights, both [B, K, P, 4].

    Points are clamped to the cells in `content` [B, K, 4], so that padding never mixes in. `count`: float32 [2], columns
    and rows of the grid. Both axes at once: on a GPU each launch costs the trainer more than the arithmetic in it.
    """
    first, last = content[..., None, :2], content[..., None, 2:]
    place = torch.nan_to_num(points, nan=0.0, posinf=1.0, neginf=0.0) * count - 0.5
    place = torch.clamp(place, first, last)
    before = place.floor()
    part = place - before
    near = torch.stack([before, torch.minimum(before + 1, last)], -1)  # [B, K, P, axis, 2]
    share = torch.stack([1 - part, part], -1)
    cells = near[..., 1, :, None] * count[0] + near[..., 0, None, :]
    weights = share[..., 1, :, None] * share[..., 0, None, :]
    return cells.flatten(-2).long(), weights.flatten(-2)


def foreground_weights(batch: Mapping[str, Any], height: int, width: int, factor: float) -> Tensor:
    """float32 [B, height, width]: `factor` where a cell touches a box of its image, 1 elsewhere."""
    boxes, image = batch["bboxes"], batch["batch_idx"].long()
    touched = torch.zeros(len(batch["img"]), height, width, device=boxes.device)
    if factor != 1.0 and len(boxes):
        low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
        across = overlaps(low[:, 0], high[:, 0], width)
        down = overlaps(low[:, 1], high[:, 1], height)
        touched.index_put_((image,), (down[:, :, None] & across[:, None, :]).float(), accumulate=True)
    return torch.where(touched > 0, factor, 1.0)


def overlaps(low: Tensor, high: Tensor, count: int) -> Tensor:
    """Bool [M, count]: which of `count` cells over [0, 1] the intervals [low, high] of [M] touch."""
    edge = torch.arange(count, device=low.device) / count
    return (low[:, None] < edge + 1 / count) & (high[:, None] > edge)
