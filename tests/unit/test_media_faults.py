"""What is wrong with an image that a record names: each fault by its code, with place, field and remedy; and nothing where nothing is."""

import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from metamorph.data.fetch import fetch_image
from metamorph.data.media_faults import fault_of_image
from metamorph.errors import MediaError
from metamorph.media import ImageLimits


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "images"
    (root / "Cats").mkdir(parents=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))
    for name in ("Cats/one.png", "two.JPG", "three.webp", "four.gif", "five.tiff", "Ωμέγα.png"):
        image.save(root / name, format={"jpg": "JPEG"}.get(name.rsplit(".")[1].lower()))
    image.save(tmp_path / "outside.png")
    (root / "cut.png").write_bytes((root / "Cats/one.png").read_bytes()[:-200])
    (root / "empty.png").write_bytes(b"")
    (root / "renamed.jpg").write_bytes((root / "Cats/one.png").read_bytes())
    (root / "page.jpg").write_text("<html>not found</html>")
    head = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", b"")]
    written = b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    (root / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + written)
    return root


def find(source, root, **options):
    return fault_of_image(source, place="train.jsonl:7", field="image", root=root, **options)


@pytest.mark.parametrize("name", ["Cats/one.png", "two.JPG", "three.webp", "four.gif", "five.tiff", "Ωμέγα.png", "./Cats/../two.JPG"])
@pytest.mark.parametrize("decode", [True, False])
def test_good_images_have_no_fault(root, name, decode):
    assert find(name, root, decode=decode) is None
    assert find(root / name, None, decode=decode) is None
    assert find((root / name).read_bytes(), None, decode=decode) is None


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("none.png", "image-missing", "no file 'none.png'"),
        ("Cats/none.png", "image-missing", "no file 'Cats/none.png'"),
        ("cats/One.PNG", "image-case", "'Cats/one.png'"),
        ("cut.png", "image-broken", "does not decode"),
        ("empty.png", "image-empty", "0 bytes in 'empty.png'"),
        ("page.jpg", "image-broken", "(HTML)"),
        ("bomb.png", "image-bomb", "pixels"),
        ("../outside.png", "image-outside", "a path inside"),
        ("/etc/hostname", "image-outside", "a path inside"),
        ("C:\\data\\one.png", "image-windows-path", "with '/'"),
        ("C:/data/one.png", "image-windows-path", "with '/'"),
        ("\\\\server\\one.png", "image-windows-path", "with '/'"),
        ("Cats\\one.png", "image-windows-path", "with '/'"),
        ("https://example.com/one.png", "image-url", "--allow-urls"),
        ("s3://bucket/one.png", "image-url", "Download"),
        ("file:///etc/hostname", "image-url", "Download"),
        ("Cats", "image-unreadable", "no regular file"),
        ("a\0b", "image-outside", "a path inside"),
    ],
)
def test_each_fault_has_its_code(root, name, code, words):
    fault = find(name, root)
    assert (fault.code, fault.severity, fault.media) == (code, "error", True)
    assert str(fault).startswith("train.jsonl:7 image: ")
    assert words in str(fault)
    assert isinstance(fault.error(), MediaError)


def test_another_type_than_the_name_says_is_a_warning(root):
    for decode in (True, False):
        fault = find("renamed.jpg", root, decode=decode)
        assert (fault.code, fault.severity) == ("image-type", "warning")
        assert "PNG data in 'renamed.jpg' but its name promises JPEG" in str(fault)


def test_allowed_urls_are_taken_but_no_other_scheme(root):
    assert find("https://example.com/a.png", root, allow_urls=True) is None
    assert find("ftp://example.com/a.png", root, allow_urls=True).code == "image-url"


def test_limits_are_the_callers(root):
    assert find("two.JPG", root, limits=ImageLimits(max_bytes=50)).code == "image-too-large"
    assert find("two.JPG", root, limits=ImageLimits(max_pixels=50)).code == "image-bomb"


def test_case_is_noticed_after_the_folder_has_changed(root):
    assert find("TWO.jpg", root).code == "image-case"
    (root / "two.JPG").rename(root / "2.jpg")
    assert find("TWO.jpg", root).code == "image-missing"


@pytest.fixture
def server():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", self.server.target)
                self.end_headers()
                return
            if self.path == "/slow":
                self.server.hold.wait(5)
            self.send_response(404 if self.path == "/none" else 200)
            body = b"x" * 5000
            self.send_header("Content-Length", str(len(body) * (2 if self.path == "/cut" else 1)))
            self.end_headers()
            try:
                self.wfile.write(body)
            except OSError:  # who asked has left
                pass

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hold, server.target = threading.Event(), "/image"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.hold.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_fetching_stays_within_its_limits(server, tmp_path):
    base = f"http://127.0.0.1:{server.server_port}"
    assert fetch_image(f"{base}/image") == fetch_image(f"{base}/moved") == b"x" * 5000
    secret = tmp_path / "secret"
    secret.write_text("secret")
    server.target = secret.as_uri()
    for path, found, options in [
        ("/none", "answer 404", {}),
        ("/image", "more than 4999 bytes but at most 4999", {"limits": ImageLimits(max_bytes=4999)}),
        ("/cut", "5000 bytes but 10000 were announced", {}),
        ("/slow", "answer in 0.2 s", {"timeout": 0.2}),
        ("/moved", "is not allowed", {}),
    ]:
        with pytest.raises(MediaError, match=found) as caught:
            fetch_image(base + path, **options)
        assert base in str(caught.value)
    for url in (secret.as_uri(), "ftp://127.0.0.1/a", "a.png"):
        with pytest.raises(MediaError, match="http or https is needed"):
            fetch_image(url)
