"""Video-STaR (Zohar et al., 2024): questions about videos of three other data sets. See docs/datasets/video-star.md."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from metamorph.data.datasets.clips import MAX_FRAMES, ClipSource, questions_about
from metamorph.data.datasets.published import existing, folder, open_records, video_of
from metamorph.data.faults import Report
from metamorph.data.rows import RawRow
from metamorph.data.video import VideoSampling, raise_or_log
from metamorph.messages import Example

FILES = ("ft_json/kinetics700_tune_.json", "ft_json/starb_tune_.json", "ft_json/finediving_tune_.json")
"""The files of records, as they lie on the hub."""


def source(
    directory: str,
    videos: str | None = None,
    files: Sequence[str] = FILES,
    name: str = "video_star",
    fps: float = 1.0,
    max_frames: int = MAX_FRAMES,
    damaged_videos: str = "refuse",
    whole_files: bool = True,
) -> ClipSource:
    """Questions about videos, of `orrzohar/Video-STaR`.

    Args:
        directory: the folder of the data set, with the files of records.
        videos: the folder to which paths of videos are relative; by default the same.
        files: the records, relative to `directory`.
        name: how tables and errors call the source.
        fps: frames per second that are shown.
        max_frames: at most so many, the first ones.
        damaged_videos: `refuse` videos that break off, or `shorten` them to the frames before the break, with a warning in the log.
        whole_files: refuse a file of records that is cut off, empty or in another encoding; off to look at what is left of it.

    Raises:
        RecordError: a file is missing or holds no rows.
        ConfigError: a number is out of range.
    """
    root = folder(directory, holds=", ".join(files))
    shown = folder(videos, holds="the videos") if videos is not None else root
    rows = open_records(existing([root / file for file in files], holds="a file of records"), shown, name, whole_files=whole_files)
    sampling = VideoSampling(fps=fps, max_frames=max_frames, damaged_videos=damaged_videos)
    return ClipSource(rows, partial(convert, root=shown, sampling=sampling, name=name), name)


def convert(raw: RawRow, rng: np.random.Generator, root: Path, sampling: VideoSampling, name: str, warn: Report = raise_or_log) -> Example:
    """A record as an example. Its video is in `video`, or, as in the authors' own files, in `image`. Nothing is drawn.

    Raises:
        RecordError, MediaError: the record or its video cannot be used.
    """
    field = "image" if raw.values.get("video") is None and raw.values.get("image") is not None else "video"
    return questions_about(raw, video_of(raw, raw.values.get(field), root, field), sampling, name, field=field, warn=warn)
