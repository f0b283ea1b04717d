"""From messages to what the model reads: the tokenizer with its chat template, and the one way in which pixels are prepared.

Axes: t positions, n images, m images that come as pixels, k visual tokens per image, v vision width.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, no_type_check

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from metamorph.batch import IGNORE_INDEX, TokenSequence
from metamorph.errors import AlignmentError, CheckpointError, ContextLengthError, TemplateError
from metamorph.media import Resample, open_image, preprocess
from metamorph.messages import ImagePart, Message, validate_messages
from metamorph.model.configuration import IMAGE_END_TOKEN, IMAGE_START_TOKEN, IMAGE_TOKEN
from metamorph.model.conversation import ChatTemplate, SpecialTokens, render, tokenize
from metamorph.places import check_source


class MetaMorphProcessor(ProcessorMixin):
    """Tokenizer, chat template and image settings, saved and loaded together.

    Args:
        tokenizer: a fast tokenizer that holds `<image_start>`, `<image_end>` and the placeholder `<image>`.
        num_visual_tokens: k.
        image_size: height and width in pixels, as the vision encoder reads them.
        image_mean: subtracted per channel, after scaling to 0..1.
        image_std: divided by, per channel.
        image_resample: filter for resizing; proportions are not kept.
        scaled_jpeg: decode large JPEGs at 1/2, 1/4 or 1/8 of their size, at least twice `image_size`: several times faster for photos of
            thousands of pixels, and slightly other pixels. Off by default: what an image is should not change under a model's feet.
        max_length: positions of the LLM's context; longer sequences are refused, never cut.
        chat_template: by default the tokenizer's own.
        template_variables: for the chat template; thinking is off (`enable_thinking`) unless they say otherwise.

    Raises:
        CheckpointError: the tokenizer lacks the special tokens or cannot tell where tokens stand in the text.
    """

    @no_type_check  # transformers reads the names of the arguments off the code object
    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        num_visual_tokens: int = 64,
        image_size: Sequence[int] = (384, 384),
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        image_resample: Resample = "bicubic",
        max_length: int | None = None,
        chat_template: str | None = None,
        template_variables: dict[str, Any] | None = None,
        scaled_jpeg: bool = False,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template)
        self.num_visual_tokens = num_visual_tokens
        self.image_size = (image_size[0], image_size[1])
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)
        self.image_resample: Resample = image_resample
        self.scaled_jpeg = scaled_jpeg
        self.max_length = max_length
        self.template_variables = dict(template_variables or {})
        if not tokenizer.is_fast:
            found = type(tokenizer).__name__
            raise CheckpointError(f"{found} but a fast tokenizer was expected (MetaMorphProcessor). Convert it to tokenizer.json.")
        self._special = SpecialTokens.of(tokenizer)
        known = {tokenizer.added_tokens_decoder[number].content for number in self._special.ids}
        if missing := [token for token in (IMAGE_TOKEN, IMAGE_START_TOKEN, IMAGE_END_TOKEN) if token not in known]:
            place = tokenizer.name_or_path or "tokenizer"
            raise CheckpointError(f"no special token {', '.join(missing)} but all 3 were expected ({place}). Use `metamorph init`.")

    @property
    def image_token_id(self) -> int:
        """Id of the placeholder under visual tokens."""
        return self._id(IMAGE_TOKEN)

    @property
    def image_start_id(self) -> int:
        """Id of `<image_start>`."""
        return self._id(IMAGE_START_TOKEN)

    @property
    def image_end_id(self) -> int:
        """Id of `<image_end>`."""
        return self._id(IMAGE_END_TOKEN)

    def encode(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        max_length: int | None = None,
        id: str = "",
        source: str = "",
        weight: float = 1.0,
    ) -> TokenSequence:
        """A conversation as the model reads it. Targets: everything that the assistant says, and its ends of turn.

        Raises:
            RecordError: the conversation is malformed, such as empty or with an image in a system turn.
            MediaError: an image cannot be opened.
            AlignmentError: an image part holds visual tokens of another number than this model's.
            ContextLengthError: the conversation is longer than `max_length` (default: the model's context).
            TemplateError: the chat template cannot write it.
        """
        place = id or "messages"
        validate_messages(messages, place)
        rendered = render(self._template(), messages, self._special, add_generation_prompt=add_generation_prompt, place=place)
        tokens = tokenize(self.tokenizer, rendered, self._special, place)
        placeholder, copies = self.image_token_id, [1, self.num_visual_tokens]
        ids, labels = [], []
        for token, start in zip(tokens.ids, tokens.starts, strict=True):
            is_target = token != placeholder and any(first <= start < end for first, end in rendered.targets)
            ids += [token] * copies[token == placeholder]
            labels += [token if is_target else IGNORE_INDEX] * copies[token == placeholder]
        images = [(message.role, image) for message in messages for image in message.images]
        self._check_length(len(ids), len(images), max_length or self.max_length, place)
        input_ids = torch.tensor(ids)
        return TokenSequence(
            input_ids=input_ids,
            labels=torch.tensor(labels),
            is_visual=input_ids == placeholder,
            pixel_values=self._pixels([image for _, image in images]),
            visual_tokens=self._given_tokens([image for _, image in images], place),
            from_pixels=torch.tensor([image.visual_tokens is None for _, image in images], dtype=torch.bool),
            visual_targets=torch.tensor([role == "assistant" for role, _ in images], dtype=torch.bool),
            id=id,
            source=source,
            weight=weight,
        )

    def __call__(self, messages: Sequence[Message], **kwargs: Any) -> TokenSequence:
        """Same as `encode`."""
        return self.encode(messages, **kwargs)

    def decode(self, ids: Sequence[int] | Tensor, *, skip_special_tokens: bool = False) -> str:
        """Text of ids, special tokens included unless skipped."""
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    def prepare_image(self, image: ImagePart) -> Float[np.ndarray, "3 h w"]:
        """Pixels of an image as the encoder reads them."""
        assert image.image is not None, "an image part holds pixels or visual tokens"
        at_least = 2 * max(self.image_size) if self.scaled_jpeg else None
        return preprocess(open_image(image.image, at_least=at_least), self.image_size, self.image_mean, self.image_std, self.image_resample)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "MetaMorphProcessor":  # pyright: ignore
        """Load what `save_pretrained` wrote.

        Raises:
            CheckpointError: a file is missing or broken, or the special tokens are absent.
        """
        check_source(pretrained_model_name_or_path, "a processor", index="processor_config.json", owned=True)
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{error} but a processor was expected ({pretrained_model_name_or_path}). "
                "Give the directory that `metamorph init` or training wrote."
            ) from error

    def _id(self, token: str) -> int:
        return self.tokenizer.convert_tokens_to_ids(token)

    def _template(self) -> ChatTemplate:
        if not isinstance(self.chat_template, str):
            place = self.tokenizer.name_or_path or "tokenizer"
            raise TemplateError(f"no chat template but one was expected ({place}). Use an instruction-tuned LLM or give chat_template.")
        return ChatTemplate(self.chat_template, {**self.tokenizer.special_tokens_map, **self.template_variables})

    def _check_length(self, positions: int, images: int, max_length: int | None, place: str) -> None:
        if max_length is not None and positions > max_length:
            visual = images * self.num_visual_tokens
            raise ContextLengthError(
                f"{positions} positions ({images} images x {self.num_visual_tokens} visual tokens + {positions - visual} others) "
                f"but at most {max_length} are allowed ({place}). Show fewer images, shorten the text, or raise max_length."
            )

    def _pixels(self, images: list[ImagePart]) -> Float[Tensor, "m 3 h w"]:
        arrays = [self.prepare_image(image) for image in images if image.visual_tokens is None]
        if not arrays:
            return torch.zeros(0, 3, *self.image_size)
        return torch.from_numpy(np.stack(arrays))

    def _given_tokens(self, images: list[ImagePart], place: str) -> Float[Tensor, "n k v"] | None:
        given = [image.visual_tokens.detach().float().cpu() for image in images if image.visual_tokens is not None]
        for tokens in given:
            if len(tokens) != self.num_visual_tokens or tokens.shape != given[0].shape:
                raise AlignmentError(
                    f"visual tokens of shape {tuple(tokens.shape)} but ({self.num_visual_tokens}, {given[0].shape[-1]}) was expected "
                    f"({place}). Use visual tokens of this model."
                )
        if not given:
            return None
        rows, empty = iter(given), torch.zeros_like(given[0])
        return torch.stack([empty if image.visual_tokens is None else next(rows) for image in images])


def check_template(processor: MetaMorphProcessor) -> int:
    """Encode a probe conversation of two turns, with images in questions and answers, and compare its targets with what is said.

    Returns:
        The id of the token that ends a turn.

    Raises:
        TemplateError: the targets are not exactly the answers and their ends of turn; the message shows both.
    """
    image = ImagePart(visual_tokens=torch.zeros(processor.num_visual_tokens, 1))
    answers = [("A red square. Here it is:", image, "Anything else?"), (image, "That one is green.")]
    questions = [(image, "What is this? Draw it."), ("And the other?",)]
    turns = [message for q, a in zip(questions, answers, strict=True) for message in (Message.user(*q), Message.assistant(*a))]
    sequence = processor.encode(turns, id="probe conversation")
    kept = (sequence.labels != IGNORE_INDEX) | sequence.is_visual
    edges = torch.cat([torch.tensor([True]), kept[1:] != kept[:-1]]).nonzero().flatten().tolist()
    runs = [sequence.labels[first:end] for first, end in pairwise([*edges, len(kept)])]
    found = [run[run != IGNORE_INDEX] for run in runs if bool((run != IGNORE_INDEX).any())]
    picture = IMAGE_START_TOKEN + IMAGE_END_TOKEN
    expected = ["".join(part if isinstance(part, str) else picture for part in answer) for answer in answers]
    ends = {int(run[-1]) for run in found}
    texts = [processor.decode(run[:-1]) for run in found]
    place = f"probe conversation, chat template of {processor.tokenizer.name_or_path or 'the tokenizer'}"
    if texts != expected or len(ends) != 1 or not ends <= processor._special.ids:
        shown = [processor.decode(run) for run in found]
        raise TemplateError(
            f"targets {shown} but {[text + '<end of turn>' for text in expected]} were expected ({place}). "
            "Mark in the template with {% generation %} what the assistant says and the end-of-turn token, nothing else."
        )
    return ends.pop()
