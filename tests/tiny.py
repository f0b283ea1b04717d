"""Tiny random models of the real classes: Llama + SigLIP, k = 4 visual tokens per 32x32 image, byte tokens, a chat template."""

from __future__ import annotations

from pathlib import Path

import torch

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tiny_tokenizer():
    """256 bytes and a few special tokens, so that random ids often stop in the middle of a character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    roles = {f"{role}_token": f"<|{role}|>" for role in ("system", "user", "assistant")}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        clean_up_tokenization_spaces=False,
        extra_special_tokens=roles,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_parts(root: Path, context: int = 256) -> tuple[Path, Path]:
    """A random language model with its tokenizer, and a random vision encoder, as a user would have them on disk."""
    from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer) + 3,  # longer than the tokenizer, as padded matrices are
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=context,
            initializer_range=0.3,  # large weights: what is said then depends visibly on the past
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    vision = SiglipVisionModel(
        SiglipVisionConfig(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
    )
    llm.save_pretrained(root / "llm")
    tokenizer.save_pretrained(root / "llm")
    vision.save_pretrained(root / "vision")
    return root / "llm", root / "vision"


def make_eager_to_draw(model, scale: float = 6.0) -> None:
    """Let a random model begin and end images, and end its turn, often enough to be tested: their logits vary more than the others'."""
    config = model.config
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[config.image_start_token_id] = torch.randn(head.shape[1], generator=torch.Generator().manual_seed(1)) * head.std() * scale
        head[config.image_end_token_id] = torch.randn(head.shape[1], generator=torch.Generator().manual_seed(2)) * head.std() * scale


def save_decoder(directory: Path, num_visual_tokens: int, vision_width: int) -> None:
    """A random decoder that draws 16x16 pictures."""
    from metamorph.decoder import DecoderModel, VisualConditioner, VisualDecoderPipeline, build_denoiser, build_scheduler

    torch.manual_seed(0)
    conditioner = VisualConditioner(
        vision_width, 16, num_visual_tokens=num_visual_tokens, hidden_size=16, map_channels=4, map_hidden_size=16, sample_size=8
    )
    unet = build_denoiser(image_size=16, patch=2, context_width=16, channels=(16, 16), attention=(False, True), map_channels=4)
    VisualDecoderPipeline.from_model(DecoderModel(unet, build_scheduler("flow"), conditioner).eval()).save_pretrained(directory)
