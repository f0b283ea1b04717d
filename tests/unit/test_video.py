"""Frames of videos: the right ones, in the right colours, upright, with few decoded, and honest about what is missing."""

import struct
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from metamorph.data.faults import Fault
from metamorph.data.video import PURE_VIDEO, VIDEO_QA, VideoSampling, fault_of, probe, read_frames, sample_frames
from metamorph.errors import ConfigError, MediaError
from metamorph.media import ImageLimits

WIDTH, HEIGHT, BITS = 96, 32, 12
SHORTENED = VideoSampling(damaged_videos="shorten")
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (128, 128, 128), (200, 120, 40), (10, 60, 110)]
CODECS = {".mp4": "libx264", ".mkv": "libx264", ".ts": "libx264", ".avi": "mpeg4", ".webm": "libvpx-vp9", ".ivf": "libvpx-vp9"}


def numbered(number: int) -> np.ndarray:
    """A frame that spells its number in black and white bars, which every codec keeps."""
    bars = np.array([(number >> bit) & 1 for bit in range(BITS)], dtype=np.uint8) * 255
    return np.broadcast_to(np.repeat(bars, WIDTH // BITS)[None, :, None], (HEIGHT, WIDTH, 3)).copy()


def number_of(image: Image.Image) -> int:
    bar = WIDTH // BITS
    return sum((image.getpixel((bar * bit + bar // 2, HEIGHT // 2))[0] > 127) << bit for bit in range(BITS))  # pyright: ignore


def write(
    path: Path,
    frames: Sequence[np.ndarray],
    *,
    fps: int = 10,
    times: Sequence[float] | None = None,
    gop: int = 10,
    codec: str | None = None,
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    matrix: int | None = None,
    full_range: bool = False,
    tagged: bool = True,
) -> Path:
    codec = codec or CODECS[path.suffix]
    x264 = {"x264-params": f"keyint={gop}:min-keyint={gop}:scenecut=0", "crf": "12", "preset": "veryfast"}
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream: Any = container.add_stream(codec, rate=fps, options=options or (x264 if codec == "libx264" else {}))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.codec_context.gop_size = pixels, gop
        if times is not None:
            stream.codec_context.time_base, stream.codec_context.max_b_frames = Fraction(1, 1000), 0
        if matrix is not None and tagged:
            stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full_range else 1
        for number, pixel_values in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixel_values, format="rgb24")
            if matrix is not None:
                frame = frame.reformat(format=pixels, dst_colorspace=matrix, dst_color_range=2 if full_range else 1)
                if not tagged:
                    frame.colorspace = 2
            if times is not None:
                frame.pts, frame.time_base = round(times[number] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def all_frames(path: Path) -> list[tuple[Fraction, int]]:
    """The slow twin: decode everything, from the beginning; times and numbers."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        start = stream.start_time or 0
        return [((frame.pts - start) * stream.time_base, number_of(frame.to_image())) for frame in container.decode(stream)]  # pyright: ignore


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[tuple[Fraction, int]]]]:
    """Twelve seconds at 10 frames per second in each container, with what the slow twin finds in them."""
    folder = tmp_path_factory.mktemp("clips")
    frames = [numbered(number) for number in range(120)]
    paths = {suffix: write(folder / f"clip{suffix}", frames, gop=25) for suffix in CODECS}
    return {suffix: (path, all_frames(path)) for suffix, path in paths.items()}


@pytest.mark.parametrize(
    ("matrix", "full_range", "tagged", "size"),
    [(5, False, True, 64), (1, False, True, 64), (1, True, True, 64), (5, False, False, 64), (1, False, False, 720)],
    ids=["BT.601", "BT.709", "full range", "unnamed SD is BT.601", "unnamed HD is BT.709"],
)
def test_colours_are_those_that_were_encoded(tmp_path: Path, matrix: int, full_range: bool, tagged: bool, size: int):
    frames = [np.full((size, size, 3), colour, np.uint8) for colour in COLOURS]
    path = write(tmp_path / "c.mp4", frames, fps=1, pixels="yuvj444p" if full_range else "yuv444p", matrix=matrix, full_range=full_range,
                 tagged=tagged, options={"crf": "0", "preset": "veryfast"})  # fmt: skip
    for image, colour in zip(read_frames(path, range(len(COLOURS))), COLOURS, strict=True):
        assert image.mode == "RGB"
        assert np.abs(np.asarray(image, dtype=int) - colour).max() <= 3


def test_lossless_rgb_is_exact(tmp_path: Path):
    frames = [np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8) for _ in range(3)]
    path = write(tmp_path / "c.mkv", frames, fps=1, codec="ffv1", pixels="bgr0")
    for image, expected in zip(sample_frames(path).frames, frames, strict=True):
        assert np.array_equal(np.asarray(image), expected)


@pytest.mark.parametrize("suffix", CODECS)
@settings(max_examples=20)
@given(times=st.lists(st.floats(0, 11.99), min_size=1, max_size=6))
def test_frames_are_those_that_decoding_everything_finds(suffix: str, clips: dict, times: list[float]):
    path, everything = clips[suffix]
    slack = Fraction(6, 10_000)  # containers round times to milliseconds
    found = [number_of(image) for image in read_frames(path, times)]
    for time, number in zip(times, found, strict=True):
        either = {[n for begin, n in everything if begin <= max(0, Fraction(time) + add)][-1] for add in (-slack, slack)}
        assert number in either


@pytest.mark.parametrize("suffix", CODECS)
def test_one_frame_per_second_and_what_a_probe_tells(suffix: str, clips: dict):
    path, _ = clips[suffix]
    info = probe(path)
    assert (info.width, info.height, info.rotation, info.frames) == (WIDTH, HEIGHT, 0, 120)
    assert info.seconds == pytest.approx(12, abs=0.15)
    assert info.fps == pytest.approx(10)
    sampled = sample_frames(path)
    assert [number_of(image) for image in sampled.frames] == list(range(0, 120, 10))
    assert sampled.times == tuple(range(12))
    assert (sampled.fps, sampled.broken) == (1, "")


def test_bytes_read_like_their_file(clips: dict):
    path, _ = clips[".mp4"]
    assert sample_frames(path.read_bytes()) == sample_frames(path)


def test_times_may_come_in_any_order_and_twice(clips: dict):
    assert [number_of(image) for image in read_frames(clips[".mp4"][0], [7.0, 0.5, 7.0, 11.9])] == [70, 5, 70, 119]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_frame_rate_goes_by_time(tmp_path: Path, suffix: str):
    begins = [0, 0.1, 0.2, 0.3, 2.5, 2.6, 4.9, 5.2]
    path = write(tmp_path / f"v{suffix}", [numbered(n) for n in range(8)], times=begins)
    assert [number_of(image) for image in sample_frames(path).frames[:6]] == [0, 3, 3, 5, 5, 6]


def test_at_most_max_frames_from_the_beginning_and_only_within_a_span(clips: dict):
    path, _ = clips[".mp4"]
    short = sample_frames(path, VideoSampling(fps=4.0, max_frames=3))
    assert [number_of(image) for image in short.frames] == [0, 2, 5]
    within = sample_frames(path, VIDEO_QA, span=(3.0, 5.5))
    assert ([number_of(image) for image in within.frames], within.times) == ([30, 40, 50], (3.0, 4.0, 5.0))
    with pytest.raises(ConfigError, match="span"):
        sample_frames(path, span=(5, 5))
    with pytest.raises(MediaError, match=r"0 frame\(s\) from 0 s"):
        sample_frames(path, span=(50, 60))


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32))
def test_random_interval_keeps_its_bounds(clips: dict, seed: int):
    path, _ = clips[".mp4"]
    sampled = sample_frames(path, PURE_VIDEO, np.random.default_rng(seed))
    assert 0.2 <= sampled.interval <= 6  # 2 / frame rate, half the length
    assert 2 <= len(sampled.frames) <= 45
    assert len(sampled.frames) == min(45, int(np.ceil(12 / sampled.interval)))
    for image, time in zip(sampled.frames, sampled.times, strict=True):
        assert number_of(image) in (int(time * 10), int(time * 10 + 6e-3))  # a time on the edge may fall on either side


def test_random_interval_depends_on_the_seed_alone_and_needs_one(clips: dict):
    path, _ = clips[".mp4"]
    first, again, other = (sample_frames(path, PURE_VIDEO, np.random.default_rng(seed)).interval for seed in (1, 1, 2))
    assert first == again != other
    with pytest.raises(ConfigError, match="Pass rng"):
        sample_frames(path, PURE_VIDEO)


def test_sampling_must_make_sense():
    for wrong in ({"fps": None}, {"interval": (0.1, 10.0)}, {"fps": 0.0}, {"fps": None, "interval": (2.0, 1.0)}, {"max_frames": 0}):
        with pytest.raises(ConfigError):
            VideoSampling(**wrong)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_decodes_only_from_the_nearest_keyframe(tmp_path: Path, suffix: str):
    """Ten minutes with a keyframe every 50 frames: frames far apart cost less than a group each, a scan would cost thousands."""
    path = write(tmp_path / f"long{suffix}", [numbered(n % 4096) for n in range(3000)], fps=5, gop=50)
    sampled = sample_frames(path, VideoSampling(fps=1 / 97))
    assert [number_of(image) for image in sampled.frames] == [97 * 5 * n for n in range(7)]
    assert sampled.decoded <= 7 * 52
    late = sample_frames(path, VideoSampling(fps=1.0, max_frames=1), span=(590.4, 600))
    assert number_of(late.frames[0]) == 2952
    assert late.decoded <= 6
    dense = sample_frames(path, VideoSampling(fps=1.0, max_frames=45))
    assert dense.decoded <= 45 * 5 + 2  # and a dense sampling decodes no frame twice


def index_first(clip: Path, path: Path) -> bytes:
    """The same video with its index at the beginning, so that a part of it can be opened."""
    with av.open(str(clip)) as source, av.open(str(path), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return path.read_bytes()


def truncated(clip: Path, path: Path) -> Path:
    data = index_first(clip, path)
    path.write_bytes(data[: 4 * len(data) // 7])
    return path


def damaged(clip: Path, path: Path) -> Path:
    """A file with noise in the last third."""
    data = index_first(clip, path)
    kept = 2 * len(data) // 3
    path.write_bytes(data[:kept] + np.random.default_rng(0).bytes(len(data) - kept))
    return path


@pytest.mark.parametrize("spoil", [truncated, damaged])
def test_of_a_broken_tail_the_frames_before_the_break_are_given(tmp_path: Path, clips: dict, spoil: Any):
    path = spoil(clips[".mp4"][0], tmp_path / "broken.mp4")
    told: list[Fault] = []
    sampled = sample_frames(path, SHORTENED, warn=told.append)
    count = len(sampled.frames)
    assert 2 <= count < sampled.asked == 12
    assert [number_of(image) for image in sampled.frames] == list(range(0, 10 * count, 10))
    assert sampled.broken
    fault = fault_of(path, SHORTENED, place="train.jsonl:3")
    assert fault is not None and told == [replace(fault, place=str(path), field="", found=fault.found.removesuffix(f" ({path})"))]
    assert (fault.code, fault.severity, fault.place, fault.field) == ("video-broken", "warning", "train.jsonl:3", "video")
    assert f"only {count} frames of 12 ({sampled.broken}) ({path}) but a whole video is expected. Fetch it again." in str(fault)
    with pytest.raises(MediaError, match=rf"{count} frame\(s\) from 12 s .* but at least 12 are needed \(.*broken.mp4\). Fetch") as refused:
        sample_frames(path, SHORTENED, min_frames=12)
    assert refused.value.fault is not None
    assert refused.value.fault[0] == "video-broken"
    assert getattr(fault_of(path, SHORTENED, min_frames=12), "severity", "") == "error"
    with pytest.raises(MediaError, match="no frame at 11 s"):
        read_frames(path, [1, 11])


@pytest.mark.parametrize("spoil", [truncated, damaged])
def test_a_broken_tail_is_refused_unless_it_was_asked_for(tmp_path: Path, clips: dict, spoil: Any):
    path = spoil(clips[".mp4"][0], tmp_path / "broken.mp4")
    with pytest.raises(
        MediaError, match=r"only \d+ frames of 12 \(damaged .*broken.mp4\)\. Fetch it again, or set damaged_videos: shorten"
    ) as error:
        sample_frames(path)
    assert error.value.fault is not None and error.value.fault[0] == "video-broken"
    assert getattr(fault_of(path), "severity", "") == "error"
    assert len(sample_frames(path, VideoSampling(max_frames=3)).frames) == 3  # what is asked for lies before the break
    with pytest.raises(ConfigError, match="damaged_videos 'cut' but 'refuse' or 'shorten' is expected"):
        VideoSampling(damaged_videos="cut")


def test_a_video_that_ends_before_its_file_says_is_damaged_only_if_much_is_missing(tmp_path: Path, clips: dict):
    """Flash states one length for sound and pictures, and what is left of a truncated file ends without an error."""
    frames = [numbered(number) for number in range(120)]
    path = write(tmp_path / "clip.flv", frames, codec="flv1", options={}, gop=5)
    data = bytearray(path.read_bytes())
    stated = data.index(b"duration") + len("duration") + 1
    for seconds, whole in ((12.6, True), (15.0, False)):
        data[stated : stated + 8] = struct.pack(">d", seconds)
        path.write_bytes(data)
        assert probe(path).seconds == pytest.approx(seconds)
        sampled = sample_frames(path, SHORTENED)
        assert (len(sampled.frames), sampled.asked, bool(sampled.broken)) == (12, 12 if whole else 15, not whole)
        fault = fault_of(path)
        assert (fault is None) == whole
    assert fault is not None and "the last frame ends before 12 s" in fault.found
    data[stated : stated + 8] = struct.pack(">d", 12.6)
    path.write_bytes(data)
    assert getattr(fault_of(path, min_frames=13), "code", "") == "video-short"


def test_one_frame_of_a_video_is_told_unless_it_was_asked_for(tmp_path: Path):
    told: list[Fault] = []
    path = write(tmp_path / "tiny.mp4", [numbered(n) for n in range(3)])
    assert len(sample_frames(path, warn=told.append).frames) == 1
    assert [(fault.code, fault.severity, fault.place) for fault in told] == [("video-short", "warning", str(path))]
    sample_frames(path, VideoSampling(max_frames=1), warn=told.append)
    sample_frames(path, VideoSampling(fps=10), warn=told.append)
    assert len(told) == 1


def test_a_video_shorter_than_the_sampling_asks_is_an_error(tmp_path: Path, clips: dict):
    with pytest.raises(
        MediaError, match=r"12 frame\(s\) from 12 s at one frame every 1 s but at least 13 are needed .* Sample more densely"
    ):
        sample_frames(clips[".mp4"][0], min_frames=13)
    fault = fault_of(clips[".mp4"][0], min_frames=13, field="videos[0]")
    assert fault is not None
    assert (fault.code, fault.field, fault.media) == ("video-short", "videos[0]", True)
    tiny = write(tmp_path / "tiny.mp4", [numbered(n) for n in range(3)])
    assert getattr(fault_of(tiny, PURE_VIDEO), "code", "") == "video-short"
    assert len(sample_frames(tiny).frames) == 1
    assert fault_of(tiny) is None


def portrait(clip: Path, path: Path) -> Path:
    """As telephones write it: the matrix of the track header says that right becomes down."""
    data = bytearray(clip.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    assert data[matrix : matrix + 4] == b"\x00\x01\x00\x00"
    numbers = (0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000)
    data[matrix : matrix + 36] = b"".join(number.to_bytes(4, "big", signed=True) for number in numbers)
    path.write_bytes(data)
    return path


def test_rotation_flag_is_applied(tmp_path: Path):
    stored = np.zeros((48, 64, 3), np.uint8)
    stored[:24, :32], stored[:24, 32:], stored[24:, :32], stored[24:, 32:] = COLOURS[:4]
    path = portrait(write(tmp_path / "stored.mp4", [stored] * 3, fps=1), tmp_path / "upright.mp4")
    info = probe(path)
    assert (info.width, info.height, info.rotation) == (48, 64, 270)
    image = sample_frames(path).frames[0]
    expected = np.rot90(stored, -1)  # clockwise
    assert image.size == (48, 64)
    for x, y in ((8, 8), (40, 8), (8, 56), (40, 56)):
        assert np.abs(np.asarray(image, dtype=int)[y, x] - expected[y, x]).max() < 12


def test_frames_beyond_the_limit_are_refused_whatever_the_header_says(tmp_path: Path):
    path = write(tmp_path / "bomb.ivf", [numbered(n) for n in range(3)])
    limits = ImageLimits(max_pixels=1000)
    with pytest.raises(MediaError, match="frames of 96 x 32 = 3072 pixels but at most 1000 are allowed"):
        sample_frames(path, limits=limits)
    data = bytearray(path.read_bytes())
    data[12:16] = (16).to_bytes(2, "little") * 2
    path.write_bytes(data)
    with pytest.raises(MediaError):
        sample_frames(path, limits=limits)
    assert getattr(fault_of(path, limits=limits), "code", "") in ("video-too-large", "video-broken")


def test_what_holds_no_video_is_told_apart(tmp_path: Path, clips: dict):
    sound = tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as container:
        stream: Any = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(MediaError, match=r"a file with audio streams and 0 video streams but a video is needed \(.*sound.mp4\)"):
        probe(sound)
    listed = tmp_path / "list.m3u8"
    listed.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:12\n#EXTINF:12,\n{clips['.ts'][0]}\n#EXT-X-ENDLIST\n")
    words = tmp_path / "words.mp4"
    words.write_text("<html>not found</html>")
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(clips[".mp4"][0].read_bytes()[:3000])
    empty = tmp_path / "frames"
    empty.mkdir()
    missing = tmp_path / "concat:nothing.mp4"
    expected = {sound: "video-empty", empty: "video-empty", missing: "video-missing"} | dict.fromkeys((listed, words, cut), "video-broken")
    for path, code in expected.items():
        fault = fault_of(path, place="a:1")
        assert fault is not None
        assert (path.name, fault.code, fault.severity) == (path.name, code, "error")
        assert str(path) in fault.found


def test_no_frame_decodes(tmp_path: Path, clips: dict):
    data = bytearray(clips[".avi"][0].read_bytes())
    start = data.index(b"movi") + 4
    data[start:] = bytes(len(data) - start)
    path = tmp_path / "zeros.avi"
    path.write_bytes(data)
    fault = fault_of(path)
    assert fault is not None
    assert fault.code in ("video-empty", "video-broken")
    with pytest.raises(MediaError, match="at least 1 is needed"):
        probe(path)


def test_a_container_without_seeking_is_read_on(tmp_path: Path):
    images = [Image.fromarray(numbered(n)) for n in range(60)]
    path = tmp_path / "clip.gif"
    images[0].save(path, save_all=True, append_images=images[1:], duration=500)
    sampled = sample_frames(path, VideoSampling(fps=0.1))
    assert [number_of(image) for image in sampled.frames] == [0, 20, 40]


def test_a_folder_of_frames_is_a_video(tmp_path: Path):
    for number in range(12):
        Image.fromarray(numbered(number)).save(tmp_path / f"frame_{number}.png")
    (tmp_path / "captions.txt").write_text("no frame")
    (tmp_path / "._frame_1.png").write_text("nor this")
    assert [number_of(image) for image in sample_frames(tmp_path).frames] == list(range(12))
    sampled = sample_frames(tmp_path, stored_fps=3.0)
    assert [number_of(image) for image in sampled.frames] == [0, 3, 6, 9]
    assert sampled.decoded == 4
    assert probe(tmp_path, stored_fps=3.0).seconds == 4
    assert [number_of(image) for image in read_frames(tmp_path, [11, 0])] == [11, 0]
    (tmp_path / "frame_6.png").write_bytes(b"\x89PNG")
    with pytest.raises(MediaError, match=r"only 2 frames of 4 \(.*frame_6\.png"):
        sample_frames(tmp_path, stored_fps=3.0)
    tail = sample_frames(tmp_path, SHORTENED, stored_fps=3.0)
    assert len(tail.frames) == 2
    assert "frame_6.png" in tail.broken
