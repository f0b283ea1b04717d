"""Packed against padded batches: real tokens per second through a training step, on the same rows.

    python benchmarks/packing.py

The rows: 60% of 40 to 120 positions, 30% of 150 to 300, 10% of 900 to 1,200 with 8 to 12 images, in random order. At a pack length of 512
the long ones do not fit and are left out on both sides. Padded: batches of 8 rows, filled to the longest. Packed: the same rows, filled
into rows of the pack length from a window of rows that wait (`Packing`), in batches of about as many real positions as 8 padded rows have.
A step is forward and backward; images come as visual tokens, so the vision encoder has no part in it. Real tokens are positions that are
no padding. The summed losses of both sides are the same, which is checked.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from machine import arguments, rounded, side_by_side, write

PACK_LENGTHS = (512, 2048)
SHARES = ((0.6, (40, 120), (0, 0)), (0.3, (150, 300), (0, 2)), (0.1, (900, 1200), (8, 12)))
BATCH = 8
VISUAL_TOKENS = 64
WIDTH, LAYERS, VOCABULARY = 128, 2, 1024


def build_model() -> Any:
    """A small model of the real classes: a Llama, and a vision encoder that is not run."""
    from transformers import LlamaConfig, SiglipVisionConfig

    from metamorph import MetaMorph, MetaMorphConfig

    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    )
    vision = SiglipVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, image_size=128, patch_size=16
    )
    special = {"image_token_id": 3, "image_start_token_id": 4, "image_end_token_id": 5}
    config = MetaMorphConfig(text_config=text, vision_config=vision, num_visual_tokens=VISUAL_TOKENS, **special)
    return MetaMorph(config).train()


def draw_row(rng: random.Random, number: int) -> Any:
    """A row of the mix with random words: a question, its images, an answer; every second image is drawn."""
    from metamorph.batch import IGNORE_INDEX, TokenSequence

    _, span, images = rng.choices(SHARES, [share for share, _, _ in SHARES])[0]
    length, count = rng.randint(*span), rng.randint(*images)
    words = length - count * (VISUAL_TOKENS + 2)
    ids, visual = [], []
    for _ in range(count):
        ids += [4, *[3] * VISUAL_TOKENS, 5]
        visual += [False, *[True] * VISUAL_TOKENS, False]
    before = max(1, words // 3)
    ids = [rng.randrange(6, VOCABULARY) for _ in range(before)] + ids + [rng.randrange(6, VOCABULARY) for _ in range(words - before)]
    visual = [False] * before + visual + [False] * (words - before)
    labels = [IGNORE_INDEX] * (length - (words - before)) + ids[length - (words - before) :]
    return TokenSequence(
        input_ids=torch.tensor(ids),
        labels=torch.tensor(labels),
        is_visual=torch.tensor(visual),
        pixel_values=torch.zeros(0, 3, 128, 128),
        visual_tokens=torch.nn.functional.normalize(torch.randn(count, VISUAL_TOKENS, 64), dim=-1) if count else None,
        from_pixels=torch.zeros(count, dtype=torch.bool),
        visual_targets=torch.arange(count) % 2 == 1,
        id=str(number),
    )


def pack_all(rows: list[Any], pack_length: int, batches: int) -> list[Any]:
    """The rows packed as training packs them, in about so many batches."""
    from metamorph.data.collate import pack_rows
    from metamorph.data.packing import Packing, RowPacker

    packer = RowPacker(iter(rows), Packing(pack_length))
    packed = []
    while row := packer.next_row():
        packed.append(row)
    size = max(1, round(len(packed) / batches))
    return [pack_rows(packed[start : start + size]) for start in range(0, len(packed), size)]


def train_on(model: Any, batches: list[Any]) -> dict[str, float]:
    """Forward and backward over all batches; the summed losses."""
    sums = {"text": 0.0, "visual": 0.0}
    for batch in batches:
        terms = model(**batch.model_inputs()).terms
        total = sum(term.sum / max(batch.target_counts[kind], 1) for kind, term in terms.items())
        total.backward()
        model.zero_grad(set_to_none=True)
        for kind, term in terms.items():
            sums[kind] += float(term.sum.detach())
    return sums


def measure(model: Any, pack_length: int, count: int, repeats: int) -> dict[str, Any]:
    """One pack length: both sides in turn."""
    from metamorph.data.collate import pad

    rng = random.Random(0)
    torch.manual_seed(0)
    drawn = [draw_row(rng, number) for number in range(count)]
    rows = [row for row in drawn if len(row) <= pack_length]
    padded = [pad(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]
    packed = pack_all(rows, pack_length, len(padded))
    train_on(model, padded[:1])  # what is set up at first use
    train_on(model, packed[:1])
    seconds, sums = side_by_side({"padded": lambda: train_on(model, padded), "packed": lambda: train_on(model, packed)}, repeats)
    for kind, value in sums["padded"].items():
        if abs(sums["packed"][kind] - value) > 1e-3 * abs(value):
            raise SystemExit(f"{kind} loss {sums['packed'][kind]} packed but {value} padded")
    real = sum(map(len, rows))
    full = sum(len(row) for batch in packed for row in batch.input_ids)  # rows are stored as long as the longest of the batch
    num_packed = sum(map(len, packed))
    return {
        "pack_length": pack_length,
        "rows": len(rows),
        "rows_left_out": len(drawn) - len(rows),
        "real_tokens": real,
        "fill": rounded(real / (num_packed * pack_length), 4),
        "fill_goal": 0.97,
        "fill_stored": rounded(real / full, 4),
        "fill_padded": rounded(real / sum(batch.input_ids.numel() for batch in padded)),
        "tokens_per_second_padded": rounded(real / seconds["padded"].wall),
        "tokens_per_second_packed": rounded(real / seconds["packed"].wall),
        "times_faster": rounded(seconds["padded"].wall / seconds["packed"].wall),
        "times_faster_cpu": rounded(seconds["padded"].cpu / seconds["packed"].cpu),
    }


def main() -> None:
    parser = arguments(__doc__, "packing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = build_model()
    count, repeats = (40, 1) if given.quick else (400, given.repeats)
    rows = [measure(model, length, count, repeats) for length in PACK_LENGTHS]
    settings = {"batch": BATCH, "visual_tokens": VISUAL_TOKENS, "width": WIDTH, "layers": LAYERS, "precision": "float32"}
    write(given.out, rows, **settings)


if __name__ == "__main__":
    main()
