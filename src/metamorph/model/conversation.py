"""Messages as the LLM's own chat template writes them, and which characters of that text are targets.

Every part is rendered as a mark of private-use characters, so that a template never sees (and cannot change) what people said, and the
exact place of each part is known. Targets are found in one of two ways:

- The template has `{% generation %}`: a target runs from the start of that block to the end of the first special token after the last part.
- It has not: a target starts where the rendering of the earlier turns with a generation prompt ends, and runs to that same special token.

Text is tokenized as one string, as the plain rendering would be, with two exceptions. It is cut where an answer starts, because at
inference the prompt ends there (not for tokenizers that write a space before every text). And text of a person that spells a special token
is cut out and tokenized with special tokens switched off: it stays text.
"""

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

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


def render(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: Sequence[Message],
    special: SpecialTokens,
    *,
    add_generation_prompt: bool,
    place: str,
) -> RenderedConversation:
    """Write a conversation with a chat template.

    Raises:
        TemplateError: the template refuses the conversation, drops or reorders a part, or does not show where an answer starts and ends.
    """
    parts = [(turn, part) for turn, message in enumerate(messages) for part in _flat_parts(message)]
    marked = [{"role": message.role, "content": ""} for message in messages]
    for number, (turn, _) in enumerate(parts):
        marked[turn]["content"] += f"\ue000{number}\ue001"
    text, blocks = _apply(tokenizer, template, marked, add_generation_prompt, place)
    marks = list(_MARK.finditer(text))
    if (found := [int(mark[1]) for mark in marks]) != list(range(len(parts))):
        raise TemplateError(
            f"parts {found} in the rendered text but parts 0 to {len(parts) - 1} in order were expected ({place}). "
            "Use a chat template that writes each turn's content once, unchanged."
        )
    answers = [turn for turn, message in enumerate(messages) if message.role == "assistant"]
    targets = []
    for turn in answers:
        own = [mark.span() for mark, (owner, _) in zip(marks, parts, strict=True) if owner == turn]
        start = _answer_start(tokenizer, template, marked, turn, text, blocks, own[0][0], place)
        targets.append((start, _end_of_turn(special, text, own[-1][1], blocks, place)))
    return _fill_in(text, marks, [part for _, part in parts], targets)


def tokenize(tokenizer: PreTrainedTokenizerBase, rendered: RenderedConversation, special: SpecialTokens, place: str) -> TokenizedText:
    """Ids of a rendered conversation; what people said never yields a special token.

    Raises:
        TemplateError: the tokenizer cannot keep a spelled special token as text.
    """
    cuts = set() if special.writes_prefix_space else {start for start, _ in rendered.targets}
    whole = _tokenize_segments(tokenizer, rendered.text, cuts, set())
    spelled = _spelled_specials(whole, rendered, special)
    if not spelled:
        return whole
    cuts |= {edge for span in spelled for edge in span}
    result = _tokenize_segments(tokenizer, rendered.text, cuts, spelled)
    if left := _spelled_specials(result, rendered, special):
        words = rendered.text[slice(*min(left))]
        raise TemplateError(f"{words!r} became a special token but text was expected ({place}). Use a tokenizer that can split them.")
    return result


def _apply(
    tokenizer: PreTrainedTokenizerBase, template: str, marked: list[dict[str, str]], add_generation_prompt: bool, place: str
) -> tuple[str, list[Span]]:
    blocks_known = _GENERATION.search(template) is not None
    try:
        texts, blocks = render_jinja_template(
            conversations=[marked],
            chat_template=template,
            return_assistant_tokens_mask=blocks_known,
            add_generation_prompt=add_generation_prompt,
            **tokenizer.special_tokens_map,
        )
    except jinja2.TemplateError as error:
        roles = ", ".join(message["role"] for message in marked)
        raise TemplateError(f"{error} but turns {roles} were to be written ({place}). Use roles that the chat template knows.") from error
    return texts[0], [(int(start), int(end)) for start, end in blocks[0]] if blocks_known else []


def _answer_start(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    marked: list[dict[str, str]],
    turn: int,
    text: str,
    blocks: list[Span],
    first: int,
    place: str,
) -> int:
    if _GENERATION.search(template):
        around = [start for start, end in blocks if start <= first < end]
        if not around:
            raise TemplateError(
                f"turn {turn + 1} outside of {{% generation %}} but answers inside were expected ({place}). Mend the template."
            )
        return around[0]
    prompt, _ = _apply(tokenizer, template, marked[:turn], True, place)
    if not text.startswith(prompt):
        raise TemplateError(
            f"the prompt before turn {turn + 1} is {prompt[-60:]!r} but {text[: len(prompt)][-60:]!r} in the conversation ({place}). "
            "Mark answers in the chat template with {% generation %}."
        )
    return len(prompt)


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


# Fast tokenizers keep `split_special_tokens` as a setting of the whole tokenizer, and a stream reads ahead in a thread.
_ONE_AT_A_TIME = threading.Lock()


def _tokenize_segments(tokenizer: PreTrainedTokenizerBase, text: str, cuts: set[int], literal: set[Span]) -> TokenizedText:
    ids, starts = [], []
    for begin, end in pairwise(sorted({0, len(text)} | cuts)):  # one by one: a batch would start threads, which costs more than it saves
        with _ONE_AT_A_TIME:
            encoded = tokenizer(
                text[begin:end],
                add_special_tokens=False,
                return_offsets_mapping=True,
                split_special_tokens=(begin, end) in literal,
                verbose=False,
            )
        ids += encoded["input_ids"]
        # Byte-level tokenizers report a token of spaces as an empty span behind them: keep it inside its segment.
        starts += [min(begin + start, end - 1) for start, _ in encoded["offset_mapping"]]
    return TokenizedText(ids, starts)


def _spelled_specials(tokens: TokenizedText, rendered: RenderedConversation, special: SpecialTokens) -> set[Span]:
    ends = [*tokens.starts[1:], len(rendered.text)]
    places = [(start, end) for token, start, end in zip(tokens.ids, tokens.starts, ends, strict=True) if token in special.ids]
    return {span for span in rendered.said if span[0] < span[1] and any(start < span[1] and span[0] < end for start, end in places)}
