"""HowTo100M (Miech et al., 2019): videos whose frames are to be predicted. See docs/datasets/howto100m.md."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from metamorph.data.datasets.clips import MAX_FRAMES, ClipSource, frames_to_predict, prediction_settings
from metamorph.data.datasets.published import existing, folder, text_field
from metamorph.data.faults import Report
from metamorph.data.frames import Variant
from metamorph.data.rows import RawRow
from metamorph.data.video import VideoSampling, raise_or_log
from metamorph.errors import ConfigError, MediaError, RecordError
from metamorph.messages import Example

ENDINGS = (".mp4", ".webm", ".mkv", ".avi", ".mov")
"""Of files of videos, in the order in which they are looked for."""
_log = logging.getLogger(__name__)


def source(
    directory: str,
    videos: str = "videos",
    file: str = "HowTo100M_v1.csv",
    name: str = "howto100m",
    missing: str = "refuse",
    max_frames: int = MAX_FRAMES,
    variants: Sequence[str] | None = None,
    damaged_videos: str = "refuse",
    seed: int = 0,
) -> ClipSource:
    """Clips of HowTo100M: one a video, at a random interval, some frames shown and others to be drawn.

    Args:
        directory: the folder of the data set.
        videos: the folder of videos, relative to it.
        file: the list of videos, relative to it.
        name: how tables and errors call the source.
        missing: what to do with listed videos for which there is no file: `refuse` them when they are read, or `leave_out` now.
        max_frames: at most so many of a clip.
        variants: the tasks; by default all.
        damaged_videos: `refuse` videos that break off, or `shorten` them to the frames before the break, with a warning in the log.
        seed: of intervals, tasks and wording.

    Raises:
        RecordError: the list is missing, has no column video_id, or no rows (that have a video).
        ConfigError: a setting is unknown or out of range.
    """
    if missing not in ("refuse", "leave_out"):
        raise ConfigError(f"missing {missing!r} but 'refuse' or 'leave_out' is expected ({name}). Correct it.")
    root = folder(directory, holds=file)
    shown = folder(root / videos, holds="the videos")
    sampling, chosen = prediction_settings(max_frames, variants, damaged_videos)
    listed = VideoList(existing([root / file], holds="the list of videos")[0])
    if missing == "leave_out":
        listed.leave_out_missing(shown, name)
    return ClipSource(listed, partial(convert, root=shown, sampling=sampling, variants=chosen, name=name), name, seed)


def convert(
    raw: RawRow,
    rng: np.random.Generator,
    root: Path,
    sampling: VideoSampling,
    variants: Sequence[Variant],
    name: str,
    warn: Report = raise_or_log,
) -> Example:
    """A line of the list as an example.

    Raises:
        MediaError: there is no video, or it cannot be used.
    """
    identifier = text_field(raw, "id")
    path = next((path for ending in ENDINGS if (path := root / f"{identifier}{ending}").is_file()), None)
    if path is None:
        found = f"no file {identifier} with an ending of {', '.join(ENDINGS)} in {root}"
        raise MediaError(f"{found} but a video is needed ({raw.place}, video_id). Fetch it, or set missing: leave_out.")
    return frames_to_predict(raw, rng, path, sampling, variants, name, field="video_id", warn=warn)


class VideoList:
    """The ids of the list, a few bytes each, with the lines on which they stand.

    Raises:
        RecordError: the file is no such list.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        ids: list[str] = []
        lines: list[int] = []
        try:
            with path.open(encoding="utf-8", newline="") as file:
                self._read(csv.DictReader(file), ids, lines)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise RecordError(f"no readable CSV ({error}) but a list of videos is needed ({path}). Fetch it again.") from error
        self._ids, self._lines = np.array(ids, dtype=np.bytes_), np.array(lines, dtype=np.int64)
        self._refuse_empty("Fetch the list again.")

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int, /) -> RawRow:
        """The id on a line, as the field `id`."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} but 0 to {len(self) - 1} exist ({self.path})")
        return RawRow({"id": self._ids[index].decode()}, f"{self.path}:{self._lines[index]}")

    def leave_out_missing(self, videos: Path, name: str) -> None:
        """Keep the lines whose video is there, and log how many are not.

        Raises:
            RecordError: none is there.
        """
        with os.scandir(videos) as entries:
            stems = {entry.name[: -len(ending)] for entry in entries for ending in ENDINGS if entry.name.endswith(ending)}
        there = np.isin(self._ids, np.array(sorted(stem for stem in stems if stem.isascii()), dtype=np.bytes_))
        if gone := int((~there).sum()):
            _log.warning("%d of %d videos of %s have no file in %s and are left out (source %s)", gone, len(self), self.path, videos, name)
        self._ids, self._lines = self._ids[there], self._lines[there]
        self._refuse_empty(f"Fetch videos into {videos}.")

    def _read(self, reader: csv.DictReader[str], ids: list[str], lines: list[int]) -> None:
        if "video_id" not in (reader.fieldnames or ()):
            columns = ", ".join(reader.fieldnames or ()) or "none"
            raise RecordError(f"columns {columns} but video_id is needed ({self.path}:1). Take HowTo100M_v1.csv as it is published.")
        for row in reader:
            identifier = row["video_id"]
            if not identifier or not identifier.isascii() or "/" in identifier:
                raise RecordError(f"video_id {identifier!r} but an id is needed ({self.path}:{reader.line_num}). Repair the line.")
            ids.append(identifier)
            lines.append(reader.line_num)

    def _refuse_empty(self, remedy: str) -> None:
        if not len(self._ids):
            raise RecordError(f"0 videos but at least 1 is needed ({self.path}). {remedy}")
