"""Prompts of a benchmark that training data hold too: word for word, but for case and punctuation, or by most of their n-grams.

The benchmark is held in memory as hashes of its word n-grams; the training rows pass by once. Text without spaces between words (Chinese,
Japanese, Thai) is cut into letters. Similarity is containment: the share of a prompt's distinct n-grams that one training turn has.

Source of the n-gram test: GPT-3 (arXiv 2005.14165, appendix C), which takes 13 words; prompts about images are shorter.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, TypeAlias

from metamorph.data.faults import Fault
from metamorph.data.mixture import ExampleSource
from metamorph.data.record_fields import CAPTIONS
from metamorph.data.row_checks import digest
from metamorph.data.source import FileSource, open_source
from metamorph.data.turns import TAG
from metamorph.errors import ConfigError, MetaMorphError, RecordError
from metamorph.messages import Example

Match: TypeAlias = Literal["exact", "normalised", "n-gram"]
Told: TypeAlias = Callable[[int, int], None]

PROMPT_FIELDS = ("question", "prompt", "instruction", "query")
SHORTEST = 4
"""Prompts of fewer words say too little to be compared by n-grams."""
_CHUNK = 2048
_WORD = re.compile(r"[぀-ヿ㐀-鿿豈-﫿฀-๿]|[^\W_぀-ヿ㐀-鿿豈-﫿฀-๿]+")


@dataclass(frozen=True)
class Prompt:
    """What somebody asks, and where it stands."""

    text: str
    place: str


@dataclass(frozen=True)
class Leak:
    """A benchmark's prompt that a training row holds, or nearly does."""

    train: Prompt
    benchmark: Prompt
    match: Match
    overlap: float  # share of the benchmark prompt's n-grams; 1 for equal ones


@dataclass(frozen=True)
class LeakReport:
    """All that was found."""

    leaks: tuple[Leak, ...]  # in the order of training rows
    prompts: int
    rows: int
    unread: int  # training rows in which no prompt could be read; `metamorph data check` says why


def words(text: str) -> list[str]:
    """Words in lower case, Unicode compatibility forms folded (NFKC), without tags, punctuation and white space."""
    return _WORD.findall(unicodedata.normalize("NFKC", TAG.sub(" ", text)).casefold())


def ngrams(found: Sequence[str], n: int) -> set[int]:
    """Hashes of the n-grams of words; of fewer words than n, of all of them."""
    size = min(n, len(found))
    return {digest(" ".join(found[start : start + size]).encode()) for start in range(len(found) - size + 1)} if found else set()


@dataclass
class Benchmark:
    """Prompts, found again by hash.

    Args:
        prompts: what is not to be trained on.
        n: words of an n-gram.
        threshold: containment from which a prompt counts as leaked.

    Raises:
        ConfigError: a number out of range, or no prompts.
    """

    prompts: Sequence[Prompt]
    n: int = 8
    threshold: float = 0.7
    _exact: dict[int, int] = field(default_factory=dict, repr=False)
    _normal: dict[int, int] = field(default_factory=dict, repr=False)
    _grams: dict[int, list[int]] = field(default_factory=dict, repr=False)
    _sizes: dict[int, int] = field(default_factory=dict, repr=False)  # prompt -> n-grams
    _lengths: tuple[int, ...] = ()  # of n-grams: n, and what shorter prompts have

    def __post_init__(self) -> None:
        if self.n < 1 or not 0 < self.threshold <= 1:
            raise ConfigError(f"n-grams of {self.n} words, threshold {self.threshold} but at least 1, and above 0 to 1, are needed (leak).")
        if not self.prompts:
            raise ConfigError("0 prompts but at least 1 is needed (leak). Name a file of prompts.")
        lengths = set()
        for number, prompt in enumerate(self.prompts):
            found = words(prompt.text)
            self._exact.setdefault(_hash(_bare(prompt.text)), number)
            self._normal.setdefault(_hash(" ".join(found)), number)
            if len(found) >= SHORTEST:
                grams = ngrams(found, self.n)
                lengths.add(min(self.n, len(found)))
                self._sizes[number] = len(grams)
                for gram in grams:
                    self._grams.setdefault(gram, []).append(number)
        self._lengths = tuple(sorted(lengths))

    def leak_of(self, asked: Prompt) -> Leak | None:
        """The prompt that a training turn holds, or most nearly holds."""
        text = _bare(asked.text)
        if not text:
            return None
        if (number := self._exact.get(_hash(text))) is not None:
            return Leak(asked, self.prompts[number], "exact", 1.0)
        found = words(text)
        if found and (number := self._normal.get(_hash(" ".join(found)))) is not None:
            return Leak(asked, self.prompts[number], "normalised", 1.0)
        shared: Counter[int] = Counter()
        for gram in {gram for size in self._lengths if size <= len(found) for gram in ngrams(found, size)}:
            shared.update(self._grams.get(gram, ()))
        best = max(shared, key=lambda one: (shared[one] / self._sizes[one], -one), default=None)
        if best is None or (overlap := shared[best] / self._sizes[best]) < self.threshold:
            return None
        return Leak(asked, self.prompts[best], "n-gram", overlap)


def find_leaks(source: ExampleSource, benchmark: Benchmark, *, jobs: int = 1, told: Told | None = None) -> LeakReport:
    """Compare every user's turn of every row with the benchmark. No image is opened.

    Args:
        source: training rows.
        benchmark: the prompts.
        jobs: processes; 1 = this one.
        told: is told (rows done, rows in all).
    """
    chunks = [range(start, min(start + _CHUNK, len(source))) for start in range(0, len(source), _CHUNK)]
    leaks: list[Leak] = []
    unread = done = 0
    for found, bad in _searched(source, benchmark, chunks, jobs):
        leaks += found
        unread, done = unread + bad, min(done + _CHUNK, len(source))
        if told is not None:
            told(done, len(source))
    return LeakReport(tuple(leaks), len(benchmark.prompts), len(source), unread)


Searched = tuple[list[Leak], int]


def _searched(source: ExampleSource, benchmark: Benchmark, chunks: list[range], jobs: int) -> Iterator[Searched]:
    if jobs <= 1 or len(chunks) < 2:
        yield from (_search(source, benchmark, chunk) for chunk in chunks)
        return
    workers = min(jobs, len(chunks))
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=(source, benchmark)) as pool:
        yield from pool.map(_search_in_worker, chunks)


_workers_own: list[tuple[ExampleSource, Benchmark]] = []  # in a worker process: what it searches; empty everywhere else


def _start_worker(source: ExampleSource, benchmark: Benchmark) -> None:
    _workers_own.append((source, benchmark))


def _search_in_worker(rows: range) -> Searched:
    return _search(*_workers_own[0], rows)


def _search(source: ExampleSource, benchmark: Benchmark, rows: range) -> Searched:
    leaks, unread = [], 0
    for row in rows:
        asked = asked_in(source, row)
        unread += not asked
        leaks += [leak for prompt in asked or () if (leak := benchmark.leak_of(prompt)) is not None]
    return leaks, unread


def asked_in(source: ExampleSource, row: int) -> list[Prompt] | None:
    """The texts of a row's user turns and captions, or None where it cannot be read. Of files only text fields are read."""
    if isinstance(source, FileSource):
        raw = source.rows.row_or_fault(row)
        return None if isinstance(raw, Fault) else [Prompt(text, raw.place) for text in _user_texts(raw.values, source)]
    try:
        return _of_example(source[row])
    except MetaMorphError:
        return None


def _of_example(example: Example) -> list[Prompt]:
    return [Prompt(message.text, example.place) for message in example.messages if message.role == "user"]


def _user_texts(values: Any, source: FileSource) -> Iterator[str]:
    """What users say in a raw row of any format, and captions."""
    named = {ours: values.get(theirs) for ours, theirs in source.settings.columns.items()}
    row = {**values, **named}
    for name in ("conversations", "messages"):
        for turn in row.get(name) or () if isinstance(row.get(name), list) else ():
            if isinstance(turn, dict) and str(turn.get("from", turn.get("role"))).lower() in ("human", "user"):
                yield _said(turn.get("value", turn.get("content")))
    for name in dict.fromkeys((*PROMPT_FIELDS, *CAPTIONS)):
        if isinstance(row.get(name), str):
            yield row[name]


def _said(content: Any) -> str:
    if isinstance(content, list):
        return " ".join(str(part.get("text") or "") if isinstance(part, dict) else str(part) for part in content)
    return content if isinstance(content, str) else ""


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a benchmark: a text file with one on each line; JSON or JSON lines with a field of `PROMPT_FIELDS`; or any data file.

    Raises:
        RecordError: the file cannot be read, or holds none.
    """
    if path.suffix.lower() in (".txt", ".md", ""):
        found = list(_lines(path)) if path.is_file() else None
    else:
        found = None
    if found is None:
        source = open_source(path, whole_files=False)
        found = [prompt for row in range(len(source)) for prompt in asked_in(source, row) or () if prompt.text.strip()]
    if not found:
        raise RecordError(f"0 prompts but at least 1 is needed ({path}). Give one on each line, or rows with {', '.join(PROMPT_FIELDS)}.")
    return found


def _lines(path: Path) -> Iterator[Prompt]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"a file that cannot be read ({error}) but prompts in UTF-8 are needed ({path}). Check the file.") from error
    yield from (Prompt(line.strip(), f"{path}:{number}") for number, line in enumerate(text.split("\n"), start=1) if line.strip())


def to_json(reports: Sequence[LeakReport]) -> dict[str, Any]:
    """Plain JSON: {"version", "leaks": [{"match", "overlap", "train": {"place", "text"}, "benchmark"}], "rows", "prompts", "unread"}."""
    leaks = [
        {"match": leak.match, "overlap": round(leak.overlap, 4), "train": vars(leak.train), "benchmark": vars(leak.benchmark)}
        for report in reports
        for leak in report.leaks
    ]
    prompts = max((report.prompts for report in reports), default=0)
    rows, unread = sum(report.rows for report in reports), sum(report.unread for report in reports)
    return {"version": 1, "leaks": leaks, "rows": rows, "prompts": prompts, "unread": unread}


def _bare(text: str) -> str:
    """Text without tags and the white space around it."""
    return TAG.sub("", text).strip()


def _hash(text: str) -> int:
    return digest(text.encode(errors="replace"))
