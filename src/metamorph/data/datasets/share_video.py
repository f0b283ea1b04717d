"""ShareGPTVideo (Zhang et al., 2024, for LLaVA-Hound): questions about folders of frames. See docs/datasets/share-video.md."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from metamorph.data.datasets.clips import MAX_FRAMES, ClipSource, questions_about
from metamorph.data.datasets.published import existing, folder, frames_of, open_records
from metamorph.data.faults import Report
from metamorph.data.rows import RawRow
from metamorph.data.video import VideoSampling, raise_or_log
from metamorph.errors import ConfigError
from metamorph.messages import Example

FILES = ("video_instruction/train/sft/video_240k_caption_15k.jsonl", "video_instruction/train/sft/video_caption_300k.jsonl")
"""Questions and captions whose videos are those of `train_300k`."""


def source(
    directory: str,
    frames: str = "train_300k",
    files: Sequence[str] = FILES,
    name: str = "share_video",
    stored_fps: float = 2.0,
    fps: float = 1.0,
    max_frames: int = MAX_FRAMES,
    damaged_videos: str = "refuse",
    whole_files: bool = True,
) -> ClipSource:
    """Questions about videos, of `ShareGPTVideo/train_video_and_instruction` with its archives of frames unpacked.

    Args:
        directory: the folder of the data set.
        frames: the folder with a folder of frames for each video, relative to it.
        files: the records, relative to it.
        name: how tables and errors call the source.
        stored_fps: how many frames per second the publishers took.
        fps: how many of them are shown.
        max_frames: at most so many, the first ones.
        damaged_videos: `refuse` videos with a broken frame, or `shorten` them to the frames before it, with a warning in the log.
        whole_files: refuse a file of records that is cut off, empty or in another encoding; off to look at what is left of it.

    Raises:
        RecordError: a file is missing or holds no rows.
        ConfigError: a number is out of range.
    """
    root = folder(directory, holds=", ".join(files))
    if not 0 < fps <= stored_fps:
        raise ConfigError(f"fps {fps} but a number above 0 and at most stored_fps {stored_fps} is needed ({name}). Lower it.")
    shown = folder(root / frames, holds="a folder of frames for each video")
    rows = open_records(existing([root / file for file in files], holds="a file of records"), shown, name, whole_files=whole_files)
    sampling = VideoSampling(fps=fps, max_frames=max_frames, damaged_videos=damaged_videos)
    return ClipSource(rows, partial(convert, root=shown, sampling=sampling, stored_fps=stored_fps, name=name), name)


def convert(
    raw: RawRow, rng: np.random.Generator, root: Path, sampling: VideoSampling, stored_fps: float, name: str, warn: Report = raise_or_log
) -> Example:
    """A record as an example. Nothing is drawn.

    Raises:
        RecordError, MediaError: the record or its frames cannot be used.
    """
    return questions_about(raw, frames_of(raw, raw.values.get("video"), root, "video"), sampling, name, stored_fps=stored_fps, warn=warn)
