"""Visual tokens of a data set, computed once by the frozen encoder: few large files, read without decoding or encoding an image again.

    store.json                        what the tokens are: encoder, preprocessing, shape, dtype
    tokens-<hash>.safetensors         "keys" [n 16] and "tokens" [n k v], of up to about 512 MiB
    index.safetensors                 the keys of all shards, sorted, with shard and row: written last
    encode.lock                       held by the job that writes
    broken.jsonl                      images that do not decode, and why; see broken_images.py

A key is `media.image_hash`: of the bytes of the file, so that looking it up decodes nothing, and the same image is found under any name and
in any container. A key does not cover what was done with the image; that stands in store.json and is compared when training begins.

Tokens are kept in bfloat16, 2 bytes a number: each is within 2^-8 of its value, relatively. Where visual tokens have norm 1 they are
brought back to it when they are read, so that what rounding leaves is a turn: the cosine with the encoder's own token is above 1 - 2^-16.
In float32 what is read is bit for bit what was written.

Axes: n images of a shard, k visual tokens per image, v vision width, m images in all.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8, UInt64
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file
from torch import Tensor

from metamorph.data.broken_images import BrokenImages
from metamorph.data.tensor_files import map_tensors, read_metadata
from metamorph.errors import ConfigError
from metamorph.media import HASH_BYTES, describe_source, image_hash
from metamorph.messages import Example, ImagePart, ImageSource, Part, VideoPart

HEADER, INDEX, LOCK = "store.json", "index.safetensors", "encode.lock"
VERSION = 1
SHARD_BYTES = 2**29
SHARD_SECONDS = 300.0
"""A shard is closed when it is large, or old: what a killed job has to do again."""
StoreType: TypeAlias = Literal["bfloat16", "float32"]
_RECENT_KEYS = 2**18  # so many are kept as a set, 100 bytes each, before they are sorted in
_OPEN_SHARDS = 128  # memory maps that a process keeps, each with a file handle


@dataclass(frozen=True)
class TokenSpec:
    """All that decides what the visual tokens of an image are."""

    fingerprint: str
    """Of the encoder: its weights, and the settings below."""
    settings: Mapping[str, Any]
    """Layer, pooling, number, normalised or not: what is taken from the encoder."""
    preprocessing: Mapping[str, Any]
    """Size, mean, standard deviation and filter of the pixels."""
    num_visual_tokens: int
    width: int

    @property
    def normalized(self) -> bool:
        """Whether tokens have norm 1."""
        return bool(self.settings.get("normalize_visual_tokens", True))

    def check(self, wanted: TokenSpec, place: str) -> None:
        """Refuse tokens of another kind than those wanted.

        Raises:
            ConfigError: with both fingerprints, and the first setting that differs.
        """
        for part in ("settings", "preprocessing"):
            ours, theirs = _plain(getattr(self, part)), _plain(getattr(wanted, part))
            for name in sorted({*ours, *theirs}):
                if ours.get(name) != theirs.get(name):
                    found = f"visual tokens with {name}={ours.get(name)} (encoder {self.fingerprint})"
                    raise _refused(found, f"{name}={theirs.get(name)} (encoder {wanted.fingerprint}) was expected", place)
        if self.fingerprint != wanted.fingerprint:
            expected = f"the model has encoder {wanted.fingerprint}: other weights, or another architecture"
            raise _refused(f"visual tokens of encoder {self.fingerprint}", expected, place)


def _refused(found: str, expected: str, place: str) -> ConfigError:
    return ConfigError(f"{found} but {expected} ({place}). Encode the data with this model into another directory: metamorph data encode.")


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives them back."""
    return json.loads(json.dumps(values))


class TokenStore:
    """A finished store, read by many processes at once: what it opens is mapped into memory when asked for, and it can be pickled.

    Raises:
        ConfigError: there is no store, or it was not finished.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.spec, self.dtype = read_header(directory)
        shards = {path.name for path in shard_files(directory)}
        try:
            details = json.loads(read_metadata(directory / INDEX)["shards"])
        except (OSError, ValueError, KeyError):
            details = None
        if details is None or set(details) != shards:
            found = "no index" if details is None else f"an index of {len(details)} shards and {len(shards)} shards"
            remedy = "Run metamorph data encode again as before: it goes on."
            raise ConfigError(f"{found} but a finished store of visual tokens was expected ({directory}). {remedy}")
        self._names: list[str] = details
        self._index: dict[str, np.ndarray] | None = None
        self._shards: dict[int, np.ndarray] = {}
        self._broken = BrokenImages(directory)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._opened_index()["high"])

    def __contains__(self, key: bytes) -> bool:
        """Whether the tokens of an image with this hash are here."""
        return self._find(key) is not None

    def __getitem__(self, key: bytes) -> Float[Tensor, "k v"]:
        """The visual tokens of an image, float32, in memory of their own.

        Raises:
            KeyError: they are not here.
        """
        position = self._find(key)
        if position is None:
            raise KeyError(key.hex())
        index = self._opened_index()
        stored = self._opened_shard(int(index["shard"][position]))[int(index["row"][position])]
        if self.dtype == "float32":
            return torch.from_numpy(np.array(stored))
        tokens = torch.from_numpy((np.asarray(stored, dtype=np.uint32) << 16).view(np.float32))  # bfloat16 is the upper half of float32
        return F.normalize(tokens, dim=-1) if self.spec.normalized else tokens

    def of_image(self, image: ImageSource, place: str) -> Float[Tensor, "k v"]:
        """The visual tokens of an image; nothing is decoded or encoded.

        Raises:
            MediaError: its file cannot be read, or did not decode when the data were encoded: a broken row.
            ConfigError: it was never encoded. That is a mistake in the settings and no broken row: it is never passed over.
        """
        key = image_hash(image)
        try:
            return self[key]
        except KeyError:
            if (error := self._broken.error(key, image, place)) is not None:
                raise error from None
        remedy = "Encode this data too, into the same directory: metamorph data encode."
        found = f"the image {describe_source(image)} ({key.hex()[:12]})"
        raise ConfigError(f"{found} but only the {len(self)} images of the store {self.directory} are encoded ({place}). {remedy}")

    def replace_images(self, example: Example) -> Example:
        """The example with visual tokens in place of its images, the frames of videos included.

        Raises:
            MediaError, ConfigError: as `of_image`.
        """

        def stored(part: Part) -> Part:
            if isinstance(part, VideoPart):
                return replace(part, frames=tuple(stored(frame) for frame in part.frames))  # pyright: ignore[reportArgumentType]
            if isinstance(part, ImagePart) and part.image is not None:
                return ImagePart(visual_tokens=self.of_image(part.image, example.place))
            return part

        messages = (replace(message, parts=tuple(stored(part) for part in message.parts)) for message in example.messages)
        return replace(example, messages=tuple(messages))

    def __getstate__(self) -> dict[str, Any]:
        """Without what is mapped: another process maps it itself."""
        return vars(self) | {"_index": None, "_shards": {}}

    def _find(self, key: bytes) -> int | None:
        index = self._opened_index()
        return find_key(index["high"], index["low"], key)

    def _opened_index(self) -> dict[str, np.ndarray]:
        if self._index is None:
            index = map_tensors(self.directory / INDEX)
            self._index, self._names = index.arrays, json.loads(index.metadata["shards"])  # of one file: the store may grow meanwhile
        return self._index

    def _opened_shard(self, number: int) -> np.ndarray:
        if number not in self._shards:
            if len(self._shards) >= _OPEN_SHARDS:
                self._shards.pop(next(iter(self._shards)))
            self._shards[number] = map_tensors(self.directory / self._names[number]).arrays["tokens"]
        return self._shards[number]


class ShardWriter:
    """Takes tokens and writes shards. A shard appears whole or not at all."""

    def __init__(self, directory: Path, dtype: StoreType, *, shard_bytes: int = SHARD_BYTES, shard_seconds: float = SHARD_SECONDS) -> None:
        self.directory, self._dtype = directory, getattr(torch, dtype)
        self._limit, self._seconds = shard_bytes, shard_seconds
        self._keys: list[bytes] = []
        self._tokens: list[Tensor] = []
        self._bytes, self._began = 0, time.monotonic()

    def add(self, keys: Sequence[bytes], tokens: Float[Tensor, "n k v"]) -> None:
        """Keep the tokens of some images, and write them when there are enough, or they have waited long enough."""
        rounded = tokens.to(self._dtype).cpu().contiguous()
        if not self._keys:
            self._began = time.monotonic()
        self._keys += keys
        self._tokens.append(rounded)
        self._bytes += rounded.numel() * rounded.element_size()
        if self._bytes >= self._limit or time.monotonic() - self._began >= self._seconds:
            self.flush()

    def flush(self) -> None:
        """Write what was kept."""
        if not self._keys:
            return
        keys = b"".join(self._keys)
        name = f"tokens-{hashlib.blake2b(keys, digest_size=8).hexdigest()}"
        rows = torch.frombuffer(bytearray(keys), dtype=torch.uint8).view(-1, HASH_BYTES)
        partial = self.directory / f"{name}.partial"
        save_file({"keys": rows, "tokens": torch.cat(self._tokens)}, partial)
        _put(partial, self.directory / f"{name}.safetensors")
        self._keys, self._tokens, self._bytes = [], [], 0


class KeySet:
    """Keys by the million, 16 bytes each, with those added last in a set of their own."""

    def __init__(self, keys: Iterable[UInt8[np.ndarray, "_ 16"]] = ()) -> None:
        self._high, self._low = _sorted_halves(list(keys))[:2]
        self._recent: set[bytes] = set()

    def __len__(self) -> int:
        """Number of different keys."""
        return len(self._high) + len(self._recent)

    def __contains__(self, key: bytes) -> bool:
        """Whether it is one of them."""
        return key in self._recent or find_key(self._high, self._low, key) is not None

    def add(self, key: bytes) -> None:
        """Add one, if it is new."""
        if key not in self:
            self._recent.add(key)
            if len(self._recent) >= _RECENT_KEYS:
                recent = np.frombuffer(b"".join(self._recent), dtype=np.uint8).reshape(-1, HASH_BYTES)
                old = np.stack([self._high, self._low], axis=1).astype(">u8").view(np.uint8).reshape(-1, HASH_BYTES)
                self._high, self._low = _sorted_halves([old, recent])[:2]
                self._recent = set()


@contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Hold a store for one job, of however many processes: the first of them calls this. Where files cannot be locked nothing is held.

    Raises:
        ConfigError: another job holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK).open("wb") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            remedy = "Wait for it, encode elsewhere, or let one job do both: torchrun splits the work over processes."
            raise ConfigError(f"another metamorph data encode but one at a time may write ({directory}). {remedy}") from error
        except (ImportError, OSError):  # a system, or a file system, without locks
            pass
        yield


def prepare_store(directory: Path, spec: TokenSpec, dtype: StoreType) -> None:
    """Begin a store, or go on with one: half-written and broken shards are deleted, so that their images are encoded again.

    Raises:
        ConfigError: the store there is of another encoder, preprocessing or dtype.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / HEADER).is_file():
        found, kind = read_header(directory)
        found.check(spec, str(directory))
        if kind != dtype:
            raise ConfigError(f"a store of {kind} but {dtype} was asked for ({directory}). Name another directory, or the same dtype.")
    else:
        about = "BLAKE2b, 16 bytes, of the image file's bytes; of size and RGB pixels where there is no file"
        content = {"version": VERSION, "key": about, "dtype": dtype, **asdict(spec)}
        partial = directory / f"{HEADER}.partial"
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        _put(partial, directory / HEADER)
    for partial in directory.glob("*.partial"):
        partial.unlink()
    for shard in shard_files(directory):
        try:
            read_metadata(shard)
        except ValueError:
            shard.unlink()


def stored_keys(directory: Path) -> list[UInt8[np.ndarray, "_ 16"]]:
    """The keys of every shard."""
    return [np.asarray(map_tensors(shard).arrays["keys"]) for shard in shard_files(directory)]


def build_index(directory: Path) -> int:
    """Write the index over all shards, which makes the store readable; returns the number of images."""
    shards = shard_files(directory)
    keys = stored_keys(directory)
    high, low, order = _sorted_halves(keys)
    sizes = [len(one) for one in keys]
    shard = np.repeat(np.arange(len(shards), dtype=np.uint32), sizes)[order]
    row = np.concatenate([np.arange(size, dtype=np.uint32) for size in sizes] or [np.zeros(0, np.uint32)])[order]
    partial = directory / f"{INDEX}.partial"
    names = json.dumps([path.name for path in shards])
    save_arrays({"high": high, "low": low, "shard": shard, "row": row}, partial, metadata={"shards": names})
    _put(partial, directory / INDEX)
    return len(high)


def read_header(directory: Path) -> tuple[TokenSpec, StoreType]:
    """What the tokens of a store are, and how they are kept.

    Raises:
        ConfigError: there is no store, or one of another version.
    """
    path = directory / HEADER
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("version") != VERSION:
            raise ValueError("another version")
        dtype = content.pop("dtype")
        del content["key"]
        return TokenSpec(**content), dtype
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = "Make it with metamorph data encode."
        raise ConfigError(f"no readable {HEADER} ({error}) but a store of visual tokens was expected ({directory}). {remedy}") from error


def shard_files(directory: Path) -> list[Path]:
    """The shards of a store, by name."""
    return sorted(directory.glob("tokens-*.safetensors"))


def find_key(high: UInt64[np.ndarray, " m"], low: UInt64[np.ndarray, " m"], key: bytes) -> int | None:
    """Where a key stands among sorted ones, by binary search."""
    first, second = int.from_bytes(key[:8], "big"), int.from_bytes(key[8:], "big")
    position = int(np.searchsorted(high, np.uint64(first)))
    while position < len(high) and int(high[position]) == first:
        if int(low[position]) == second:
            return position
        position += 1
    return None


def _sorted_halves(keys: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both halves of all keys, in order and each once, and where each stood."""
    rows = np.concatenate(keys) if keys else np.zeros((0, HASH_BYTES), dtype=np.uint8)
    halves = np.ascontiguousarray(rows).view(">u8").astype(np.uint64).reshape(-1, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    halves = halves[order]
    new = np.ones(len(halves), dtype=bool)
    new[1:] = (halves[1:] != halves[:-1]).any(axis=1)
    return np.ascontiguousarray(halves[new, 0]), np.ascontiguousarray(halves[new, 1]), order[new]


def _put(partial: Path, final: Path) -> None:
    """Give a file its name once all of it is on the disk."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    if (header := final.with_name(HEADER)).is_file():  # safetensors lets nobody but its owner read: whoever may read one may read all
        partial.chmod(header.stat().st_mode)
    os.replace(partial, final)
