"""Attention inside the documents of a pack: an attention function registered with transformers.

A packed batch reaches the LLM as one row without padding, together with the cumulative lengths of its documents (transformers' own keyword
`cu_seq_lens_q`). No mask over the pack is ever made: half precision on CUDA uses torch's variable-length kernel; everything else runs SDPA
once per document. Without cumulative lengths the function is transformers' SDPA.

Axes: b sequences, t positions, s real positions of the whole batch in one row, d LLM width.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from metamorph.batch import DocumentLengths
from metamorph.errors import AlignmentError, ConfigError

PACKED_ATTENTION = "metamorph_packed"
_REMEDY = "Use padded batches for this model."


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "b heads t width"],
    key: Float[Tensor, "b groups s width"],
    value: Float[Tensor, "b groups s width"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    sliding_window: int | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend inside each document if `cu_seq_lens_q` is given, over at most `sliding_window` positions, else as SDPA does.

    Raises:
        ConfigError: the model caps its attention scores.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, sliding_window=sliding_window, **kwargs
        )
    if kwargs.get("softcap") is not None:
        place = type(module).__name__
        raise ConfigError(f"capped attention scores but packing expects plain ones ({place}). {_REMEDY}")
    longest = int(cu_seq_lens_q.diff().max()) if max_length_q is None else max_length_q
    repeats = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
    attend = _variable_length if _has_kernel(query, dropout) else _per_document
    return attend(query, key, value, cu_seq_lens_q, longest, dropout, scaling, sliding_window), None


def _per_document(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int, dropout: float, scaling: float | None, window: int | None
) -> Tensor:
    lengths = offsets.diff().tolist()
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    outputs = [_attend_causally(q, k, v, dropout, scaling, window) for q, k, v in parts]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _attend_causally(query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None, window: int | None) -> Tensor:
    length = query.shape[2]
    if window is None or length <= window:
        return scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scaling, is_causal=True)
    near = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)  # itself and window - 1 before it
    return scaled_dot_product_attention(query, key, value, attn_mask=near, dropout_p=dropout, scale=scaling)


def _variable_length(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int, dropout: float, scaling: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # CUDA only

    rows = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))  # s heads width
    offsets = offsets.to(device=query.device, dtype=torch.int32)
    output = varlen_attn(*rows, offsets, offsets, longest, longest, scale=scaling, window_size=(-1 if window is None else window - 1, 0))
    assert isinstance(output, Tensor)
    return output.unsqueeze(0)


def _has_kernel(query: Tensor, dropout: float) -> bool:
    return (
        query.is_cuda
        and dropout == 0.0
        and query.dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def run_packed(
    decoder: PreTrainedModel,
    embeddings: Float[Tensor, "b t d"],
    attention_mask: Bool[Tensor, "b t"],
    document_lengths: DocumentLengths,
    **kwargs: Any,
) -> Float[Tensor, "b t d"]:
    """Hidden states of packed rows: real positions go through the decoder as one row, each document by itself; padding gets zeros.

    Raises:
        AlignmentError: document lengths and real positions disagree.
        ConfigError: the LLM's attention cannot be replaced, or is of a kind that packing does not know.
    """
    implementation = decoder.config._attn_implementation
    if implementation != PACKED_ATTENTION and "flash" not in str(implementation):
        raise ConfigError(
            f"attention {implementation!r} but packed rows need {PACKED_ATTENTION!r} or flash attention ({type(decoder).__name__}). "
            f"{_REMEDY}"
        )
    if other := sorted(set(getattr(decoder.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}):
        raise ConfigError(
            f"layers of {', '.join(other)} but packing knows full and sliding attention ({type(decoder).__name__}). {_REMEDY}"
        )
    given, real = [sum(row) for row in document_lengths], attention_mask.sum(dim=1).tolist()
    if given != real:
        raise AlignmentError(
            f"documents of {given} positions but rows of {real} real positions (packed batch). "
            "Give the lengths of exactly the documents in each row."
        )
    lengths = torch.tensor([length for row in document_lengths for length in row if length])
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).to(embeddings.device, torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()]).to(embeddings.device)
    longest = int(lengths.max())
    # A four-dimensional mask is handed through by transformers as it is: this empty one stops it from building a mask over the pack.
    no_mask = None if "flash" in str(implementation) else embeddings.new_zeros((1, 1, 0, 0))
    states = decoder(
        inputs_embeds=embeddings[attention_mask].unsqueeze(0),
        attention_mask=no_mask,
        position_ids=positions.unsqueeze(0),
        cu_seq_lens_q=offsets,
        cu_seq_lens_k=offsets,
        max_length_q=longest,
        max_length_k=longest,
        **kwargs,
    ).last_hidden_state
    hidden = states.new_zeros(embeddings.shape[:2] + states.shape[-1:])
    return hidden.masked_scatter(attention_mask.unsqueeze(-1), states)


def position_ids_of(attention_mask: Bool[Tensor, "b total"], length: int) -> Int64[Tensor, "b t"]:
    """Positions of the last `length` columns of a mask: 0 at the first real position of a row, whatever padding stands before it."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -length:]


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
