"""Where drawn pictures come from: written into their files, read back, and nothing else of the picture changed."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from metamorph.errors import MediaError
from metamorph.messages import Message
from metamorph.provenance import CHUNK, DIGITAL_SOURCE_TYPE, HOLDERS, Drawing, Part, Provenance, read, transcript

ORIGIN = Provenance(
    model=Part("runs-of-mine/model", "ab" * 32, "weights"),
    decoder=Part("decoder", "cd" * 32),
    seed=7,
    image=1,
    steps=10,
    guidance_scale=1.5,
    decoding={"temperature": 0.7, "top_k": None},
    prompt_sha256="ef" * 32,
    prompt='user: a "red" <star> & ünïcödé 星',
    libraries={"torch": "2.13.0"},
)


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))


@pytest.mark.parametrize(("suffix", "lossless"), [("png", {}), ("jpg", None), ("webp", {"lossless": True})])
def test_a_saved_drawing_says_where_it_comes_from_and_its_pixels_are_the_same(picture, tmp_path, suffix, lossless):
    file, bare = tmp_path / f"star.{suffix}", tmp_path / f"bare.{suffix}"
    Drawing.of(picture, ORIGIN).save(file, **(lossless or {}))
    picture.save(bare, **(lossless or {}))
    assert read(file) == ORIGIN
    with Image.open(file) as saved, Image.open(bare) as plain:
        assert saved.tobytes() == plain.tobytes()  # a JPEG too is compressed as it would have been without
        if lossless is not None:
            assert saved.tobytes() == picture.tobytes()
    assert DIGITAL_SOURCE_TYPE.encode() in file.read_bytes()
    assert str(tmp_path).encode() not in file.read_bytes()


def test_the_same_drawing_makes_the_same_file(picture, tmp_path):
    for name in ("a", "b"):
        Drawing.of(picture, ORIGIN).save(tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def chunks(data: bytes) -> dict[str, str]:
    """The iTXt chunks of a PNG, read as its specification says and not by PIL: keyword, flags, language, translation, text."""
    found, place = {}, 8
    while place < len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        body = data[place + 8 : place + 8 + length]
        if kind == b"iTXt":
            keyword, rest = body.split(b"\0", 1)
            assert rest[:2] == b"\0\0"  # not compressed: any tool can search it
            found[keyword.decode("latin-1")] = rest[2:].split(b"\0", 2)[2].decode()
        place += 12 + length
    return found


def test_a_png_holds_plain_text_chunks_and_an_xmp_packet_that_parses(picture, tmp_path):
    from xml.etree import ElementTree

    Drawing.of(picture, ORIGIN).save(tmp_path / "star.png")
    found = chunks((tmp_path / "star.png").read_bytes())
    assert found["Software"] == ORIGIN.software
    assert "machine" in found["Comment"]
    assert json.loads(found["metamorph"])["seed"] == 7
    packet = ElementTree.fromstring(found["XML:com.adobe.xmp"].partition("?>")[2].rpartition("<?xpacket")[0])
    (about,) = packet.iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    assert about.get("{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType") == DIGITAL_SOURCE_TYPE
    assert Provenance.from_json(about.get("{urn:metamorph:provenance:1}provenance")) == ORIGIN


def test_formats_that_cannot_hold_it_and_users_who_do_not_want_it_get_a_plain_file(picture, tmp_path):
    drawing = Drawing.of(picture, ORIGIN)
    drawing.save(tmp_path / "star.bmp")
    drawing.save(tmp_path / "bare.png", metadata=False)
    picture.save(tmp_path / "theirs.png")
    assert "BMP" not in HOLDERS
    assert read(tmp_path / "star.bmp") is read(tmp_path / "bare.png") is read(tmp_path / "theirs.png") is None
    assert (tmp_path / "bare.png").read_bytes() == (tmp_path / "theirs.png").read_bytes()


def test_files_without_a_name_are_saved_with_it_too(picture, tmp_path):
    with (tmp_path / "star").open("wb") as file:
        Drawing.of(picture, ORIGIN).save(file, "png")
    assert read(tmp_path / "star") == ORIGIN


def test_a_conversation_too_long_for_a_jpeg_leaves_its_hash(picture, tmp_path):
    Drawing.of(picture, replace(ORIGIN, prompt="word " * 20_000)).save(tmp_path / "star.jpg")
    assert read(tmp_path / "star.jpg") == replace(ORIGIN, prompt=None)


def test_what_is_made_of_a_drawing_is_another_picture(picture, tmp_path):
    drawing = Drawing.of(picture, ORIGIN)
    for other in (drawing.crop((0, 0, 8, 8)), drawing.resize((8, 8)), drawing.convert("L")):
        assert not isinstance(other, Drawing)
        other.save(tmp_path / "other.png")
        assert read(tmp_path / "other.png") is None
    again = copy.deepcopy(drawing)  # through the same two methods as pickle, which takes it to other processes
    assert (again.provenance, again.tobytes()) == (ORIGIN, drawing.tobytes())


@pytest.mark.parametrize("content", [b"", b"not a picture", None])
def test_what_is_no_picture_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(MediaError, match=r"x\.png"):
        read(tmp_path / "x.png")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 1}', ORIGIN.to_json().replace('"format": 1', '"format": 2'), '{"format": 1, "x": 0}']
)
def test_a_chunk_that_is_no_provenance_is_refused_by_name(picture, tmp_path, text):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(CHUNK, text)
    picture.save(tmp_path / "x.png", pnginfo=info)
    with pytest.raises(MediaError, match=r"x\.png"):
        read(tmp_path / "x.png")


def test_a_part_is_known_by_its_weights_or_settings_and_never_by_its_place(tmp_path):
    here, there = tmp_path / "here" / "model", tmp_path / "there" / "star-model"
    for directory in (here, there):
        directory.mkdir(parents=True)
    settings = {"hidden_size": 8, "_name_or_path": str(here), "text": {"transformers_version": "5.23.0", "layers": (1, 2)}}
    elsewhere = {"hidden_size": 8, "_name_or_path": str(there), "text": {"transformers_version": "5.24.0", "layers": [1, 2]}}
    first, second = Part.loaded(here, settings), Part.loaded(there, elsewhere)
    assert (first.name, second.name) == ("here/model", "star-model")
    assert first.sha256 == second.sha256 != Part.loaded(here, {"hidden_size": 9}).sha256
    (here / "card.json").write_text(json.dumps({"sha256": "12" * 32}))
    assert Part.loaded(here, settings) == Part("here/model", "12" * 32, "weights")
    for broken in ("{", "[]", '{"sha256": 3}'):
        (here / "card.json").write_text(broken)
        assert Part.loaded(here, settings) == first
    assert Part.loaded("org/name", settings, "abc").revision == "abc"


def test_a_folder_of_the_hubs_cache_is_known_by_its_name_on_the_hub(tmp_path):
    snapshot = tmp_path / "hub" / "models--me--star" / "snapshots" / "4f1c2d"
    (snapshot / "decoder").mkdir(parents=True)
    model, decoder = Part.loaded(snapshot, {"hidden_size": 8}), Part.loaded(snapshot / "decoder", {"layers": 2})
    assert (model.name, model.revision) == ("me/star", "4f1c2d")
    assert (decoder.name, decoder.revision) == ("me/star/decoder", "4f1c2d")
    assert model == Part.loaded("me/star", {"hidden_size": 8}, "4f1c2d")  # as when it is asked for by name
    assert Part.loaded(snapshot.parents[1], {}).name == "models--me--star"  # no snapshot, only a folder of this name


def test_the_transcript_names_every_turn(picture):
    messages = [
        Message.system("Be brief."),
        Message.user(picture, "What?"),
        Message.assistant("A star."),
        Message.user([picture], "And now?"),
    ]
    assert transcript(messages) == "system: Be brief.\nuser: [image]What?\nassistant: A star.\nuser: [video]And now?"
    assert hashlib.sha256(transcript(messages).encode()).hexdigest() != hashlib.sha256(transcript(messages[:2]).encode()).hexdigest()
