"""Frames of videos that nobody vouches for: by time, not by number; upright RGB; decoding no more than what is asked for.

A frame "at" a time is the one on display then: the last that begins at or before it, whatever the frame rate does. Times are seconds from
the beginning of the video. A folder of frame images (as some data sets publish them) reads like a video of a stated rate.
`decoding.py` does the work, with PyAV; nothing is fetched from a network, and files that only refer to other files (playlists) are refused.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from metamorph.data.decoding import (
    VIDEO_LIMITS,
    FrameFolder,
    Refused,
    VideoFile,
    VideoInfo,
    VideoSource,
    describe_video,
    open_video,
    refuse,
)
from metamorph.data.faults import Fault, Report, raise_errors
from metamorph.errors import ConfigError
from metamorph.media import ImageLimits

_OVERSTATED_SECONDS = 1.0  # some containers state the length of their sound, which goes on after the last frame of a whole video
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VideoSampling:
    """Which frames of a video to take; the defaults are the paper's for questions about videos (PURE_VIDEO: for frame prediction).

    Args:
        fps: frames per second of the video's time. None: see `interval`.
        max_frames: the first so many are taken.
        interval: instead of `fps`, one random number of seconds between frames for the whole clip, uniform between
            max(2 / frame rate, interval[0]) and min(interval[1], half the length).
        damaged_videos: `refuse` a video that breaks off, or `shorten` it to what is before the break.

    Raises:
        ConfigError: neither or both of `fps` and `interval` are given, a number is out of range, or `damaged_videos` is neither.
    """

    fps: float | None = 1.0
    max_frames: int = 45
    interval: tuple[float, float] | None = None
    damaged_videos: str = "refuse"

    def __post_init__(self) -> None:
        if (self.fps is None) == (self.interval is None):
            raise ConfigError(f"fps {self.fps} and interval {self.interval} but exactly one is needed (video sampling). Set one to None.")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ConfigError(f"fps {self.fps} but a finite number above 0 is needed (video sampling). Correct it.")
        if self.interval is not None and not 0 < self.interval[0] <= self.interval[1] < math.inf:
            raise ConfigError(f"interval {self.interval} but 0 < low <= high is needed (video sampling). Correct it.")
        if self.max_frames < 1:
            raise ConfigError(f"max_frames {self.max_frames} but at least 1 is needed (video sampling). Raise it.")
        if self.damaged_videos not in ("refuse", "shorten"):
            raise ConfigError(f"damaged_videos {self.damaged_videos!r} but 'refuse' or 'shorten' is expected (video sampling). Correct it.")


VIDEO_QA = VideoSampling()
PURE_VIDEO = VideoSampling(fps=None, interval=(0.1, 10.0))


@dataclass(frozen=True)
class SampledVideo:
    """Frames with the times for which they stand, `interval` seconds apart."""

    frames: tuple[Image.Image, ...]
    times: tuple[float, ...]
    interval: float
    asked: int  # frames that the sampling asks of the whole video
    broken: str = ""  # why there are fewer, where a damaged video was shortened; "" if there are not
    decoded: int = 0  # frames that had to be decoded for it

    @property
    def fps(self) -> float:
        """Frames per second."""
        return 1 / self.interval


@contextmanager
def _as_media_error() -> Iterator[None]:
    try:
        yield
    except Refused as refusal:
        raise refusal.fault.error() from refusal


def probe(source: VideoSource, *, stored_fps: float = 1.0, limits: ImageLimits = VIDEO_LIMITS) -> VideoInfo:
    """Length, rate and size of a video; one frame is decoded, which alone tells how it is rotated.

    Raises:
        MediaError: no video, no frames, or frames that are too large.
    """
    with _as_media_error(), open_video(source, stored_fps, limits) as video:
        return video.info()


def read_frames(
    source: VideoSource, times: Sequence[float], *, stored_fps: float = 1.0, limits: ImageLimits = VIDEO_LIMITS
) -> list[Image.Image]:
    """The frames on display at some times (seconds, in any order), upright, in RGB.

    Raises:
        MediaError: no video, or no frame at one of the times: the video ends or breaks off before.
    """
    with _as_media_error(), open_video(source, stored_fps, limits) as video:
        found: dict[float, Image.Image] = {}
        for time in sorted(set(times)):
            image = video.frame_at(time) if 0 <= time <= video.seconds else None
            if image is None:
                reason = video.broken or "the video ends before"
                raise refuse("video-broken" if video.broken else "video-short", video.place, f"no frame at {time:g} s ({reason})",
                              "a frame is asked for then", "Ask for times within the video, or fetch it again.")  # fmt: skip
            found[time] = image
        return [found[time] for time in times]


def sample_frames(
    source: VideoSource,
    sampling: VideoSampling = VIDEO_QA,
    rng: np.random.Generator | None = None,
    *,
    min_frames: int = 1,
    span: tuple[float, float] | None = None,
    stored_fps: float = 1.0,
    limits: ImageLimits = VIDEO_LIMITS,
    warn: Report | None = None,
) -> SampledVideo:
    """Frames from the beginning on, evenly spaced; of a damaged video, if it is to be shortened, those before the break.

    Args:
        source: a video, or a folder of frame images, which are read in natural order of their names.
        sampling: how densely, and how many.
        rng: draws the interval, where that is random.
        min_frames: fewer are an error.
        span: seconds from and to which to sample; None = the whole video.
        stored_fps: how many images of a folder make a second.
        limits: pixels that a frame may have.
        warn: is told that a video was shortened, or that all it gives is one frame.

    Raises:
        MediaError: no video, one that breaks off, or fewer than `min_frames` frames.
        ConfigError: a random interval without `rng`, or a span that is none.
    """
    with _as_media_error(), open_video(source, stored_fps, limits) as video:
        sampled = _sample(video, sampling, rng, min_frames, span)
        fault = _damage(video, sampled, sampling) or _single_frame(video, sampled, sampling)
    if fault is not None and warn is not None:
        warn(fault)
    return sampled


def fault_of(
    source: VideoSource,
    sampling: VideoSampling = VIDEO_QA,
    min_frames: int = 1,
    *,
    place: str = "",
    field: str = "video",
    span: tuple[float, float] | None = None,
    stored_fps: float = 1.0,
    limits: ImageLimits = VIDEO_LIMITS,
) -> Fault | None:
    """What `sample_frames` would refuse, as a fault of a row; that it would shorten the video is a warning.

    Codes: video-missing, video-empty, video-broken, video-short, video-too-large.

    Raises:
        ConfigError: as `sample_frames`.
    """
    place = place or describe_video(source)
    try:
        with open_video(source, stored_fps, limits) as video:
            sampled = _sample(video, sampling, np.random.default_rng(0), min_frames, span)
            fault = _damage(video, sampled, sampling)
    except Refused as refusal:
        fault = refusal.fault
    return None if fault is None else in_row(fault, place, field)


def in_row(fault: Fault, place: str, field: str) -> Fault:
    """A fault of a video as one of the row that names it."""
    return replace(fault, place=place, field=field, found=fault.found if place == fault.place else f"{fault.found} ({fault.place})")


def raise_or_log(fault: Fault) -> None:
    """The `report` of training for faults `in_row`: errors are raised, and of a video that was shortened a warning is logged.

    Raises:
        DataError: the fault is an error.
    """
    raise_errors(fault)
    if fault.code == "video-broken":
        _log.warning("a damaged video is shortened: %s", fault)


def _damage(video: VideoFile | FrameFolder, sampled: SampledVideo, sampling: VideoSampling) -> Fault | None:
    """The warning that a video was shortened; raised as an error where it may not be."""
    if not sampled.broken:
        return None
    found, expected = f"only {len(sampled.frames)} frames of {sampled.asked} ({sampled.broken})", "a whole video is expected"
    if sampling.damaged_videos == "refuse":
        raise refuse("video-broken", video.place, found, expected, "Fetch it again, or set damaged_videos: shorten.")
    return Fault("video-broken", video.place, "", found, expected, "Fetch it again.", "warning", media=True)


def _single_frame(video: VideoFile | FrameFolder, sampled: SampledVideo, sampling: VideoSampling) -> Fault | None:
    """The warning that a video shows no more than an image would, though it was not asked for one frame."""
    if sampled.asked > 1 or sampling.max_frames == 1:
        return None
    found, remedy = f"a video of at most {sampled.interval:g} s", "Sample more densely (fps), or leave the row out."
    expected = f"more than one frame is expected at one every {sampled.interval:g} s"
    return Fault("video-short", video.place, "", found, expected, remedy, "warning", media=True)


def _sample(
    video: VideoFile | FrameFolder,
    sampling: VideoSampling,
    rng: np.random.Generator | None,
    min_frames: int,
    span: tuple[float, float] | None,
) -> SampledVideo:
    start, end = (0.0, video.seconds) if span is None else (span[0], min(span[1], video.seconds))
    if span is not None and not 0 <= span[0] < span[1]:
        raise ConfigError(f"span {span} but 0 <= from < to is needed (video sampling). Correct it.")
    interval = 1 / sampling.fps if sampling.fps is not None else _random_interval(video.place, video.fps, end - start, sampling, rng)
    asked = min(sampling.max_frames, max(0, math.ceil(round((end - start) / interval, 6))))  # the end itself shows nothing
    stated = f"{max(end - start, 0):g} s at one frame every {interval:.4g} s"
    _refuse_short(video.place, asked, min_frames, stated)
    frames: list[Image.Image] = []
    times = [start + number * interval for number in range(asked)]
    for time in times:
        if (image := video.frame_at(time)) is None:
            break
        frames.append(image)
    if frames and not video.broken and video.seconds - video.end <= _OVERSTATED_SECONDS:
        asked = len(frames)
        _refuse_short(video.place, asked, min_frames, stated)
    broken = "" if len(frames) == asked else video.broken or f"the last frame ends before {times[len(frames)]:.4g} s"
    if len(frames) < min_frames:
        code = "video-broken" if video.decoded or video.broken else "video-empty"
        raise refuse(code, video.place, f"{len(frames)} frame(s) from {stated} ({broken})", f"at least {min_frames} are needed",
                      "Fetch the file again, or leave the row out.")  # fmt: skip
    return SampledVideo(tuple(frames), tuple(times[: len(frames)]), interval, asked, broken, video.decoded)


def _refuse_short(place: str, asked: int, min_frames: int, stated: str) -> None:
    if asked < min_frames:
        found, expected = f"{asked} frame(s) from {stated}", f"at least {min_frames} are needed"
        raise refuse("video-short", place, found, expected, "Sample more densely, or leave the row out.")


def _random_interval(place: str, fps: float, seconds: float, sampling: VideoSampling, rng: np.random.Generator | None) -> float:
    if sampling.interval is None or rng is None:
        raise ConfigError(f"a random interval but no generator ({place}). Pass rng to sample_frames.")
    low, high = max(2 / fps, sampling.interval[0]), min(sampling.interval[1], seconds / 2)
    if low > high:
        raise refuse("video-short", place, f"{seconds:.4g} s at {fps:.4g} frames per second", f"at least {2 * low:.4g} s are needed for "
                      "two frames at the shortest interval", "Allow a shorter interval, or leave the row out.")  # fmt: skip
    return float(rng.uniform(low, high))
