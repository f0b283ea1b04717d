"""The ten data sets of the paper, each from a small copy of its published layout: messages, targets, determinism, errors with a place."""

import importlib
import pickle
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from tests import dataset_fixtures
from tests.dataset_fixtures import opened

from metamorph.data.mixture import ExampleSource
from metamorph.errors import ConfigError, DataError, MediaError, RecordError
from metamorph.media import open_image
from metamorph.messages import Example, TextPart, VideoPart, validate_messages

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "datasets"

# reader -> layouts of fixtures, kind of its rows, number of rows
READERS = {
    "cambrian": (("cambrian",), ("image_qa", "text"), 4),
    "video_star": (("video_star",), ("video_qa",), 4),
    "share_video": (("share_video",), ("video_qa",), 3),
    "pairs": (("pairs",), ("generation",), 6),
    "howto100m": (("howto100m",), ("frames",), 3),
    "something_something": (("something_something",), ("frames",), 4),
    "visual_cot": (("visual_cot",), ("thinking",), 2),
    "vstar": (("vstar",), ("thinking",), 4),
    "instruct_pix2pix": (("instruct_pix2pix", "instruct_pix2pix_parquet"), ("edit",), 2),
    "aurora": (("aurora", "aurora_parquet"), ("edit",), None),
}
LAYOUTS = [pytest.param(reader, layout, id=layout) for reader, (layouts, *_) in READERS.items() for layout in layouts]


def fingerprint(example: Example) -> str:
    """All that an example says and shows."""

    def shown(part):
        if isinstance(part, TextPart):
            return part.text
        if isinstance(part, VideoPart):
            return [shown(frame) for frame in part.frames], part.fps
        return open_image(part.image).tobytes()[:64]

    return repr([(message.role, [shown(part) for part in message.parts]) for message in example.messages])


def failure(source, index) -> DataError | None:
    """What is wrong with a row."""
    try:
        source[index]
    except DataError as error:
        return error
    return None


# ---- what holds for all -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reader", "layout"), LAYOUTS)
def test_rows_are_fit_for_training_and_the_same_whenever_and_wherever_they_are_read(reader, layout, tmp_path):
    source = opened(layout, tmp_path, reader)
    assert isinstance(source, ExampleSource)
    assert source.name == reader
    expected = READERS[reader][2]
    assert expected is None or len(source) == expected
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301  # as worker processes get it
    for index in reversed(range(len(source))):
        example = source[index]
        validate_messages(example.messages, needs_answer=True)
        assert example.kind in READERS[reader][1]
        assert example.source == reader
        assert str(tmp_path) in example.origin
        assert fingerprint(copy[index]) == fingerprint(example) == fingerprint(source[index])
    ids = [source[index].id for index in range(len(source))]
    assert len(set(ids)) == len(ids)
    for index in (-1, len(source)):
        with pytest.raises(IndexError):
            source[index]


@pytest.mark.parametrize(("reader", "layout"), LAYOUTS)
def test_a_missing_file_is_an_error_with_its_place(reader, layout, tmp_path):
    """Every picture and video of the fixture in turn is taken away; what then fails names the row."""
    media = {".jpg", ".jpeg", ".png", ".mp4", ".webm"}
    source = opened(layout, tmp_path, reader)
    origins = [source[index].origin for index in range(len(source))]
    failed = 0
    for file in (path for path in sorted(tmp_path.rglob("*")) if path.suffix in media):
        content = file.read_bytes()
        file.unlink()
        found = {index: failure(source, index) for index in range(len(source))}
        file.write_bytes(content)
        for index, error in found.items():
            if error is not None:
                failed += 1
                assert isinstance(error, MediaError), error
                assert origins[index] in str(error)
                assert re.search(r"\. [A-Z].*\.$", str(error)), f"no remedy: {error}"
    held = ("pairs", "instruct_pix2pix_parquet", "aurora_parquet")  # their rows hold the images
    assert bool(failed) == (layout not in (*held, "share_video"))  # which names folders; a test of its own


@pytest.mark.parametrize("reader", READERS)
def test_an_absent_data_set_is_refused_when_it_is_opened(reader, tmp_path):
    source = importlib.import_module(f"metamorph.data.datasets.{reader}").source
    for directory in (tmp_path / "nowhere", tmp_path):  # an empty folder holds none, either
        with pytest.raises(RecordError, match=re.escape(str(directory))):
            source(str(directory))


@pytest.mark.parametrize("page", sorted(set(PAGES.glob("*.md")) - {PAGES / "index.md"}), ids=lambda page: page.stem)
def test_the_recipe_on_a_page_opens_the_data_set(page, tmp_path):
    from metamorph.training.assembly import load_source
    from metamorph.training.config import SourceConfig

    (snippet,) = re.findall(r"^```yaml\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    (entry,) = yaml.safe_load(snippet)
    reader = entry["source"].split(".")[-2]
    assert reader in READERS
    entry["kwargs"]["directory"] = str(getattr(dataset_fixtures, READERS[reader][0][0])(tmp_path))
    assert len(load_source(SourceConfig(**entry))) > 0


def test_pages_and_readers_are_those_of_the_index():
    index = (PAGES / "index.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"`metamorph\.data\.datasets\.(\w+)\.source`", index)) == sorted(READERS)
    pages = re.findall(r"\]\(([\w-]+\.md)\)", index)
    assert sorted(pages) == sorted(page.name for page in PAGES.glob("*.md") if page.stem != "index")
    nav = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]
    assert all(f"datasets/{name}" in str(nav) for name in [*pages, "index.md"])


@pytest.mark.parametrize("name", ["pairs", "howto100m", "visual_cot"])
def test_the_seed_changes_what_is_drawn(name, tmp_path):
    drawn = {"".join(fingerprint(opened(name, tmp_path / str(seed), seed=seed)[0])) for seed in range(4)}
    assert len(drawn) > 1
    with pytest.raises(ConfigError, match="seed -1"):
        opened(name, tmp_path / "again", seed=-1)


def test_the_recipe_that_checks_a_data_set_is_one(tmp_path):
    from metamorph.cli.data_options import sources_of
    from metamorph.recipes import load_recipe

    text = (PAGES / "index.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r'^```yaml title="check.yaml"\n(.*?)^```$', text, flags=re.MULTILINE | re.DOTALL)
    directory = dataset_fixtures.video_star(tmp_path / "data")
    (tmp_path / "check.yaml").write_text(recipe.replace("/data/Video-STaR", str(directory)))
    ((source, max_length),) = sources_of(load_recipe(str(tmp_path / "check.yaml")), whole_files=False)
    assert (source.name, len(source), max_length) == ("video_star", READERS["video_star"][2], 4096)
