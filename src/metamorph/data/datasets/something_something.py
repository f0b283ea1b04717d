"""Something-Something V2 (Goyal et al., 2017): clips whose frames are to be predicted. See docs/datasets/something-something.md."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from metamorph.data.datasets.clips import MAX_FRAMES, ClipSource, frames_to_predict, prediction_settings
from metamorph.data.datasets.published import existing, folder, open_records, text_field, video_of
from metamorph.data.faults import Report
from metamorph.data.frames import Variant
from metamorph.data.rows import RawRow
from metamorph.data.video import VideoSampling, raise_or_log
from metamorph.messages import Example

SPLITS = ("train", "validation", "test")
"""All parts: their sum is the number of the paper."""


def source(
    directory: str,
    videos: str = "20bn-something-something-v2",
    labels: str = "labels",
    splits: Sequence[str] = SPLITS,
    name: str = "something_something",
    max_frames: int = MAX_FRAMES,
    variants: Sequence[str] | None = None,
    damaged_videos: str = "refuse",
    seed: int = 0,
    whole_files: bool = True,
) -> ClipSource:
    """Clips of Something-Something V2: one a video, at a random interval, some frames shown and others to be drawn.

    Args:
        directory: the folder of the data set.
        videos: the folder of .webm files, relative to it.
        labels: the folder of train.json, validation.json and test.json, of which only the ids are read.
        splits: which of them.
        name: how tables and errors call the source.
        max_frames: at most so many of a clip.
        variants: the tasks; by default all.
        damaged_videos: `refuse` videos that break off, or `shorten` them to the frames before the break, with a warning in the log.
        seed: of intervals, tasks and wording.
        whole_files: refuse a file of records that is cut off, empty or in another encoding; off to look at what is left of it.

    Raises:
        RecordError: a file is missing or holds no rows.
        ConfigError: a setting is unknown or out of range.
    """
    root = folder(directory, holds=f"{labels} and {videos}")
    shown = folder(root / videos, holds="the videos")
    sampling, chosen = prediction_settings(max_frames, variants, damaged_videos)
    rows = open_records(
        existing([root / labels / f"{split}.json" for split in splits], holds="the labels of a part"), shown, name, whole_files=whole_files
    )
    return ClipSource(rows, partial(convert, root=shown, sampling=sampling, variants=chosen, name=name), name, seed)


def convert(
    raw: RawRow,
    rng: np.random.Generator,
    root: Path,
    sampling: VideoSampling,
    variants: Sequence[Variant],
    name: str,
    warn: Report = raise_or_log,
) -> Example:
    """An entry of the labels as an example.

    Raises:
        RecordError, MediaError: it has no id, or its video cannot be used.
    """
    video = video_of(raw, f"{text_field(raw, 'id')}.webm", root, "id")
    return frames_to_predict(raw, rng, video, sampling, variants, name, warn=warn)
