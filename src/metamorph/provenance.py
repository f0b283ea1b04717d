"""Where a picture comes from: model, seed and protocol, kept with the picture and written into its file. Pixels are never changed.

    reply.images[0].save("star.png")              # a `Drawing`: the file says how it was made
    read("star.png").seed

PNG, JPEG and WebP can hold it; other formats are saved without. A PNG has it twice, as text chunks (`Software`, `Comment`, `metamorph`)
and as XMP; JPEG and WebP as XMP. The XMP names the IPTC digital source type `trainedAlgorithmicMedia`, by which catalogues and
platforms recognise pictures made by a model.

What was asked is not written unless wished for (`keep_prompt`), because a picture travels further than its maker's words were meant to;
its SHA-256 is, so that who knows the words can prove them. No path and no time is written: the same call gives the same file.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from PIL import Image, PngImagePlugin

import metamorph
from metamorph.errors import MediaError
from metamorph.media import FORMATS
from metamorph.messages import ImagePart, Message, TextPart

CHUNK = "metamorph"
"""Keyword of the PNG text chunk that holds the provenance as JSON."""
FORMAT = 1
"""Raised when the JSON changes its meaning."""
STATEMENT = "This picture was made by a machine: a model drew it from a request."
DIGITAL_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
HOLDERS = ("PNG", "JPEG", "WEBP")
"""File formats that can hold a provenance."""

_XMP_LIMIT = 60_000  # a JPEG segment ends at 65,535 bytes
_CARD = "card.json"
_SNAPSHOT = re.compile(r"(?:^|/)models--([^/]+)/snapshots/([^/]+)(?:/(.+))?$")
_ATTRIBUTE = re.compile(r'metamorph:provenance="([^"]*)"')
_PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""'
    ' xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
    ' xmlns:metamorph="urn:metamorph:provenance:1" xmp:CreatorTool="{software}" Iptc4xmpExt:DigitalSourceType="{source}"'
    ' metamorph:provenance="{provenance}"/></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)


@dataclass(frozen=True)
class Snapshot:
    """A folder of the hub's cache: what was asked for on the hub, and not what the cache calls it."""

    repository: str
    commit: str
    folder: str = ""  # inside the repository

    @classmethod
    def around(cls, directory: Path) -> Snapshot | None:
        """The snapshot that an existing directory is, or lies in."""
        found = _SNAPSHOT.search(directory.resolve().as_posix())
        return found and cls(found[1].replace("--", "/"), found[2], found[3] or "")

    @property
    def name(self) -> str:
        """The repository and, behind it, the folder."""
        return f"{self.repository}/{self.folder}" if self.folder else self.repository


def public_name(reference: str | Path) -> str:
    """A name on the hub as it is, also of a snapshot in the hub's cache; of another directory only the last part, as `./name`."""
    place = Path(reference)
    if not place.is_dir():
        return str(reference)
    snapshot = Snapshot.around(place)
    return snapshot.repository if snapshot is not None else f"./{place.resolve().name}"


@dataclass(frozen=True)
class Part:
    """A model or decoder, as it can be recognised anywhere: by name and hash, never by its place on a disk."""

    name: str
    sha256: str  # of the weights if a card beside them gives it, else of the config
    of: Literal["weights", "config"] = "config"
    revision: str = ""  # of a model on the hub

    @classmethod
    def of_config(cls, name: str, config: Mapping[str, Any]) -> Part:
        """A part that is in memory only, or has no card: known by its settings, whatever path and version they were loaded with."""
        text = json.dumps(_without_circumstances(config), sort_keys=True, default=str)
        return cls(name, hashlib.sha256(text.encode()).hexdigest())

    @classmethod
    def loaded(cls, source: str | Path, config: Mapping[str, Any], revision: str | None = None) -> Part:
        """A part as it was loaded from a directory, which may lie in the hub's cache, or from the hub."""
        directory = Path(source)
        if not directory.is_dir():
            return replace(cls.of_config(str(source), config), revision=revision or "")
        directory = directory.resolve()
        if (snapshot := Snapshot.around(directory)) is not None:
            name, revision = snapshot.name, snapshot.commit
        else:  # a run saves its model as runs/my-run/model: the last name alone would say nothing
            generic = directory.name in ("model", "decoder")
            name, revision = f"{directory.parent.name}/{directory.name}" if generic else directory.name, ""
        weights = _hash_on_card(directory / _CARD)
        part = cls(name, weights, "weights") if weights else cls.of_config(name, config)
        return replace(part, revision=revision)

    def __str__(self) -> str:
        """For people: the name and the beginning of the hash."""
        return f"{self.name} ({self.of} {self.sha256[:12]})"


@dataclass(frozen=True)
class Provenance:
    """How one picture was made."""

    model: Part | None  # None: the tokens were given, not predicted
    decoder: Part | None
    seed: int  # of the answer; the picture's noise has `seed + image`
    image: int = 0  # number of the picture in its answer, from 0
    steps: int = 0  # denoising steps
    guidance_scale: float = 1.0
    decoding: Mapping[str, Any] = field(default_factory=dict)  # fields of DecodingOptions
    prompt_sha256: str = ""  # of `transcript(messages)`
    prompt: str | None = None  # the transcript itself, if it was to be kept
    software: str = f"metamorph {metamorph.__version__}"
    libraries: Mapping[str, str] = field(default_factory=dict)  # versions of those that computed it

    def to_json(self) -> str:
        """One line, in the order of the fields."""
        return json.dumps({"format": FORMAT, **asdict(self)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, place: str = "provenance") -> Provenance:
        """The inverse of `to_json`.

        Raises:
            MediaError: the text is not a provenance of this format.
        """
        try:
            values = json.loads(text)
            found = values.pop("format")
            parts = {name: Part(**values[name]) for name in ("model", "decoder") if values[name] is not None}
            made = cls(**{**values, **parts})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MediaError(f"an unreadable chunk ({error}) but a provenance is needed ({place}). Save the picture anew.") from error
        if found != FORMAT:
            raise MediaError(f"provenance of format {found!r} but {FORMAT} is known ({place}). Read it with a newer metamorph.")
        return made

    def xmp(self) -> bytes:
        """An XMP packet with this provenance and the digital source type."""
        values = {"software": self.software, "source": DIGITAL_SOURCE_TYPE, "provenance": self.to_json()}
        return _PACKET.format(**{name: html.escape(value) for name, value in values.items()}).encode()

    def saving(self, format: str) -> dict[str, Any]:
        """What PIL's `save` must be given for the file to hold this; nothing for a format that cannot."""
        if format == "PNG":
            chunks = PngImagePlugin.PngInfo()
            chunks.add_itxt("Software", self.software)
            chunks.add_itxt("Comment", STATEMENT)
            chunks.add_itxt(CHUNK, self.to_json())
            chunks.add_itxt("XML:com.adobe.xmp", self.xmp().decode())
            return {"pnginfo": chunks}
        if format not in HOLDERS:
            return {}
        packet = self.xmp()
        if len(packet) > _XMP_LIMIT:  # a long conversation that was to be kept: its hash must do
            packet = replace(self, prompt=None).xmp()
        return {"xmp": packet}


class Drawing(Image.Image):
    """A picture that a model drew. It is an ordinary PIL image, but saved as it is, its file says where it comes from.

    What PIL makes of it (a crop, a resized copy) is another picture, and is saved without.
    """

    @classmethod
    def of(cls, image: Image.Image, provenance: Provenance) -> Drawing:
        """The same pixels with their provenance."""
        drawing = cls.__new__(cls)
        info, *pixels = image.__getstate__()
        drawing.__setstate__([{**info, CHUNK: provenance.to_json()}, *pixels])
        return drawing

    @property
    def provenance(self) -> Provenance:
        """How it was made."""
        return Provenance.from_json(self.info[CHUNK])

    def save(self, fp: Any, format: str | None = None, *, metadata: bool = True, **params: Any) -> None:
        """PIL's `save`; with `metadata` PNG, JPEG and WebP hold the provenance, unless `pnginfo` or `xmp` is given."""
        if metadata:
            kind = format or Image.registered_extensions().get(Path(str(getattr(fp, "name", fp))).suffix.lower(), "")
            params = self.provenance.saving(kind.upper()) | params
        super().save(fp, format, **params)


def read(path: str | Path) -> Provenance | None:
    """The provenance that a picture's file holds, or None. Pixels are not decoded; what the file claims is not proven by it.

    Raises:
        MediaError: no picture, or a provenance that does not read.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            chunk, packet = image.info.get(CHUNK), image.info.get("xmp", b"")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise MediaError(f"a file that does not open ({error}) but a picture is needed ({path}). Check the path.") from error
    if chunk is None:
        found = _ATTRIBUTE.search(packet.decode("utf-8", errors="replace") if isinstance(packet, bytes) else str(packet))
        chunk = html.unescape(found.group(1)) if found else None
    return None if chunk is None else Provenance.from_json(str(chunk), str(path))


def transcript(messages: Sequence[Message]) -> str:
    """A conversation as text, one line for each turn; an image is `[image]`. It is what `prompt_sha256` is the hash of."""
    return "\n".join(f"{message.role}: {''.join(_spelled(part) for part in message.parts)}" for message in messages)


def _spelled(part: object) -> str:
    if isinstance(part, TextPart):
        return part.text
    return "[image]" if isinstance(part, ImagePart) else "[video]"


def _without_circumstances(settings: Any) -> Any:
    """Settings without what only says where, or with which version, they were saved."""
    if isinstance(settings, Mapping):
        kept = {str(name): value for name, value in settings.items() if not str(name).startswith("_") and "version" not in str(name)}
        return {name: _without_circumstances(value) for name, value in kept.items()}
    return [_without_circumstances(value) for value in settings] if isinstance(settings, (list, tuple)) else settings


def _hash_on_card(card: Path) -> str:
    """What a card says the hash of the weights beside it is; empty without a card that says it."""
    try:
        said = json.loads(card.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    found = cast(dict, said).get("sha256") if isinstance(said, dict) else None
    return found if isinstance(found, str) else ""
