"""Images from the network: never on anybody's own accord, only where a record's reader was allowed to, and within limits."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from metamorph.errors import MediaError
from metamorph.media import DEFAULT_LIMITS, ImageLimits

_CHUNK = 2**16


def fetch_image(url: str, *, limits: ImageLimits = DEFAULT_LIMITS, timeout: float = 20.0) -> bytes:
    """The bytes that an address gives, for `open_image`.

    Only http and https are spoken, also after a redirection; no cookies or passwords are sent. The bytes are not looked at.

    Args:
        url: where the image is.
        limits: `max_bytes` is kept whatever the server announces.
        timeout: seconds for all of it.

    Raises:
        MediaError: another scheme, no answer in time, an error of the server, or too many bytes.
    """
    if urlsplit(url).scheme.lower() not in ("http", "https"):
        raise _refusal(url, "another scheme", "http or https is needed", "Download the image and name its path.")
    deadline = time.monotonic() + timeout
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "metamorph", "Accept": "image/*,*/*;q=0.5"})
        with _opener().open(request, timeout=timeout) as answer:
            parts, total = [], 0
            while chunk := answer.read1(_CHUNK):
                parts.append(chunk)
                total += len(chunk)
                if total > limits.max_bytes:
                    expected = f"at most {limits.max_bytes} are allowed"
                    raise _refusal(url, f"more than {limits.max_bytes} bytes", expected, "Raise max_bytes, or leave the image out.")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"after {total} bytes")
            announced = answer.headers.get("Content-Length")
            if announced is not None and announced.isdigit() and int(announced) != total:
                raise _refusal(url, f"{total} bytes", f"{announced} were announced", "Fetch it again.")
            return b"".join(parts)
    except urllib.error.HTTPError as error:
        error.close()
        raise _refusal(url, f"answer {error.code} ({error.reason})", "an image is needed", "Check the address.") from error
    except TimeoutError as error:
        raise _refusal(url, f"no whole answer in {timeout:g} s", "an image is needed", "Try again, or allow more time.") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise _refusal(url, f"no answer in {timeout:g} s", "an image is needed", "Try again, or allow more time.") from error
        raise _refusal(url, f"no answer ({reason})", "an image is needed", "Check the address and the network.") from error


def _opener() -> urllib.request.OpenerDirector:
    """Speaks http and https and nothing else: the usual opener also reads local files."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def _refusal(url: str, found: str, expected: str, remedy: str) -> MediaError:
    error = MediaError(f"{found} but {expected} ({url}). {remedy}")
    error.fault = ("image-url", f"{found} from {url}", expected, remedy)
    return error
