"""Video files, and folders of frames, read forward in time: what `video.py` stands on, and the only owner of PyAV.

A tick is the unit in which a stream counts time. Only what lies between a keyframe and the frame asked for is decoded.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from PIL import Image

from metamorph.data.faults import Fault
from metamorph.errors import ConfigError, MediaError
from metamorph.media import ImageLimits, open_image

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

VideoSource: TypeAlias = Path | bytes
"""A file or a folder of images, or the bytes of a file."""

FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "mpeg", "mpegts", "ogg", "flv", "asf", "gif", "ivf")
"""Containers that may be opened, by FFmpeg's names: those that hold their own frames and refer to no other file."""

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
"""What counts as a frame in a folder."""

VIDEO_LIMITS = ImageLimits(max_pixels=2**25)
"""Of each frame; 8K (7680 x 4320) fits."""

_HD_HEIGHT = 720
_UNSPECIFIED = 2  # colour space, as FFmpeg numbers it
_BLIND_SEEK_SECONDS = 2.0
_ROUNDING_SECONDS = 0.0005
_UPRIGHT = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


@dataclass(frozen=True)
class VideoInfo:
    """What a video says of itself. Sizes are those of the upright picture; `frames` is an estimate."""

    seconds: float
    fps: float
    frames: int
    width: int
    height: int
    rotation: int  # degrees anticlockwise that make the stored picture upright: 0, 90, 180 or 270


class Refused(Exception):
    """Carries a fault to `video.py`, which raises or returns it; never seen outside."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


@contextmanager
def open_video(source: VideoSource, stored_fps: float, limits: ImageLimits) -> Iterator[VideoFile | FrameFolder]:
    """The video, ready to be read in the order of time."""
    place = describe_video(source)
    if isinstance(source, Path) and source.is_dir():
        yield FrameFolder(source, stored_fps, limits)
        return
    if isinstance(source, Path) and not source.is_file():
        raise refuse("video-missing", place, "no such file", "a video is needed", "Check the path and the root.")
    try:
        import av
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("av is missing but videos need it. Install it: pip install 'av>=17'") from error
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else f"file:{source}"
        container = av.open(file, mode="r", options={"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"})
    except PermissionError as error:
        raise refuse("video-missing", place, "a file that may not be read", "a video is needed", "Change its permissions.") from error
    except (av.FFmpegError, OSError, ValueError) as error:
        found = f"data that is no readable video ({getattr(error, 'strerror', None) or error})"
        raise refuse("video-broken", place, found, "a video is needed", "Fetch or convert the file.") from error
    with container:
        yield VideoFile(container, limits, place)


class VideoFile:
    """One video file, read forward in time. `decoded` counts the frames that came out of the codec."""

    def __init__(self, container: InputContainer, limits: ImageLimits, place: str) -> None:
        self.place, self.broken, self.decoded = place, "", 0
        self.end = 0.0  # seconds at which the last frame ends, once a later one was asked for
        self._container, self._limits = container, limits
        if not container.streams.video:
            kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "no"
            raise refuse(
                "video-empty", place, f"a file with {kinds} streams and 0 video streams", "a video is needed", "Fetch or convert it."
            )
        self._stream: VideoStream = container.streams.video[0]
        context = self._stream.codec_context
        self._check_size(context.width, context.height)
        context.thread_count = 1  # threads read ahead; loaders have processes
        context.options = {"max_pixels": str(limits.max_pixels)}
        self._start = self._stream.start_time or 0
        self._tick = float(self._stream.time_base or 1 / 1000)
        rate = self._stream.average_rate or self._stream.guessed_rate or self._stream.base_rate
        self.fps = float(rate) if rate else 25.0
        self.seconds = max(self._length(), 1 / self.fps)
        self._shown: VideoFrame | None = None  # on display at the time asked for last
        self._next: VideoFrame | None = None  # read, but not on display yet
        self._blind = True  # whether to try seeking where no index says what is to be found
        self._frames = self._decode()
        if "matroska" in container.format.name:
            self._seek(self._start)  # reads the index, which stands at the end of the file

    def info(self) -> VideoInfo:
        """What the file says of itself, and its first frame of its rotation.

        Raises:
            Refused: no frame decodes.
        """
        self.frame_at(0)
        first = self._shown or self._next
        if first is None:
            code = "video-broken" if self.broken else "video-empty"
            raise refuse(code, self.place, f"0 frames that decode{self.broken and f' ({self.broken})'}", "at least 1 is needed",
                          "Fetch the file again, or leave the row out.")  # fmt: skip
        width, height = (first.height, first.width) if first.rotation % 180 else (first.width, first.height)
        frames = self._stream.frames or round(self.seconds * self.fps)
        return VideoInfo(self.seconds, self.fps, frames, width, height, first.rotation % 360)

    def frame_at(self, time: float) -> Image.Image | None:
        """The frame on display at a time, None if there is none. Times must not go back."""
        slack = min(0.5, _ROUNDING_SECONDS / self._tick)  # containers round the times of frames, many to milliseconds
        tick = self._start + math.floor(time / self._tick + slack)
        if self._is_worth_seeking(tick):
            self._seek(tick)
        while self._shown is None or _pts(self._shown) != tick:  # at the very tick, nothing later can be on display
            self._next = self._next or self._read()
            if self._next is None or _pts(self._next) > tick:
                break
            self._shown, self._next = self._next, None
        if self._shown is None:  # the first frame stands for what is before it
            return None if self._next is None else self._upright(self._next)
        ends = _pts(self._shown) + max(self._shown.duration or 0, 1 / (self.fps * self._tick))
        if self._next is None and tick >= ends:
            self.end = (ends - self._start) * self._tick
            return None
        return self._upright(self._shown)

    def _length(self) -> float:
        """Seconds, from the stream, else its notes, else the file, else the last packet (which reads the file, but decodes nothing)."""
        if self._stream.duration:
            return self._stream.duration * self._tick
        noted = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", self._stream.metadata.get("DURATION", ""))
        if noted:
            return int(noted[1]) * 3600 + int(noted[2]) * 60 + float(noted[3])
        if self._container.duration:
            return self._container.duration / 1e6
        ends = [packet.pts + (packet.duration or 0) for packet in self._container.demux(self._stream) if packet.pts is not None]
        self._container.seek(self._start, stream=self._stream)
        return (max(ends) - self._start) * self._tick if ends else 0.0

    def _is_worth_seeking(self, tick: int) -> bool:
        """Whether a keyframe lies between what is on display and the tick, as the index says, or the distance lets us hope."""
        if (here := self._shown or self._next) is None:
            return self.decoded == 0 and tick > self._start
        entries = self._stream.index_entries
        if len(entries):
            delay = self._start - entries[0].timestamp  # some indices are in the order of decoding, which comes before that of display
            found = entries.search_timestamp(tick - delay)
            if found >= 0 and entries[found].timestamp + delay > _pts(here):
                return True
            if entries[len(entries) - 1].timestamp + delay >= tick:
                return False  # the index reaches beyond the tick: there is no keyframe to be found
        return self._blind and (tick - _pts(here)) * self._tick > _BLIND_SEEK_SECONDS

    def _seek(self, tick: int) -> None:
        """Go to a keyframe at or before the tick: where none is found, or a later one, further and further back."""
        import av

        before, second = self._shown, max(1, round(1 / self._tick))
        first = self._start - second  # some containers find their beginning only from before it
        aim, step = max(first, tick), second
        while True:
            try:
                self._container.seek(aim, stream=self._stream)
            except av.FFmpegError:  # a container without a way to seek: read on from where we are
                self._blind = False
                return
            self._frames = self._decode()
            self._shown, self._next = None, self._read()
            if aim <= first or (self._next is not None and _pts(self._next) <= tick):
                break
            aim, step = max(first, aim - step), 2 * step
        if before is not None and self._next is not None and _pts(self._next) <= _pts(before):
            self._blind = False

    def _read(self) -> VideoFrame | None:
        return next(self._frames, None)

    def _decode(self) -> Iterator[VideoFrame]:
        """Frames in the order of display, from where the file stands, up to its end or to the first damage."""
        import av

        last, self.broken = self._start if self._shown is None else _pts(self._shown), ""
        try:
            for packet in self._container.demux(self._stream):
                if packet.is_corrupt:
                    self.broken = f"damaged data near {((packet.pts or last) - self._start) * self._tick:.4g} s"
                for frame in self._stream.codec_context.decode(None) if packet.is_corrupt else packet.decode():
                    if frame.is_corrupt:
                        self.broken = f"a damaged frame near {(last - self._start) * self._tick:.4g} s"
                        return
                    self._check_size(frame.width, frame.height)
                    self.decoded += 1
                    if frame.pts is None:  # as AVI leaves it
                        frame.pts = frame.dts if frame.dts is not None else last + round(1 / (self.fps * self._tick))
                    last = _pts(frame)
                    yield frame
                if self.broken:
                    return
        except av.FFmpegError as error:
            self.broken = f"damaged data after {(last - self._start) * self._tick:.4g} s: {error.strerror}"

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self._limits.max_pixels:
            raise refuse("video-too-large", self.place, f"frames of {width} x {height} = {width * height} pixels",
                          f"at most {self._limits.max_pixels} are allowed", "Shrink the video or raise max_pixels.")  # fmt: skip

    def _upright(self, frame: VideoFrame) -> Image.Image:
        """RGB by the colour matrix that the frame names; where it names none, by its height, as players do (HD: BT.709, else BT.601)."""
        unnamed = int(frame.colorspace) == _UNSPECIFIED and not frame.format.is_rgb
        image = frame.to_image(src_colorspace="ITU709") if unnamed and frame.height >= _HD_HEIGHT else frame.to_image()
        return image.transpose(_UPRIGHT[frame.rotation % 360]) if frame.rotation % 360 in _UPRIGHT else image


class FrameFolder:
    """Images in a folder as a video of a stated rate; opened only when asked for."""

    def __init__(self, folder: Path, fps: float, limits: ImageLimits) -> None:
        self.place, self.broken, self.decoded, self.end, self.fps = str(folder), "", 0, 0.0, fps
        if not 0 < fps < math.inf:
            raise ConfigError(f"stored_fps {fps} but a finite number above 0 is needed ({folder}). Correct it.")
        self._limits = limits
        found = (path for path in folder.iterdir() if path.suffix.lower() in FRAME_SUFFIXES and not path.name.startswith("."))
        self._paths = sorted(found, key=lambda path: [(word, int(digits or 0)) for word, digits in re.findall(r"(\D*)(\d*)", path.name)])
        if not self._paths:
            raise refuse("video-empty", self.place, "a folder with 0 images", f"frames ({', '.join(FRAME_SUFFIXES)}) are needed",
                          "Unpack the frames, or leave the row out.")  # fmt: skip
        self.seconds = len(self._paths) / fps

    def info(self) -> VideoInfo:
        """Size of the first image, length and rate by their number.

        Raises:
            Refused: the first image is broken.
        """
        image = self.frame_at(0)
        if image is None:
            raise refuse("video-broken", self.place, self.broken, "a frame is needed", "Fetch it again.")
        return VideoInfo(self.seconds, self.fps, len(self._paths), image.width, image.height, 0)

    def frame_at(self, time: float) -> Image.Image | None:
        """The image on display at a time, None if there is none or it is broken."""
        number = math.floor(time * self.fps + 1e-6)
        if number >= len(self._paths):
            return None
        try:
            image = open_image(self._paths[number], limits=self._limits)
        except MediaError as error:
            self.broken = str(error)
            return None
        self.decoded += 1
        return image


def _pts(frame: VideoFrame) -> int:
    """When it is due, in ticks; `_decode` sees to it that all frames know."""
    return frame.pts or 0


def describe_video(source: VideoSource) -> str:
    """How an error names a video: its path, or what it was given as."""
    return str(source) if isinstance(source, Path) else f"{len(source)} bytes of video"


def refuse(code: str, place: str, found: str, expected: str, remedy: str) -> Refused:
    """A fault of the video itself, to be raised."""
    return Refused(Fault(code, place, "", found, expected, remedy, media=True))
