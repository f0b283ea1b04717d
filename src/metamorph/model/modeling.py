"""MetaMorph: any causal LM and any vision encoder, joined by a projector and a vision head, with two losses.

The state at a position predicts what stands at the next one: a text token through the LLM's own head, or a visual token through the vision
head.

Axes: b sequences, t positions, d LLM width, n images (flat, in reading order), m images given as pixels, k visual tokens per image,
v vision width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Generator, Tensor, nn
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import ModelOutput

from metamorph.batch import IGNORE_INDEX, Batch, DocumentLengths, check_image_counts, check_labels, predictable
from metamorph.errors import AlignmentError
from metamorph.losses import LossTerm, text_cross_entropy
from metamorph.model.attention import PACKED_ATTENTION, position_ids_of, run_packed
from metamorph.model.checkpoint import load_checkpoint
from metamorph.model.configuration import MetaMorphConfig
from metamorph.model.heads import Projector, VisionHead
from metamorph.model.hub import HubModel
from metamorph.model.vision_encoder import VisionEncoder

if TYPE_CHECKING:
    from metamorph.model.generation import AnswerIds
    from metamorph.model.state import DecodingOptions


@dataclass
class MetaMorphOutput(ModelOutput):
    """What `forward` returns; the losses only with labels, the cache only with `use_cache`."""

    loss: Float[Tensor, ""] | None = None  # text_loss + visual_loss_weight * visual_loss
    logits: Float[Tensor, "b kept vocab"] | None = None
    text_loss: Float[Tensor, ""] | None = None  # mean over text targets
    visual_loss: Float[Tensor, ""] | None = None  # mean over visual tokens of target images
    last_hidden_state: Float[Tensor, "b t d"] | None = None
    past_key_values: Cache | None = None
    terms: dict[str, LossTerm] | None = None  # the two losses as (sum, count): "text" and "visual"


class MetaMorph(HubModel):
    """A causal LM that reads and writes visual tokens. Composed of two Hugging Face models; its parts can be reached by name."""

    config_class = MetaMorphConfig
    base_model_prefix = "metamorph"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012  (as transformers declares it)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # each of the two losses has a denominator of its own: Trainer's single count must not divide them
    _tied_weights_keys = {}  # noqa: RUF012  (of its own none: the LLM ties its embeddings; PEFT asks for a mapping)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MetaMorphConfig, with_encoder: bool = True) -> None:
        super().__init__(config)
        self.language_model: PreTrainedModel = AutoModelForCausalLM.from_config(config.text_config)
        if self.language_model.config._attn_implementation == "sdpa" and self.language_model._supports_attention_backend:
            self.language_model.set_attn_implementation(PACKED_ATTENTION)  # SDPA, and documents of a pack kept apart
        self.vision_encoder = VisionEncoder(config, weights=with_encoder)
        self.projector = Projector(config)
        self.vision_head = VisionHead(config)
        self.generation_config = self.language_model.generation_config
        if config.vision_encoder_path is not None:
            self._keys_to_ignore_on_load_missing = [r"^vision_encoder\."]
        if not with_encoder:
            self._keys_to_ignore_on_load_unexpected = [r"^vision_encoder\."]
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The nested models initialise themselves; what is left are the bridges, which start as torch's own linear layers do.
        if isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = 1 / math.sqrt(module.in_features)
                init.uniform_(module.bias, -bound, bound)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> "MetaMorph":  # pyright: ignore
        """Load what `save_pretrained` wrote, in float32 unless `dtype` says otherwise; never from pickle.

        `with_encoder=False` leaves the vision encoder out, for work on visual tokens that are ready.

        Raises:
            CheckpointError: files are missing, broken or of another shape, or the special tokens are absent.
        """
        return load_checkpoint(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)

    def get_decoder(self) -> PreTrainedModel:
        """The transformer inside the language model: embeddings in, states after the final norm out."""
        return self.language_model.get_decoder()

    def get_input_embeddings(self) -> nn.Module:
        """The LLM's token embeddings."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the LLM's token embeddings."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The LLM's own text head."""
        head = self.language_model.get_output_embeddings()
        assert head is not None, "a causal LM has a text head"
        return head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the LLM's text head."""
        self.language_model.set_output_embeddings(new_embeddings)

    def encode_images(self, pixel_values: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n k v"]:
        """Visual tokens of images, float32, without gradient. Pixels may lie anywhere; the tokens come where the encoder is."""
        device = next((parameter.device for parameter in self.vision_encoder.parameters()), pixel_values.device)
        return self.vision_encoder(pixel_values if device.type == "meta" else pixel_values.to(device))  # meta: weights that are offloaded

    def project(self, visual_tokens: Float[Tensor, "... v"]) -> Float[Tensor, "... d"]:
        """Visual tokens as embeddings of the LLM. What the projector writes is what the first layer reads, in every family."""
        embeddings = self.projector(visual_tokens)
        # Granite multiplies all that it reads inside, so that is undone here. Gemma's factor belongs to its embedding module: words only.
        multiplier = getattr(self.language_model.config, "embedding_multiplier", None)
        return embeddings / multiplier if multiplier else embeddings

    def predict_visual_tokens(self, hidden: Float[Tensor, "... d"], generator: Generator | None = None) -> Float[Tensor, "... v"]:
        """The visual tokens that follow states, float32, of norm 1 if visual tokens are."""
        return self.vision_head.predict(hidden, generator)

    def predict_logits(self, hidden: Float[Tensor, "... d"]) -> Float[Tensor, "... vocab"]:
        """The LLM's logits of states, with the scaling and capping that some model families apply after their head."""
        logits = self.get_output_embeddings()(hidden)
        settings = self.language_model.config
        if (scale := getattr(settings, "logit_scale", None)) is not None:  # Cohere
            logits = logits * scale
        if (divisor := getattr(settings, "logits_scaling", None)) is not None:  # Granite
            logits = logits / divisor
        if (cap := getattr(settings, "final_logit_softcapping", None)) is not None:  # Gemma
            logits = torch.tanh(logits / cap) * cap
        return logits

    def gather_visual_tokens(
        self,
        pixel_values: Float[Tensor, "m 3 h w"] | None,
        visual_tokens: Float[Tensor, "n k v"] | None,
        from_pixels: Bool[Tensor, " n"],
    ) -> Float[Tensor, "n k v"] | None:
        """Visual tokens of all images in reading order, float32: encoded where `from_pixels`, else as given. None without an image."""
        if not len(from_pixels):
            return None
        if not bool(from_pixels.any()):
            return visual_tokens.float()
        encoded = self.encode_images(pixel_values)
        if bool(from_pixels.all()):
            return encoded
        return visual_tokens.to(encoded).masked_scatter(from_pixels[:, None, None], encoded)

    def forward(
        self,
        input_ids: Int64[Tensor, "b t"],
        attention_mask: Int[Tensor, "b total"] | Bool[Tensor, "b total"] | None = None,
        position_ids: Int64[Tensor, "b t"] | None = None,
        is_visual: Bool[Tensor, "b t"] | None = None,
        pixel_values: Float[Tensor, "m 3 h w"] | None = None,
        visual_tokens: Float[Tensor, "n k v"] | None = None,
        from_pixels: Bool[Tensor, " n"] | None = None,
        visual_targets: Bool[Tensor, " n"] | None = None,
        document_lengths: DocumentLengths | None = None,
        target_weights: Float[Tensor, "b t"] | None = None,
        labels: Int64[Tensor, "b t"] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        logits_to_keep: int | Int64[Tensor, " kept"] | None = None,
        num_items_in_batch: int | Tensor | None = None,
        drawn_token_dropout: float = 0.0,
        **kwargs: Any,
    ) -> MetaMorphOutput:
        """Read a batch. With `labels` return the losses; logits then only if `logits_to_keep` is given (0: all positions).

        `attention_mask` covers cached positions too. `is_visual` defaults to the placeholder's positions, `from_pixels` to what is given.
        `num_items_in_batch` replaces the number of text targets as the text loss's denominator. `drawn_token_dropout`: see
        `hide_drawn_tokens`.

        Raises:
            AlignmentError: positions, images and visual tokens do not fit, or labels or `visual_targets` are missing.
        """
        kwargs = {name: value for name, value in kwargs.items() if value is not None}  # PEFT names all that a causal LM may take
        is_visual = self._find_visual(input_ids) if is_visual is None else is_visual
        from_pixels = _default_from_pixels(pixel_values, visual_tokens, is_visual) if from_pixels is None else from_pixels
        check_image_counts(is_visual, pixel_values, visual_tokens, from_pixels, "MetaMorph.forward")
        check_labels(labels, visual_targets, self.training)
        tokens = self.gather_visual_tokens(pixel_values, visual_tokens, from_pixels)
        hide = drawn_token_dropout > 0 and tokens is not None and visual_targets is not None
        shown = hide_drawn_tokens(tokens, visual_targets, drawn_token_dropout) if hide else tokens
        embeddings = self.embed(input_ids, shown, is_visual)
        mask = torch.ones_like(is_visual) if attention_mask is None and past_key_values is None else attention_mask
        if document_lengths is not None:
            hidden, cache = run_packed(self.get_decoder(), embeddings, mask.bool(), document_lengths, use_cache=False, **kwargs), None
        else:
            hidden, cache = self._run_decoder(embeddings, mask, position_ids, past_key_values, use_cache, **kwargs)
        terms, losses = None, {}
        if labels is not None:
            real = torch.ones_like(is_visual) if mask is None else mask[:, -labels.shape[1] :].bool()
            usable = predictable(real, document_lengths)
            text = self._text_term(hidden, labels, usable, target_weights)
            visual = self._visual_term(hidden, tokens, is_visual, usable, visual_targets, target_weights)
            terms, losses = {"text": text, "visual": visual}, self._mean_losses(text, visual, num_items_in_batch)
        logits = None
        if logits_to_keep is not None or labels is None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
            logits = self.predict_logits(hidden[:, kept] if isinstance(kept, slice | Tensor) else hidden)
        return MetaMorphOutput(**losses, logits=logits, last_hidden_state=hidden, past_key_values=cache, terms=terms)

    def _find_visual(self, input_ids: Int64[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
        placeholder = self.config.image_token_id
        return torch.zeros_like(input_ids, dtype=torch.bool) if placeholder is None else input_ids == placeholder

    def _run_decoder(
        self,
        embeddings: Float[Tensor, "b t d"],
        mask: Bool[Tensor, "b total"] | Int[Tensor, "b total"] | None,
        position_ids: Int64[Tensor, "b t"] | None,
        cache: Cache | None,
        use_cache: bool,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "b t d"], Cache | None]:
        if position_ids is None and mask is not None:
            position_ids = position_ids_of(mask, embeddings.shape[1])
        states = self.get_decoder()(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=position_ids, past_key_values=cache, use_cache=use_cache, **kwargs
        )
        return states.last_hidden_state, states.past_key_values if use_cache else None

    def generate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Int64[Tensor, "b t"],
        attention_mask: Int[Tensor, "b t"] | Bool[Tensor, "b t"] | None = None,
        is_visual: Bool[Tensor, "b t"] | None = None,
        pixel_values: Float[Tensor, "m 3 h w"] | None = None,
        visual_tokens: Float[Tensor, "n k v"] | None = None,
        from_pixels: Bool[Tensor, " n"] | None = None,
        options: DecodingOptions | None = None,
        *,
        seeds: int | Sequence[int] = 0,
        **changes: Any,
    ) -> list[AnswerIds]:
        """Answer prompts given as tensors, with ids and visual tokens; needs no tokenizer. From messages: `metamorph.pipeline`.

        Arguments are as for `forward`; padding may stand on either side. `changes` are fields of `DecodingOptions`.

        Raises:
            AlignmentError: positions, images and visual tokens do not fit.
            ContextLengthError, ConfigError: as `generation.prefill`.
        """
        from metamorph.model.generation import generate_ids, split_prompts
        from metamorph.model.state import DecodingOptions

        is_visual = self._find_visual(input_ids) if is_visual is None else is_visual
        from_pixels = _default_from_pixels(pixel_values, visual_tokens, is_visual) if from_pixels is None else from_pixels
        check_image_counts(is_visual, pixel_values, visual_tokens, from_pixels, "MetaMorph.generate")
        mask = torch.ones_like(is_visual) if attention_mask is None else attention_mask.bool()
        prompts = split_prompts(input_ids, mask, is_visual, pixel_values, visual_tokens, from_pixels)
        return generate_ids(self, prompts, (options or DecodingOptions()).updated(**changes), seeds=seeds)

    def loss_terms(self, batch: Batch) -> dict[str, LossTerm]:
        """The two losses of a batch as (sum, count), "text" and "visual", with a gradient path to every module whatever the batch holds.

        Raises:
            AlignmentError: a term's count is not the one that the collator counted.
        """
        terms = self(**batch.model_inputs()).terms
        for kind, expected in batch.target_counts.items():
            if (found := int(terms[kind].count)) != expected:
                raise AlignmentError(
                    f"{found} {kind} targets in the loss but {expected} in the batch ({', '.join(batch.ids[:3])}). "
                    "Count targets after padding and packing."
                )
        return terms

    def embed(self, input_ids: Int64[Tensor, "b t"], tokens: Float[Tensor, "n k v"] | None, is_visual: Bool[Tensor, "b t"]) -> Tensor:
        """What the LLM reads, "b t d": token embeddings, and projected visual tokens where `is_visual`, whatever id stands there.

        Raises:
            AlignmentError: the number of image positions is not n * k.
        """
        embeddings = self.get_input_embeddings()(input_ids.masked_fill(is_visual, 0))  # the placeholder need not have a row
        if tokens is None:  # a path to the projector, so that ranks with and without images run the same modules
            width = self.config.vision_config.hidden_size
            return embeddings + 0.0 * self.project(embeddings.new_zeros((1, width))).sum().to(embeddings.dtype)
        return place_visual_tokens(embeddings, self.project(tokens).to(embeddings.dtype), is_visual)

    def _text_term(
        self,
        hidden: Float[Tensor, "b t d"],
        labels: Int64[Tensor, "b t"],
        usable: Bool[Tensor, "b t"],
        weights: Float[Tensor, "b t"] | None,
    ) -> LossTerm:
        chosen = usable & (labels != IGNORE_INDEX)
        if not bool(chosen.any()):
            return nothing_to_learn(self.predict_logits(hidden[:1, :1]))
        states = hidden[:, :-1][chosen[:, 1:]]  # select rows first: the vocabulary is large
        return text_cross_entropy(self.predict_logits(states), labels[chosen], None if weights is None else weights[chosen])

    def _visual_term(
        self,
        hidden: Float[Tensor, "b t d"],
        tokens: Float[Tensor, "n k v"] | None,
        is_visual: Bool[Tensor, "b t"],
        usable: Bool[Tensor, "b t"],
        visual_targets: Bool[Tensor, " n"] | None,
        weights: Float[Tensor, "b t"] | None,
    ) -> LossTerm:
        if tokens is not None and visual_targets is None:
            raise AlignmentError(
                f"labels and {len(tokens)} images but no visual_targets (MetaMorph.forward). Say which images are to be predicted."
            )
        if tokens is None or not bool(visual_targets.any()):
            return nothing_to_learn(self.predict_visual_tokens(hidden[:1, :1]))
        places = is_visual.flatten().nonzero().view(tokens.shape[:2])[visual_targets].flatten()
        if not bool(usable.flatten()[places].all()):
            raise AlignmentError(
                f"{int((~usable.flatten()[places]).sum())} of {len(places)} target visual tokens have nothing before them "
                "(MetaMorph.forward). Let a target image follow <image_start> in its own document."
            )
        states = hidden.flatten(0, 1)[places - 1]
        return self.vision_head.loss(states, tokens[visual_targets].flatten(0, 1), None if weights is None else weights.flatten()[places])

    def _mean_losses(self, text: LossTerm, visual: LossTerm, num_items_in_batch: int | Tensor | None) -> dict[str, Float[Tensor, ""]]:
        text_loss = text.mean if num_items_in_batch is None else text.sum / num_items_in_batch
        return {"loss": text_loss + self.config.visual_loss_weight * visual.mean, "text_loss": text_loss, "visual_loss": visual.mean}


def place_visual_tokens(
    embeddings: Float[Tensor, "b t d"], visual: Float[Tensor, "n k d"], is_visual: Bool[Tensor, "b t"]
) -> Float[Tensor, "b t d"]:
    """Write each image's k embeddings, in reading order, where `is_visual` is true.

    Raises:
        AlignmentError: the number of true positions is not n * k.
    """
    positions, (n, k) = int(is_visual.sum()), visual.shape[:2]
    if positions != n * k:
        raise AlignmentError(f"{positions} image positions but {n} images x {k} visual tokens (place_visual_tokens). Was the sequence cut?")
    return embeddings.masked_scatter(is_visual.unsqueeze(-1), visual)


def hide_drawn_tokens(tokens: Float[Tensor, "n k v"], visual_targets: Bool[Tensor, " n"], most: float) -> Float[Tensor, "n k v"]:
    """Zero a share of each target image's visual tokens, the share drawn uniformly from 0 to `most`; for what is fed in, not for targets.

    Not in the paper. A token must then be read from the request and cannot be guessed from its neighbours alone. What follows the image
    sees it incomplete as well. Draws from torch's random state of the CPU, which checkpoints keep, whatever the device.
    """
    share = most * torch.rand(len(tokens), 1)
    hidden = (torch.rand(tokens.shape[:2]) < share).to(tokens.device) & visual_targets[:, None]
    return tokens.masked_fill(hidden[..., None], 0.0)


def nothing_to_learn(values: Float[Tensor, "..."]) -> LossTerm:
    """A term of exactly 0 over 0 targets that still leads back to the module that made `values`."""
    return LossTerm(0.0 * values.float().sum(), torch.zeros((), dtype=torch.long, device=values.device))


def _default_from_pixels(
    pixel_values: Float[Tensor, "m 3 h w"] | None, visual_tokens: Float[Tensor, "n k v"] | None, is_visual: Bool[Tensor, "b t"]
) -> Bool[Tensor, " n"]:
    pixels, given = (0 if x is None else len(x) for x in (pixel_values, visual_tokens))
    if pixels and given:
        raise AlignmentError(
            f"{pixels} pixel images and {given} rows of visual tokens but no from_pixels (MetaMorph.forward). Say which image is which."
        )
    return torch.arange(pixels + given, device=is_visual.device) < pixels
