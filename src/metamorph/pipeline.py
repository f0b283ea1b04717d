"""Messages in; a stream of events, or messages, out: model, processor and decoder behind one call.

    pipe = MetaMorphPipeline.from_pretrained("checkpoint", decoder="decoder")
    reply = pipe("Generate an image of a red star")
    reply.images[0].save("star.png")        # the file says which model drew it, from which seed and how: see `provenance`
    later = pipe([Message.user("Generate an image of a red star"), reply.message, Message.user("What colour is it?")])

The later question is answered from the visual tokens that the model drew (`reply.message` holds them), never from the pixels.

Axes: n images (flat), k visual tokens per image, v vision width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import torch
from huggingface_hub import snapshot_download
from jaxtyping import Float
from torch import Tensor
from transformers.utils import cached_file

from metamorph.batch import TokenSequence
from metamorph.device import find_device
from metamorph.errors import ConfigError, ContextLengthError, RecordError
from metamorph.messages import Message, validate_messages
from metamorph.model.events import Answer, Event, ImageEnd
from metamorph.model.generation import generate, stream
from metamorph.model.state import DecodingOptions, FinishReason
from metamorph.places import DECODER_INDEX, check_source
from metamorph.provenance import Drawing, Part, Provenance, transcript

if TYPE_CHECKING:
    from metamorph.decoder import VisualDecoderPipeline
    from metamorph.model import MetaMorph, MetaMorphProcessor

Conversation: TypeAlias = str | Message | Sequence[Message]
"""A question, a user's message, or a whole conversation that ends with one."""

DECODER = "decoder"
"""Folder of a model's own decoder."""
DECODER_BATCH = 16
"""Images that are decoded in one call."""


@dataclass(frozen=True, eq=False)
class Picture:
    """An image that the model drew, as pixels. It follows the `ImageEnd` with the same index if there is a decoder."""

    index: int
    image: Drawing = field(repr=False)


PipelineEvent: TypeAlias = Event | Picture


@dataclass(frozen=True, eq=False)
class Reply:
    """The answer to one conversation."""

    message: Message  # append it to the conversation to go on; its image parts hold visual tokens
    images: list[Drawing] = field(repr=False)  # the same images as PIL images that know where they come from; empty without a decoder
    reason: FinishReason  # "eos": the model ended its turn
    token_ids: tuple[int, ...] = field(repr=False)
    events: tuple[PipelineEvent, ...] = field(repr=False)

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return self.message.text

    @property
    def visual_tokens(self) -> tuple[Float[Tensor, "k v"], ...]:
        """The visual tokens of each image that was drawn, in order."""
        return tuple(part.visual_tokens for part in self.message.images if part.visual_tokens is not None)


class MetaMorphPipeline:
    """Answers conversations with text and images."""

    def __init__(self, model: MetaMorph, processor: MetaMorphProcessor, decoder: VisualDecoderPipeline | None = None) -> None:
        self.model = model
        self.processor = processor
        self.decoder = decoder
        self.model_part = Part.of_config(type(model).__name__, model.config.to_dict())
        self.decoder_part = None if decoder is None else Part.of_config(type(decoder).__name__, _settings(decoder))

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        decoder: str | Path | bool | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> MetaMorphPipeline:
        """Load what `save_pretrained` wrote.

        Args:
            directory: model and processor: a directory or a name on the hub.
            decoder: the visual decoder: a directory or a name on the hub; by default the folder `decoder` beside the model, if there is
                one. Without it (False: even if there is one) replies hold visual tokens but no pixels.
            device: by default `cuda` if there is one, else `mps`, else `cpu`.
            dtype: of the model; the decoder stays in float32.

        Raises:
            CheckpointError: a directory is missing or incomplete.
            ConfigError: there is no such device.
        """
        from metamorph.model import MetaMorph, MetaMorphProcessor

        device = find_device(device)  # before anything is loaded, as is the decoder's place
        if isinstance(decoder, str | Path):
            check_source(decoder, "a decoder", index=DECODER_INDEX)
        model = MetaMorph.from_pretrained(directory, dtype=dtype).eval()
        processor = MetaMorphProcessor.from_pretrained(directory)
        visual_decoder, place = None, find_decoder(directory) if decoder is None or decoder is True else decoder
        if place:
            from metamorph.decoder import VisualDecoderPipeline

            visual_decoder = VisualDecoderPipeline.from_pretrained(place)
        pipeline = cls(model, processor, visual_decoder)
        pipeline.model_part = Part.loaded(directory, model.config.to_dict(), getattr(model.config, "_commit_hash", None))
        if place:
            pipeline.decoder_part = Part.loaded(str(place), _settings(visual_decoder))
        return pipeline.to(device)

    def to(self, device: str | torch.device) -> MetaMorphPipeline:
        """Move model and decoder; returns the pipeline itself.

        Raises:
            ConfigError: there is no such device.
        """
        device = find_device(device)
        self.model.to(device)  # pyright: ignore[reportArgumentType]
        if self.decoder is not None:
            self.decoder.to(device)
        return self

    @overload
    def __call__(self, conversations: Conversation, options: DecodingOptions | None = None, **settings: Any) -> Reply: ...
    @overload
    def __call__(
        self, conversations: Sequence[str] | Sequence[Sequence[Message]], options: DecodingOptions | None = None, **settings: Any
    ) -> list[Reply]: ...
    def __call__(
        self,
        conversations: Conversation | Sequence[Conversation],
        options: DecodingOptions | None = None,
        *,
        seed: int | Sequence[int] = 0,
        steps: int = 10,
        guidance_scale: float = 1.0,
        max_rows: int = 32,
        keep_prompt: bool = False,
        **changes: Any,
    ) -> Reply | list[Reply]:
        """Answer one conversation (a string, a message, or a list of messages) or a list of conversations.

        Args:
            conversations: each ends with a user's message. A list of strings, or of lists, is a list of conversations.
            options: how to decode; single options may also be given by name, such as `temperature=0.7`.
            seed: for all conversations, or one for each; an answer depends on its own seed only. It seeds text and pixels.
            steps: denoising steps per image.
            guidance_scale: of the decoder; 1 is without guidance.
            max_rows: conversations answered at a time.
            keep_prompt: keep the conversation's text with the images it led to, not only its hash (see `provenance`).
            changes: fields of `DecodingOptions`.

        Raises:
            RecordError: a conversation is empty, malformed, or does not end with the user.
            MediaError: an image cannot be used.
            ContextLengthError: a conversation is longer than the context.
            ConfigError: an unknown or impossible option.
        """
        many, batch = _as_batch(conversations)
        prompts = [
            self.encode(messages, f"conversation {i + 1} of {len(batch)}" if many else "conversation") for i, messages in enumerate(batch)
        ]
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        options = (options or DecodingOptions()).updated(**changes)
        answers = generate(self.model, self.processor, prompts, options, seeds=seeds, max_rows=max_rows)
        drawn = []
        for messages, answer, one in zip(batch, answers, seeds, strict=True):
            origin = self._origin(one, steps, guidance_scale, options, messages, keep_prompt)
            drawn += [(tokens, replace(origin, image=index)) for index, tokens in enumerate(answer.visual_tokens)]
        pictures = iter(self._decode(drawn))
        replies = [_reply(answer, lambda: next(pictures, None)) for answer in answers]
        return replies if many else replies[0]

    def stream(
        self,
        conversation: Conversation,
        options: DecodingOptions | None = None,
        *,
        seed: int = 0,
        steps: int = 10,
        guidance_scale: float = 1.0,
        keep_prompt: bool = False,
        **changes: Any,
    ) -> Iterator[PipelineEvent]:
        """Answer one conversation and tell what happens while it happens; arguments and errors as for a call.

        With a decoder each `ImageEnd` is followed by a `Picture`.
        """
        many, batch = _as_batch(conversation)
        if many:
            raise RecordError(f"{len(batch)} conversations but 1 is needed (stream). Call the pipeline itself for several.")
        prompt = self.encode(batch[0], "conversation")
        options = (options or DecodingOptions()).updated(**changes)
        origin = self._origin(seed, steps, guidance_scale, options, batch[0], keep_prompt)
        for _, event in stream(self.model, self.processor, [prompt], options, seeds=seed):
            yield event
            if isinstance(event, ImageEnd) and self.decoder is not None:
                yield Picture(event.index, self._decode([(event.visual_tokens, replace(origin, image=event.index))])[0])

    def encode(self, messages: Sequence[Message], place: str = "conversation") -> TokenSequence:
        """A conversation as the prompt of an answer.

        Raises:
            RecordError, MediaError, ContextLengthError: as for a call.
        """
        validate_messages(messages, place)
        if messages[-1].role != "user":
            raise RecordError(f"a last message by the {messages[-1].role} but one by the user is needed ({place}). Add the user's turn.")
        context, per_image = self.model.config.text_config.max_position_embeddings, self.model.config.num_visual_tokens + 2
        num_images = sum(len(message.images) for message in messages)
        if num_images * per_image >= context:  # before thousands of images are opened
            raise ContextLengthError(
                f"{num_images} images x {per_image} positions but fewer than {context} positions are needed ({place}). "
                f"Send at most {(context - 1) // per_image} images."
            )
        return self.processor.encode(messages, add_generation_prompt=True, id=place)

    def decode_images(
        self, visual_tokens: Float[Tensor, "n k v"], *, seeds: Sequence[int], steps: int = 10, guidance_scale: float = 1.0
    ) -> list[Drawing]:
        """Draw images from visual tokens, predicted or encoded, each with its own seed.

        Raises:
            ConfigError: there is no decoder.
        """
        if self.decoder is None:
            raise ConfigError("0 decoders but 1 is needed to draw (pipeline). Give `decoder` to from_pretrained.")
        origin = replace(self._origin(0, steps, guidance_scale), model=None)
        return self._decode([(tokens, replace(origin, seed=seed)) for tokens, seed in zip(visual_tokens, seeds, strict=True)])

    def _origin(
        self,
        seed: int,
        steps: int,
        guidance_scale: float,
        options: DecodingOptions | None = None,
        messages: Sequence[Message] = (),
        keep_prompt: bool = False,
    ) -> Provenance:
        """What is to be said of the images of one answer."""
        asked = transcript(messages)
        return Provenance(
            model=self.model_part,
            decoder=self.decoder_part,
            seed=seed,
            steps=steps,
            guidance_scale=guidance_scale,
            decoding={} if options is None else asdict(options),
            prompt_sha256=hashlib.sha256(asked.encode()).hexdigest() if asked else "",
            prompt=asked if keep_prompt else None,
            libraries={"torch": torch.__version__, **({} if self.decoder is None else {"diffusers": _diffusers_version()})},
        )

    def _decode(self, drawn: Sequence[tuple[Float[Tensor, "k v"], Provenance]]) -> list[Drawing]:
        """The images of visual tokens, all with the same protocol."""
        images: list[Drawing] = []
        for start in range(0, len(drawn) if self.decoder is not None else 0, DECODER_BATCH):
            tokens, origins = zip(*drawn[start : start + DECODER_BATCH], strict=True)
            assert self.decoder is not None
            protocol = {"num_inference_steps": origins[0].steps, "guidance_scale": origins[0].guidance_scale}
            pictures = self.decoder(torch.stack(tokens), seeds=[one.seed + one.image for one in origins], **protocol)
            assert isinstance(pictures, list)  # PIL, as `output_type` is by default
            images += [Drawing.of(picture, origin) for picture, origin in zip(pictures, origins, strict=True)]
        return images


@cache
def _diffusers_version() -> str:
    """Read from the files of the installation once, not for every answer."""
    return version("diffusers")


def _settings(decoder: VisualDecoderPipeline | None) -> dict[str, Any]:
    """The configs of a decoder's parts."""
    parts = {} if decoder is None else decoder.components
    return {name: dict(part.config) for name, part in parts.items() if part is not None}


def find_decoder(model: str | Path) -> Path | None:
    """The decoder that belongs to a model: the folder `decoder` beside its weights, in a directory or on the hub. None without one."""
    if Path(model).is_dir():
        return Path(model) / DECODER if (Path(model) / DECODER / DECODER_INDEX).is_file() else None
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        index = cached_file(str(model), f"{DECODER}/{DECODER_INDEX}", **quiet)
    except (OSError, ValueError):  # no such model: loading it says so
        return None
    if index is None:
        return None
    return Path(snapshot_download(str(model), allow_patterns=[f"{DECODER}/*"])) / DECODER


def _reply(answer: Answer, next_picture: Callable[[], Drawing | None]) -> Reply:
    """An answer with its pictures, each behind the end of its image."""
    events: list[PipelineEvent] = []
    images: list[Drawing] = []
    for event in answer.events:
        events.append(event)
        if isinstance(event, ImageEnd) and (image := next_picture()) is not None:
            events.append(Picture(event.index, image))
            images.append(image)
    return Reply(answer.message, images, answer.reason, answer.token_ids, tuple(events))


def _as_batch(conversations: Conversation | Sequence[Conversation]) -> tuple[bool, list[Sequence[Message]]]:
    """Whether several conversations were given, and each as a list of messages."""
    if isinstance(conversations, (str, Message)):
        return False, [_as_messages(conversations)]
    if all(isinstance(item, Message) for item in conversations):  # an empty list too: an empty conversation, refused later
        return False, [_as_messages(conversations)]  # pyright: ignore[reportArgumentType]
    return True, [_as_messages(item) for item in conversations]


def _as_messages(conversation: Conversation) -> Sequence[Message]:
    if isinstance(conversation, str):
        return [Message.user(conversation)]
    return [conversation] if isinstance(conversation, Message) else list(conversation)
