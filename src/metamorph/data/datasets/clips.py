"""From video files to examples: questions about their frames, and frames to be predicted. Shared by the readers of video data sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from metamorph.data.datasets.published import PublishedSource, exchanges, identity
from metamorph.data.faults import Report, from_error
from metamorph.data.frames import VARIANTS, Variant
from metamorph.data.kinds import PureVideo, VideoQA, pure_video, video_qa
from metamorph.data.rows import RawRow
from metamorph.data.video import PURE_VIDEO, SampledVideo, VideoSampling, in_row, raise_or_log, sample_frames
from metamorph.errors import ConfigError, MediaError
from metamorph.messages import Example

MAX_FRAMES = PURE_VIDEO.max_frames
"""Of the authors' code, for both kinds."""


@dataclass(frozen=True)
class ClipSource(PublishedSource):
    """Rows about videos. `convert` takes a `warn` besides, which is told what speaks against a video that can be used; default: the log."""

    convert: Callable[..., Example]

    def examine(self, raw: RawRow, index: int, report: Report) -> Example | None:
        """Row `index` as an example; what is wrong with it and its video is told to `report`."""
        return PublishedSource.examine(replace(self, convert=partial(self.convert, warn=report)), raw, index, report)


def questions_about(
    raw: RawRow,
    video: Path,
    sampling: VideoSampling,
    name: str,
    *,
    field: str = "video",
    stored_fps: float = 1.0,
    warn: Report = raise_or_log,
) -> Example:
    """A record's questions about a video; its frames stand before the first, wherever the record puts its tag.

    Args:
        raw: the record, with LLaVA's `conversations`.
        video: a file, or a folder of frames.
        sampling: which frames.
        name: of the source.
        field: of the record, which names the video.
        stored_fps: how many frames of a folder make a second.
        warn: is told what speaks against a video that can be used.

    Raises:
        RecordError, MediaError: the conversation or the video cannot be used.
    """
    turns = exchanges(raw)
    sampled = _sampled(raw, video, field, sampling, warn, stored_fps=stored_fps)
    row = VideoQA(frames=sampled.frames, turns=turns, fps=sampled.fps, **identity(raw, name))
    return video_qa(row, np.random.default_rng(0))  # every record has its question, so nothing is drawn


def frames_to_predict(
    raw: RawRow,
    rng: np.random.Generator,
    video: Path,
    sampling: VideoSampling,
    variants: Sequence[Variant],
    name: str,
    *,
    field: str = "id",
    warn: Report = raise_or_log,
) -> Example:
    """A clip of a video at one random interval, and one of the tasks on its frames.

    Raises:
        MediaError: the video cannot be read, is damaged, or is too short for two frames.
        RecordError: the clip is too short for all of the variants.
    """
    sampled = _sampled(raw, video, field, sampling, warn, rng, min_frames=2)
    row = PureVideo(frames=sampled.frames, interval=sampled.interval, **identity(raw, name))
    return pure_video(row, rng, variants=variants)


def _sampled(
    raw: RawRow,
    video: Path,
    field: str,
    sampling: VideoSampling,
    warn: Report,
    rng: np.random.Generator | None = None,
    *,
    min_frames: int = 1,
    stored_fps: float = 1.0,
) -> SampledVideo:
    """Frames; what is wrong with the video names the row and the field."""
    try:
        return sample_frames(
            video,
            sampling,
            rng,
            min_frames=min_frames,
            stored_fps=stored_fps,
            warn=lambda fault: warn(in_row(fault, raw.place, field)),
        )
    except MediaError as error:
        raise in_row(from_error(error, "video-broken", str(video)), raw.place, field).error() from error


def prediction_settings(max_frames: int, variants: Sequence[str] | None, damaged_videos: str) -> tuple[VideoSampling, tuple[Variant, ...]]:
    """Settings of a recipe as those of frame prediction.

    Raises:
        ConfigError: an unknown variant, none, fewer than 2 frames, or an unknown word for damaged videos.
    """
    if max_frames < 2:
        raise ConfigError(f"max_frames {max_frames} but at least 2 are needed to show and to ask (pure video). Raise it.")
    chosen: tuple[Variant, ...] = tuple(one for one in VARIANTS if variants is None or one in variants)
    unknown = [] if variants is None else [one for one in variants if one not in VARIANTS]
    if unknown or not chosen:
        found = f"variants {list(variants or ())}"
        raise ConfigError(f"{found} but some of {', '.join(VARIANTS)} are needed (pure video). Correct the list.")
    return VideoSampling(fps=None, interval=PURE_VIDEO.interval, max_frames=max_frames, damaged_videos=damaged_videos), chosen
