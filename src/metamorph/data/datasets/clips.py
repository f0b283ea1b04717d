"""From video files to examples: questions about their frames, and frames to be predicted. Shared by the readers of video data sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from metamorph.data.datasets.published import exchanges, identity
from metamorph.data.frames import VARIANTS, Variant
from metamorph.data.kinds import PureVideo, VideoQA, pure_video, video_qa
from metamorph.data.rows import RawRow
from metamorph.data.video import PURE_VIDEO, VideoSampling, sample_frames
from metamorph.errors import ConfigError
from metamorph.messages import Example

MAX_FRAMES = PURE_VIDEO.max_frames
"""Of the authors' code, for both kinds."""


def questions_about(raw: RawRow, video: Path, sampling: VideoSampling, name: str, *, stored_fps: float = 1.0) -> Example:
    """A record's questions about a video; its frames stand before the first, wherever the record puts its tag.

    Args:
        raw: the record, with LLaVA's `conversations`.
        video: a file, or a folder of frames.
        sampling: which frames.
        name: of the source.
        stored_fps: how many frames of a folder make a second.

    Raises:
        RecordError, MediaError: the conversation or the video cannot be used.
    """
    turns = exchanges(raw)
    sampled = sample_frames(video, sampling, stored_fps=stored_fps)
    row = VideoQA(frames=sampled.frames, turns=turns, fps=sampled.fps, **identity(raw, name))
    return video_qa(row, np.random.default_rng(0))  # every record has its question, so nothing is drawn


def frames_to_predict(
    raw: RawRow, rng: np.random.Generator, video: Path, sampling: VideoSampling, variants: Sequence[Variant], name: str
) -> Example:
    """A clip of a video at one random interval, and one of the tasks on its frames.

    Raises:
        MediaError: the video cannot be read, or is too short for two frames.
        RecordError: the clip is too short for all of the variants.
    """
    sampled = sample_frames(video, sampling, rng, min_frames=2)
    row = PureVideo(frames=sampled.frames, interval=sampled.interval, **identity(raw, name))
    return pure_video(row, rng, variants=variants)


def prediction_settings(max_frames: int, variants: Sequence[str] | None) -> tuple[VideoSampling, tuple[Variant, ...]]:
    """Settings of a recipe as those of frame prediction.

    Raises:
        ConfigError: an unknown variant, none, or fewer than 2 frames.
    """
    if max_frames < 2:
        raise ConfigError(f"max_frames {max_frames} but at least 2 are needed to show and to ask (pure video). Raise it.")
    chosen: tuple[Variant, ...] = tuple(one for one in VARIANTS if variants is None or one in variants)
    unknown = [] if variants is None else [one for one in variants if one not in VARIANTS]
    if unknown or not chosen:
        found = f"variants {list(variants or ())}"
        raise ConfigError(f"{found} but some of {', '.join(VARIANTS)} are needed (pure video). Correct the list.")
    return VideoSampling(fps=None, interval=PURE_VIDEO.interval, max_frames=max_frames), chosen
