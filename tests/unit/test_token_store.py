"""The store of visual tokens: what is written is read back, by many processes, after any interruption, and never for another encoder."""

import json
import multiprocessing
import pickle
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metamorph.data import token_store
from metamorph.data.broken_images import BROKEN, BrokenImages
from metamorph.data.faults import Fault
from metamorph.data.token_store import (
    INDEX,
    KeySet,
    ShardWriter,
    TokenSpec,
    TokenStore,
    build_index,
    only_writer,
    prepare_store,
    shard_files,
    stored_keys,
)
from metamorph.errors import ConfigError, MediaError
from metamorph.media import image_hash
from metamorph.messages import Example, ImagePart, Message, VideoPart

SPEC = TokenSpec("0123456789abcdef", {"pooling": "bilinear", "normalize_visual_tokens": True}, {"image_size": [32, 32]}, 4, 24)


def tokens(number, seed=0, k=4, v=24):
    values = torch.randn(number, k, v, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(values, dim=-1)


def keys(number, seed=0):
    return [row.tobytes() for row in np.random.default_rng(seed).integers(0, 256, (number, 16), dtype=np.uint8)]


def write(directory, number=50, dtype="bfloat16", spec=SPEC, seed=0, **settings):
    prepare_store(directory, spec, dtype)
    writer = ShardWriter(directory, dtype, **settings)
    for start in range(0, number, 8):
        writer.add(keys(number, seed)[start : start + 8], tokens(number, seed)[start : start + 8])
    writer.flush()
    build_index(directory)
    return TokenStore(directory)


def test_float32_comes_back_bit_for_bit(tmp_path):
    store = write(tmp_path, dtype="float32")
    assert len(store) == 50
    assert all(torch.equal(store[key], expected) for key, expected in zip(keys(50), tokens(50), strict=True))
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1  # who may read the header may read the tokens


def test_bfloat16_is_two_bytes_a_number_and_within_the_stated_error(tmp_path):
    store = write(tmp_path, number=400)
    found, expected = torch.stack([store[key] for key in keys(400)]), tokens(400)
    assert found.dtype == torch.float32
    assert torch.allclose(found.norm(dim=-1), torch.ones(400, 4), atol=1e-6)  # still of norm 1
    cosine = torch.nn.functional.cosine_similarity(found.double(), expected.double(), dim=-1)
    assert cosine.min() > 1 - 2**-16
    assert (found - expected).abs().max() < 2**-8 * expected.abs().max() * 1.01
    (shard,) = shard_files(tmp_path)
    assert shard.stat().st_size < 400 * (4 * 24 * 2 + 16) + 400


def test_tokens_without_a_norm_are_not_given_one(tmp_path):
    spec = replace(SPEC, settings={**SPEC.settings, "normalize_visual_tokens": False})
    prepare_store(tmp_path, spec, "bfloat16")
    writer = ShardWriter(tmp_path, "bfloat16")
    writer.add(keys(3), 5 * tokens(3))
    writer.flush()
    build_index(tmp_path)
    assert torch.equal(TokenStore(tmp_path)[keys(3)[1]], (5 * tokens(3)[1]).bfloat16().float())


def test_shards_are_cut_by_size_and_by_age(tmp_path):
    write(tmp_path / "size", shard_bytes=3000)  # 16 images are 3,072 bytes
    assert len(shard_files(tmp_path / "size")) == 4
    write(tmp_path / "age", shard_seconds=0.0)
    assert len(shard_files(tmp_path / "age")) == 7
    store = TokenStore(tmp_path / "age")
    assert len(store) == 50 and torch.equal(store[keys(50)[49]], TokenStore(tmp_path / "size")[keys(50)[49]])


def test_many_shards_are_read_with_few_open(tmp_path, monkeypatch):
    monkeypatch.setattr(token_store, "_OPEN_SHARDS", 2)
    store = write(tmp_path, dtype="float32", shard_seconds=0.0)
    for order in (range(50), reversed(range(50))):
        assert all(torch.equal(store[keys(50)[i]], tokens(50)[i]) for i in order)
    assert len(store._shards) <= 2


def test_a_store_that_grows_while_it_is_open_gives_no_other_images_tokens(tmp_path):
    opened = write(tmp_path, dtype="float32")
    copied = copy(opened)  # as worker processes get it: without what is mapped
    first, seed = shard_files(tmp_path)[0], 0
    while shard_files(tmp_path)[0] == first:  # until a later shard sorts before the first, which moves all numbers
        seed += 1
        write(tmp_path, dtype="float32", seed=seed)
    for store in (opened, copied, TokenStore(tmp_path)):
        assert all(torch.equal(store[key], expected) for key, expected in zip(keys(50), tokens(50), strict=True))


def test_one_job_at_a_time_writes_to_a_store(tmp_path):
    with only_writer(tmp_path / "store"):
        with pytest.raises(ConfigError, match="another metamorph data encode but one at a time may write"), only_writer(tmp_path / "store"):
            pass
        with only_writer(tmp_path / "other"):
            pass
    with only_writer(tmp_path / "store"):
        pass


def test_absent_keys_are_absent(tmp_path):
    store = write(tmp_path)
    present = keys(50)[7]
    near = present[:8] + bytes(8)
    assert present in store and near not in store and bytes(16) not in store and b"\xff" * 16 not in store
    with pytest.raises(KeyError):
        store[near]


def test_keys_that_begin_alike_are_told_apart(tmp_path):
    prepare_store(tmp_path, SPEC, "float32")
    writer = ShardWriter(tmp_path, "float32")
    alike = [b"samehalf" + bytes([i]) * 8 for i in (9, 0, 255, 3)]
    writer.add(alike, tokens(4))
    writer.flush()
    assert build_index(tmp_path) == 4
    store = TokenStore(tmp_path)
    assert all(torch.equal(store[key], expected) for key, expected in zip(alike, tokens(4), strict=True))


def test_an_unfinished_store_is_not_read(tmp_path):
    with pytest.raises(ConfigError, match=r"no readable store\.json .* metamorph data encode"):
        TokenStore(tmp_path)
    write(tmp_path)
    (tmp_path / INDEX).rename(tmp_path / "away")
    with pytest.raises(ConfigError, match="no index but a finished store"):
        TokenStore(tmp_path)
    (tmp_path / "away").rename(tmp_path / INDEX)
    writer = ShardWriter(tmp_path, "bfloat16")
    writer.add(keys(2, 1), tokens(2, 1))
    writer.flush()
    with pytest.raises(ConfigError, match="an index of 1 shards and 2 shards"):
        TokenStore(tmp_path)
    assert build_index(tmp_path) == 52
    assert keys(2, 1)[0] in TokenStore(tmp_path)


def test_broken_shards_are_found_and_made_again(tmp_path):
    write(tmp_path, shard_bytes=3000)
    first, second, *_ = shard_files(tmp_path)
    first.write_bytes(first.read_bytes()[:-7])
    second.write_bytes(b"")
    (tmp_path / "tokens-0.partial").write_bytes(b"half")
    prepare_store(tmp_path, SPEC, "bfloat16")
    assert len(shard_files(tmp_path)) == 2 and not list(tmp_path.glob("*.partial"))
    known = KeySet(stored_keys(tmp_path))
    assert 0 < len(known) < 50
    writer = ShardWriter(tmp_path, "bfloat16")
    missing = [i for i, key in enumerate(keys(50)) if key not in known]
    writer.add([keys(50)[i] for i in missing], tokens(50)[missing])
    writer.flush()
    assert build_index(tmp_path) == 50


def test_an_image_in_two_shards_counts_once(tmp_path):
    prepare_store(tmp_path, SPEC, "bfloat16")
    for shift in (0, 3):
        writer = ShardWriter(tmp_path, "bfloat16")
        writer.add(keys(9)[shift : shift + 6], tokens(9)[shift : shift + 6])
        writer.flush()
    assert build_index(tmp_path) == 9


def test_another_encoder_setting_or_preprocessing_is_refused_with_both_fingerprints(tmp_path):
    store = write(tmp_path)
    store.spec.check(SPEC, "here")
    other = replace(SPEC, fingerprint="fedcba9876543210")
    with pytest.raises(ConfigError, match=r"0123456789abcdef but .*fedcba9876543210"):
        store.spec.check(other, "here")
    with pytest.raises(ConfigError, match=r"pooling=bilinear \(encoder 0123456789abcdef\) but pooling=area \(encoder fedcba9876543210\)"):
        store.spec.check(replace(other, settings={**SPEC.settings, "pooling": "area"}), "here")
    with pytest.raises(ConfigError, match=r"image_size=\[32, 32\]"):
        store.spec.check(replace(SPEC, preprocessing={"image_size": (64, 64)}), "here")
    with pytest.raises(ConfigError, match="fedcba9876543210"):
        prepare_store(tmp_path, other, "bfloat16")
    with pytest.raises(ConfigError, match="a store of bfloat16 but float32"):
        prepare_store(tmp_path, SPEC, "float32")
    header = json.loads((tmp_path / "store.json").read_text())
    (tmp_path / "store.json").write_text(json.dumps(header | {"version": 2}))
    with pytest.raises(ConfigError, match="another version"):
        TokenStore(tmp_path)


def test_key_sets_grow():
    known = KeySet([np.frombuffer(b"".join(keys(100)), dtype=np.uint8).reshape(-1, 16)])
    for key in [*keys(300), *keys(100, 5)]:
        known.add(key)
    assert len(known) == len({*keys(100), *keys(300), *keys(100, 5)})
    assert all(key in known for key in (*keys(300), *keys(100, 5))) and bytes(16) not in known
    assert len(KeySet()) == 0 and bytes(16) not in KeySet()


def test_key_sets_sort_what_has_gathered(monkeypatch):
    monkeypatch.setattr(token_store, "_RECENT_KEYS", 100)
    known = KeySet()
    many = np.random.default_rng(0).integers(0, 256, (310, 16), dtype=np.uint8)
    for row in many:
        known.add(row.tobytes())
    assert len(known) == len(many) and len(known._recent) == 10
    assert many[5].tobytes() in known and many[-1].tobytes() in known


def read_from(store, wanted):
    return [store[key].tolist() for key in wanted]


def test_workers_get_the_store_without_what_it_has_mapped(tmp_path):
    store = write(tmp_path)
    expected = read_from(store, keys(50)[:5])
    assert len(pickle.dumps(store)) < 3000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(read_from, (store, keys(50)[:5])) == expected


@pytest.fixture
def pictures(tmp_path):
    """Three images: a file, its bytes under another name, and one given by PIL; and a store that holds them."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    path = tmp_path / "a.png"
    image.save(path)
    prepare_store(tmp_path / "store", SPEC, "float32")
    writer = ShardWriter(tmp_path / "store", "float32")
    writer.add([image_hash(path), image_hash(image)], tokens(2))
    writer.flush()
    build_index(tmp_path / "store")
    return TokenStore(tmp_path / "store"), path, image


def test_images_of_an_example_become_tokens(pictures):
    store, path, image = pictures
    drawn = ImagePart(visual_tokens=torch.ones(4, 24))
    video = VideoPart((ImagePart(path), ImagePart(image)), fps=2.0)
    messages = (Message.user(path, "and", path.read_bytes(), video), Message.assistant(image, drawn, "yes"))
    example = Example(messages, "1", "test", weight=2.0, origin="rows.jsonl:3")
    result = store.replace_images(example)
    assert (result.id, result.weight, result.place) == ("1", 2.0, "rows.jsonl:3")
    found = [part.visual_tokens for message in result.messages for part in message.images]
    expected = [tokens(2)[i] for i in (0, 0, 0, 1, 1)] + [torch.ones(4, 24)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert result.messages[0].parts[3].fps == 2.0 and result.messages[0].text == "and"


def test_an_image_that_is_not_there_is_an_error_with_place_and_remedy(pictures, tmp_path):
    store, path, image = pictures
    image.save(path, "BMP")
    example = Example((Message.user(path), Message.assistant("yes")), "1", "test", origin="rows.jsonl:3")
    with pytest.raises(ConfigError, match=r"a\.png .* only the 2 images .*rows\.jsonl:3.* metamorph data encode"):
        store.replace_images(example)
    gone = Example((Message.user(Path(tmp_path / "gone.png")), Message.assistant("yes")), "1", "test")
    with pytest.raises(MediaError, match="No such file"):
        store.replace_images(gone)


def broken(found="an image that does not decode", code="image-broken"):
    return Fault(code, "", "", found, "a whole file is needed", "Fetch it again.", media=True)


def test_a_broken_image_is_a_fault_of_the_row_and_of_no_other_image(pictures, tmp_path):
    store, path, image = pictures
    image.save(tmp_path / "b.bmp")
    image.save(tmp_path / "c.gif")
    BrokenImages(tmp_path / "store").add({image_hash(tmp_path / "b.bmp"): broken(), image_hash(path): broken()})
    example = Example((Message.user(tmp_path / "b.bmp"), Message.assistant("yes")), "1", "test", origin="rows.jsonl:3")
    with pytest.raises(MediaError) as caught:
        store.replace_images(example)
    remedy = "Fetch it again. Then encode the data again: metamorph data encode."
    said = "an image that does not decode but a whole file is needed"
    assert str(caught.value) == f"{said} (rows.jsonl:3, {tmp_path / 'b.bmp'}). {remedy}"
    assert caught.value.fault == ("image-broken", *said.split(" but "), remedy)
    assert torch.equal(store.of_image(path, "here"), tokens(2)[0])  # what has tokens is not broken
    with pytest.raises(ConfigError, match="only the 2 images"):
        store.of_image(tmp_path / "c.gif", "here")


def test_the_list_of_broken_images_is_read_at_the_first_miss_and_not_pickled(pictures, tmp_path):
    store, path, image = pictures
    image.save(tmp_path / "b.bmp")
    listing = tmp_path / "store" / BROKEN
    BrokenImages(tmp_path / "store").add({image_hash(tmp_path / "b.bmp"): broken()})
    kept = listing.read_bytes()
    listing.unlink()
    store.of_image(path, "here")
    listing.write_bytes(kept)
    sent = pickle.dumps(store)
    for reader in (store, pickle.loads(sent)):  # noqa: S301  # our own bytes, as spawning does
        with pytest.raises(MediaError, match="does not decode"):
            reader.of_image(tmp_path / "b.bmp", "here")
    assert b"does not decode" not in pickle.dumps(store)


def test_broken_images_are_added_once_and_after_a_line_that_was_cut_short(tmp_path):
    first, second, third = keys(3)
    BrokenImages(tmp_path).add({first: broken(), second: broken("a file that went away", "image-missing")})
    listing = tmp_path / BROKEN
    assert set(BrokenImages(tmp_path).faults) == {first}  # a file that could not be read says nothing about its content
    before = listing.read_bytes()
    BrokenImages(tmp_path).add({first: broken()})
    assert listing.read_bytes() == before
    listing.write_bytes(before + before[:40])
    later = BrokenImages(tmp_path)
    assert later.faults == {first: broken()}
    later.add({third: broken("2 × 0 pixels\nof nothing"), first: broken("another reason")})
    assert later.faults == BrokenImages(tmp_path).faults == {first: broken("another reason"), third: broken("2 × 0 pixels\nof nothing")}
    assert listing.read_bytes().startswith(before) and BrokenImages(tmp_path / "nowhere").faults == {}
