"""Pages: everything inline, everything escaped, and pictures that survive the journey."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from metamorph.errors import DataError
from metamorph.messages import ImagePart, Message
from metamorph.reporting.blocks import MAX_SIDE, picture_html
from metamorph.reporting.page import (
    Code,
    Conversation,
    Details,
    Facts,
    Figure,
    Heading,
    ImageGrid,
    MetricBlock,
    Note,
    Page,
    Paragraph,
    PictureCard,
    TableBlock,
    render,
    write,
)
from metamorph.reporting.plots import Curve, line_plot
from metamorph.reporting.tables import Interval, MetricRow, Table

EVIL = "<script>alert('x')</script> & \"quotes\""
VOID = {"meta", "img", "br", "path", "use", "rect"}


class Outline(HTMLParser):
    """Checks that tags close in order, and collects ids and links."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def picture(colour=(200, 30, 30), size=(64, 48)) -> Image.Image:
    return Image.new("RGB", size, colour)


def pixels_of(html: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(re.search(r"data:image/png;base64,([^\"]+)", html).group(1))))


def full_page(word: str) -> Page:
    drawn = Message.assistant(word, ImagePart(visual_tokens=torch_tokens()))
    blocks = [
        Heading(word),
        Paragraph(word),
        Note(word),
        Code(word),
        Facts({word: word, "seconds": 1.5}),
        TableBlock(Table([word, "n"], [[word, 3]], caption=word)),
        MetricBlock([MetricRow(word, Interval(0.8, 0.7, 0.9, 500), floor=0.75, references={word: 0.1}, note=word)], caption=word),
        Heading("Curves"),
        Figure(line_plot([Curve("loss", [0, 1], [1, 0])]), caption=word),
        ImageGrid([PictureCard([picture(), picture()], title=word, caption=word, correct=False, labels=[word])], caption=word),
        Conversation([Message.user(word, picture(), [picture(), picture()]), drawn], drawn=[picture()], caption=word),
        Details(word, [Paragraph(word), Heading(word, level=3)]),
    ]
    return Page(word, blocks, subtitle=word, footer=word)


def torch_tokens():
    import torch

    return torch.ones(4, 3)


@pytest.fixture(scope="module")
def evil() -> str:
    return render(full_page(EVIL))


def test_text_never_becomes_markup(evil: str):
    assert "<script" not in evil
    assert evil.count("&lt;script&gt;") >= 20


def test_page_is_well_formed_and_carries_everything(evil: str):
    outline = Outline(evil)
    assert outline.open == []
    assert {"svg", "img", "table", "details", "dl", "pre"} <= set(outline.seen)
    assert outline.links
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in outline.links)
    assert not re.search(r"https?://(?!www\.w3\.org/)|@import|<link|url\((?!#)", evil)


def test_contents_link_to_sections():
    outline = Outline(render(Page("t", [Heading("What it sees"), Heading("Detail", level=3), Heading("What it draws")])))
    assert [link for link in outline.links if link.startswith("#")] == ["#what-it-sees", "#what-it-draws"]
    assert {"what-it-sees", "what-it-draws"} <= set(outline.ids)


def test_page_says_how_it_wants_to_be_shown(evil: str):
    assert 'name="viewport"' in evil
    assert "prefers-color-scheme: dark" in evil
    assert evil.startswith("<!DOCTYPE html>")


def test_picture_keeps_its_pixels():
    original = Image.effect_noise((40, 30), 60).convert("RGB")
    assert pixels_of(picture_html(original, "")).tobytes() == original.tobytes()


def test_pictures_of_any_mode_and_source_are_shown(tmp_path):
    path = tmp_path / "p.jpg"
    picture().convert("CMYK").save(path)
    for source in (picture().convert("P"), picture().convert("I;16"), path, path.read_bytes()):
        assert pixels_of(picture_html(source, "x")).size == (64, 48)
    assert pixels_of(picture_html(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "")).mode == "RGBA"


def test_large_pictures_shrink_and_the_original_stays():
    large = picture(size=(2000, 1000))
    assert pixels_of(picture_html(large, "")).size == (MAX_SIDE, MAX_SIDE // 2)
    assert large.size == (2000, 1000)


def test_a_file_that_is_no_image_is_refused_by_name(tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"no image")
    for bad in (path, tmp_path / "missing.png"):
        with pytest.raises(DataError, match=bad.name):
            picture_html(bad, "")


def test_drawn_pictures_stand_where_the_tokens_were():
    talk = Conversation(
        [Message.user("draw", picture((1, 2, 3))), Message.assistant(ImagePart(visual_tokens=torch_tokens()), "done")], [picture((9, 8, 7))]
    )
    shown = [Image.open(io.BytesIO(base64.b64decode(data))).getpixel((0, 0)) for data in re.findall(r"base64,([^\"]+)", talk.html())]
    assert shown == [(1, 2, 3), (9, 8, 7)]


def test_a_conversation_needs_one_drawing_per_drawn_image():
    with pytest.raises(DataError, match="0 drawn pictures but 1 images"):
        Conversation([Message.assistant(ImagePart(visual_tokens=torch_tokens()))])


@pytest.mark.parametrize(
    "svg",
    [
        "<p>no</p>",
        "<svg><script>1</script></svg>",
        '<svg onload="x()"></svg>',
        '<svg><image href="http://example.com/a.png"/></svg>',
        "<svg><rect fill='url(http://example.com)'/></svg>",
    ],
)
def test_figures_that_run_or_load_something_are_refused(svg: str):
    with pytest.raises(DataError):
        Figure(svg)


def test_metric_says_whether_its_floor_is_reached_in_words():
    html = MetricBlock([MetricRow("a", Interval(0.8, 0.7, 0.9, 9), 0.75), MetricRow("b", Interval(0.5, 0.4, 0.6, 9), 0.75)]).html()
    assert html.count("✓ reached") == 1
    assert html.count("✗ not reached") == 1


def test_write_leaves_only_the_page(tmp_path):
    path = write(Page("t", [Paragraph("p")]), tmp_path / "deep" / "report.html")
    assert path.read_text(encoding="utf-8") == render(Page("t", [Paragraph("p")]))
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
