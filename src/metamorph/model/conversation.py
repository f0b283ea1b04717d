"""Messages as the LLM's own chat template writes them, and which characters of that text are targets.

Every part is rendered as a mark of private-use characters, so that a template never sees (and cannot change) what people said, and the
exact place of each part is known. A target runs to the end of the first special token after an answer's last part. It starts

- where the template's `{% generation %}` block does, or where the prompt ends, if that is inside the block;
- without such blocks where the prompt ends: the rendering of the earlier turns with a generation prompt.

Some templates write a turn differently once another follows (Qwen3 drops what it wrote before an earlier answer; Mistral moves the system
turn to the last question). A model would then be trained on other prompts than it is asked with. For these the conversation is put
together from its prompts: each turn stays as it was when it was answered, in training and in use alike. Templates that can think are told
not to (`enable_thinking=False`: their empty thinking block is part of the prompt). Templates that ask for today's date get a fixed one.

Text is tokenized as one string, as the plain rendering would be, with two exceptions. It is cut where an answer starts, because at
inference the prompt ends there (not for tokenizers that write a space before every text). And text of a person that spells a special token
is cut out and tokenized with special tokens switched off: it stays text.
"""

import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cache
from itertools import pairwise
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from metamorph.errors import TemplateError
from metamorph.messages import ImagePart, Message, TextPart, VideoPart
from metamorph.model.configuration import IMAGE_END_TOKEN, IMAGE_START_TOKEN, IMAGE_TOKEN

Span = tuple[int, int]
"""Characters from the first number up to, not including, the second."""

_MARK = re.compile("\ue000([0-9]+)\ue001")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")

TEMPLATE_DATE = date(2024, 7, 26)
"""What a template that asks for today's date is told, so that a conversation is the same sequence every day. Llama 3's own default."""


@dataclass(frozen=True)
class RenderedConversation:
    """A conversation as text, each image as `<image_start><image><image_end>`."""

    text: str
    said: tuple[Span, ...]  # the text parts, which never hold special tokens
    targets: tuple[Span, ...]  # one for each turn of the assistant, its end of turn included


@dataclass(frozen=True)
class SpecialTokens:
    """What must be known of a tokenizer, gathered once."""

    ids: frozenset[int]
    pattern: re.Pattern[str]  # any of them, the longest first
    writes_prefix_space: bool  # a space stands before every text, even one that continues another

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "SpecialTokens":
        """Read them off a tokenizer."""
        special = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        contents = sorted(special.values(), key=len, reverse=True)
        first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[:1]
        return cls(frozenset(special), re.compile("|".join(map(re.escape, contents)) or r"(?!)"), bool(first) and first[0][0] in "▁Ġ ")


@dataclass(frozen=True)
class TokenizedText:
    """Ids and the first character of each."""

    ids: list[int]
    starts: list[int]


# Fast tokenizers keep `split_special_tokens` as a setting of the whole tokenizer, and a compiled template keeps the blocks that it is
# writing; a stream reads ahead in a thread.
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the variables that it is given: the tokenizer's special tokens, and settings that override `enable_thinking=False`."""

    source: str
    variables: Mapping[str, Any] = field(default_factory=dict)

    @property
    def marks_answers(self) -> bool:
        """Whether it has `{% generation %}` blocks."""
        return _GENERATION.search(self.source) is not None

    def write(self, marked: Sequence[dict[str, str]], add_generation_prompt: bool, place: str) -> tuple[str, list[Span]]:
        """Text of a conversation, and its generation blocks.

        Raises:
            TemplateError: the template refuses the conversation.
        """
        try:
            with _ONE_AT_A_TIME:
                texts, blocks = render_jinja_template(
                    conversations=[list(marked)],
                    chat_template=_with_fixed_date(self.source),
                    return_assistant_tokens_mask=self.marks_answers,
                    add_generation_prompt=add_generation_prompt,
                    **{"enable_thinking": False, **self.variables},
                )
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in marked)
            raise TemplateError(
                f"{error} but turns {roles} were to be written ({place}). Use roles that the chat template knows."
            ) from error
        return texts[0], [(int(start), int(end)) for start, end in blocks[0]] if self.marks_answers else []


def render(
    template: ChatTemplate, messages: Sequence[Message], special: SpecialTokens, *, add_generation_prompt: bool, place: str
) -> RenderedConversation:
    """Write a conversation with a chat template.

    Raises:
        TemplateError: the template refuses the conversation, drops or reorders a part, or does not show where an answer starts and ends.
    """
    parts = [(turn, part) for turn, message in enumerate(messages) for part in _flat_parts(message)]
    marked = [{"role": message.role, "content": ""} for message in messages]
    for number, (turn, _) in enumerate(parts):
        marked[turn]["content"] += f"\ue000{number}\ue001"
    answers = [turn for turn, message in enumerate(messages) if message.role == "assistant"]
    text, blocks = template.write(marked, add_generation_prompt, place)
    if template.marks_answers:
        starts = [_start_in_block(template, marked, turn, text, blocks, place) for turn in answers]
    else:
        prompts = [template.write(marked[:turn], True, place)[0] for turn in answers]
        starts = [len(prompt) for prompt in prompts]
        if not all(text.startswith(prompt) for prompt in prompts):
            text, starts = _as_answered(template, marked, answers, prompts, text, place)
    marks = list(_MARK.finditer(text))
    if (found := [int(mark[1]) for mark in marks]) != list(range(len(parts))):
        raise TemplateError(
            f"parts {found} in the rendered text but parts 0 to {len(parts) - 1} in order were expected ({place}). "
            "Use a chat template that writes each turn's content once, unchanged."
        )
    last = {owner: mark.end() for mark, (owner, _) in zip(marks, parts, strict=True)}
    targets = [(start, _end_of_turn(special, text, last[turn], blocks, place)) for turn, start in zip(answers, starts, strict=True)]
    return _fill_in(text, marks, [part for _, part in parts], targets)


def tokenize(tokenizer: PreTrainedTokenizerBase, rendered: RenderedConversation, special: SpecialTokens, place: str) -> TokenizedText:
    """Ids of a rendered conversation; what people said never yields a special token.

    Raises:
        TemplateError: the tokenizer cannot keep a spelled special token as text.
    """
    cuts = set() if special.writes_prefix_space else {start for start, _ in rendered.targets}
    anchor = _ANCHOR if special.writes_prefix_space else ""
    whole = _tokenize_segments(tokenizer, rendered.text, cuts, set(), anchor)
    spelled = _spelled_specials(whole, rendered, special)
    if not spelled:
        return whole
    cuts |= {edge for span in spelled for edge in span}
    result = _tokenize_segments(tokenizer, rendered.text, cuts, spelled, anchor)
    if left := _spelled_specials(result, rendered, special):
        words = rendered.text[slice(*min(left))]
        raise TemplateError(f"{words!r} became a special token but text was expected ({place}). Use a tokenizer that can split them.")
    return result


@cache
def _with_fixed_date(source: str) -> str:
    return _TODAY.sub(lambda call: json.dumps(TEMPLATE_DATE.strftime(call[2])), source)


def _start_in_block(template: ChatTemplate, marked: list[dict[str, str]], turn: int, text: str, blocks: list[Span], place: str) -> int:
    first = _MARK.match(marked[turn]["content"])
    assert first is not None, "every turn has a part"
    at = text.find(first[0])
    around = [start for start, end in blocks if start <= at < end]
    if not around:
        raise TemplateError(f"turn {turn + 1} outside of {{% generation %}} but answers inside were expected ({place}). Mend the template.")
    if around[0] == at:
        return at
    prompt, _ = template.write(marked[:turn], True, place)  # the block may enclose what the prompt ends with
    return len(prompt) if text.startswith(prompt) and around[0] <= len(prompt) <= at else around[0]


def _as_answered(
    template: ChatTemplate, marked: list[dict[str, str]], answers: list[int], prompts: list[str], whole: str, place: str
) -> tuple[str, list[int]]:
    """The conversation put together from its prompts, and where each answer starts: every turn as it was when it was answered."""
    text, starts, tail = "", [], ""  # tail: what stands behind the content of the last answer so far
    for number, (turn, prompt) in enumerate(zip(answers, prompts, strict=True)):
        text += prompt if not number else _continue(tail, prompt, marked, answers[number - 1], place)
        answered, _ = template.write(marked[: turn + 1], False, place)
        answer = _continue(_behind(prompt, marked[turn - 1]), answered, marked, turn - 1, place)
        starts.append(len(text))
        text += answer
        tail = _behind(answer, marked[turn])
    return text + _continue(tail, whole, marked, answers[-1], place), starts


def _behind(text: str, turn: dict[str, str]) -> str:
    """What the template wrote behind a turn's content."""
    return text.rpartition(turn["content"])[2]


def _continue(known: str, text: str, marked: list[dict[str, str]], turn: int, place: str) -> str:
    """What follows `known` in a text behind the content of a turn."""
    rest = _behind(text, marked[turn])
    if not rest.startswith(known):
        raise TemplateError(
            f"{known[-60:]!r} after turn {turn + 1} in one prompt but {rest[: len(known)][-60:]!r} in another ({place}). "
            "Mark answers in the chat template with {% generation %}."
        )
    return rest[len(known) :]


def _end_of_turn(special: SpecialTokens, text: str, last: int, blocks: list[Span], place: str) -> int:
    following = _MARK.search(text, last)
    found = special.pattern.search(text, last, following.start() if following else len(text))
    if found is None:
        after = text[last : last + 40]
        raise TemplateError(f"{after!r} after an answer but an end-of-turn token was expected ({place}). Mend the template.")
    if blocks and not any(start < last and found.end() <= end for start, end in blocks):
        raise TemplateError(
            f"{found[0]!r} outside of {{% generation %}} but the end of turn inside was expected ({place}). "
            "Move {% endgeneration %} behind the end-of-turn token: the model must learn to stop."
        )
    return found.end()


def _flat_parts(message: Message) -> list[TextPart | ImagePart]:
    nested = [part.frames if isinstance(part, VideoPart) else (part,) for part in message.parts]
    return [part for parts in nested for part in parts]


def _fill_in(text: str, marks: list[re.Match[str]], parts: list[TextPart | ImagePart], targets: list[Span]) -> RenderedConversation:
    pieces, said, growth, length = [], [], [], 0
    end = 0
    for mark, part in zip(marks, parts, strict=True):
        words = part.text if isinstance(part, TextPart) else IMAGE_START_TOKEN + IMAGE_TOKEN + IMAGE_END_TOKEN
        pieces += [text[end : mark.start()], words]
        length += mark.start() - end
        if isinstance(part, TextPart):
            said.append((length, length + len(words)))
        length += len(words)
        end = mark.end()
        growth.append((mark.end(), len(words) - len(mark[0])))
    moved = [tuple(place + sum(more for mark_end, more in growth if mark_end <= place) for place in span) for span in targets]
    return RenderedConversation("".join([*pieces, text[end:]]), tuple(said), tuple((start, stop) for start, stop in moved))


# Stands before a segment that continues a text, for tokenizers that would write a space there; no word begins with it.
_ANCHOR = "\n"


def _tokenize_segments(tokenizer: PreTrainedTokenizerBase, text: str, cuts: set[int], literal: set[Span], anchor: str) -> TokenizedText:
    ids, starts = [], []
    for begin, end in pairwise(sorted({0, len(text)} | cuts)):  # one by one: a batch would start threads, which costs more than it saves
        before = anchor if begin else ""
        with _ONE_AT_A_TIME:
            encoded = tokenizer(
                before + text[begin:end],
                add_special_tokens=False,
                return_offsets_mapping=True,
                split_special_tokens=(begin, end) in literal,
                verbose=False,
            )
        for token, (start, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if start >= len(before):
                ids.append(token)
                # Byte-level tokenizers report a token of spaces as an empty span behind them: keep it inside its segment.
                starts.append(min(begin + start - len(before), end - 1))
    return TokenizedText(ids, starts)


def _spelled_specials(tokens: TokenizedText, rendered: RenderedConversation, special: SpecialTokens) -> set[Span]:
    ends = [*tokens.starts[1:], len(rendered.text)]
    places = [(start, end) for token, start, end in zip(tokens.ids, tokens.starts, ends, strict=True) if token in special.ids]
    return {span for span in rendered.said if span[0] < span[1] and any(start < span[1] and span[0] < end for start, end in places)}
