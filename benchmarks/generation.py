"""Cached generation against reading everything anew for each element, and a batch of 16 against one row.

    python benchmarks/generation.py        # about 15 minutes; one thread, float32

Ours is `MetaMorph.generate`. The other side is the authors' way, written by us: without a cache, one sample at a time, the whole sequence
embedded, projected and read for every element, and the text head asked at every step, inside images too. It is kept honest in the same
run: its steps are timed against the bare Hugging Face model's forward over the same length, and both sides must say the same.

    all     logits of every position, as the authors compute them and as a Hugging Face causal LM does unless told otherwise: the goals'
            side
    last    logits of the last position only: a kinder rewrite than theirs, reported beside it

The weights are random. The text head has biases that let the model draw wherever it may and never end its turn, so that every answer is
the wanted number of images and then text, on both sides, by greedy choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from machine import arguments, rounded, side_by_side, write
from torch import Tensor, nn
from transformers import LlamaConfig, SiglipVisionConfig

from metamorph.model.configuration import MetaMorphConfig
from metamorph.model.modeling import MetaMorph

GOALS = {1: 6.0, 2: 8.0, 4: 12.0}
BATCH_GOAL = 3.0
NUM_PROMPT, NUM_TEXT = 40, 20


@dataclass(frozen=True)
class Shape:
    """Sizes of the model. `intermediate` is Llama's rule: 8/3 of the width, up to the next multiple of 256."""

    hidden: int = 512
    intermediate: int = 1536
    layers: int = 8
    heads: int = 8
    vocabulary: int = 32000
    vision: int = 256
    k: int = 64


TINY = Shape(hidden=32, intermediate=64, layers=1, heads=2, vocabulary=99, vision=24, k=4)


def build(shape: Shape) -> MetaMorph:
    """A random model that draws wherever it may, and never ends its turn."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=1024,
        eos_token_id=2,
    )
    vision = SiglipVisionConfig(
        hidden_size=shape.vision,
        intermediate_size=2 * shape.vision,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=128,
        patch_size=16,
    )
    special = range(shape.vocabulary - 3, shape.vocabulary)
    names = ("image_token_id", "image_start_token_id", "image_end_token_id")
    config = MetaMorphConfig(text_config=text, vision_config=vision, num_visual_tokens=shape.k, **dict(zip(names, special, strict=True)))
    model = MetaMorph(config).eval()
    head = nn.Linear(shape.hidden, shape.vocabulary)
    with torch.no_grad():
        head.weight.copy_(model.get_output_embeddings().weight)
        head.bias.zero_()
        head.bias[config.image_start_token_id], head.bias[2] = 1e4, -1e4
    model.set_output_embeddings(head)
    return model


@dataclass
class Said:
    """An answer: ids and visual tokens "k v" in order."""

    token_ids: list[int]
    visual: Tensor


def cached(model: MetaMorph, prompts: Tensor, images: int) -> list[Said]:
    """Our answers."""
    new = images * (model.config.num_visual_tokens + 2) + NUM_TEXT
    answers = model.generate(prompts, max_new_tokens=new, max_images=images)
    return [Said(list(answer.token_ids), torch.cat(answer.visual_tokens)) for answer in answers]


def read(model: MetaMorph, ids: list[int], visual: list[Tensor], is_visual: list[bool], keep: int) -> tuple[Tensor, Tensor]:
    """Read a whole sequence: the state after it, and its logits (of the last `keep` positions; 0 = all)."""
    sequence = model.get_input_embeddings()(torch.tensor(ids))
    if visual:
        sequence[torch.tensor(is_visual)] = model.project(torch.stack(visual))
    hidden = model.get_decoder()(inputs_embeds=sequence[None], use_cache=False).last_hidden_state
    return hidden[0, -1], model.get_output_embeddings()(hidden[:, -keep:])[0, -1]


@torch.no_grad()
def recomputed(model: MetaMorph, prompt: Tensor, images: int, keep: int) -> Said:
    """The same answer without a cache: everything is read anew for each element."""
    config = model.config
    ids, visual, said = prompt.tolist(), [], []
    is_visual = [False] * len(ids)
    left, after_image = 0, False  # visual tokens that the image still needs; whether it has just been completed
    for _ in range(images * (config.num_visual_tokens + 2) + NUM_TEXT):
        hidden, logits = read(model, ids, visual, is_visual, keep)
        is_visual.append(left > 0)
        if left:
            visual.append(model.predict_visual_tokens(hidden))
            ids.append(0)
            left -= 1
            after_image = left == 0
            continue
        logits[[config.image_token_id, config.image_end_token_id]] = -torch.inf
        if said.count(config.image_start_token_id) == images:
            logits[config.image_start_token_id] = -torch.inf
        said.append(config.image_end_token_id if after_image else int(logits.argmax()))
        ids.append(said[-1])
        after_image = False
        left = config.num_visual_tokens if said[-1] == config.image_start_token_id else 0
    return Said(said, torch.stack(visual))


@torch.no_grad()
def honesty(model: MetaMorph, images: int, keep: int, repeats: int) -> float:
    """Speed of the other side's steps relative to the bare model's forward, over the lengths that such an answer passes through."""
    config, llm = model.config, model.language_model
    total = NUM_PROMPT + images * (config.num_visual_tokens + 2) + NUM_TEXT
    ours = theirs = 0.0
    for length in range(NUM_PROMPT, total, max(1, total // 16)):
        drawn = min(length - NUM_PROMPT, images * config.num_visual_tokens)
        visual = list(torch.randn(drawn, config.vision_config.hidden_size))
        is_visual = [position < drawn for position in range(length)]
        embeddings = torch.randn(1, length, config.text_config.hidden_size)
        sides = {
            "step": partial(read, model, [5] * length, visual, is_visual, keep),
            "bare": partial(llm, inputs_embeds=embeddings, use_cache=False, logits_to_keep=keep),
        }
        times, _ = side_by_side(sides, repeats)
        ours, theirs = ours + times["step"].cpu, theirs + times["bare"].cpu
    return theirs / ours


def compare(model: MetaMorph, images: int, repeats: int) -> dict:
    """One row: an answer of some images, both ways."""
    prompt = torch.randint(5, 90, (1, NUM_PROMPT), generator=torch.Generator().manual_seed(images))
    sides = {
        "cached": lambda: cached(model, prompt, images)[0],
        "last": lambda: recomputed(model, prompt[0], images, 1),
        "all": lambda: recomputed(model, prompt[0], images, 0),
    }
    cached(model, prompt, 1)  # warm
    times, said = side_by_side(sides, repeats)
    for name in ("last", "all"):
        assert said[name].token_ids == said["cached"].token_ids, "both sides must say the same"
        torch.testing.assert_close(said[name].visual, said["cached"].visual, atol=1e-4, rtol=0)
    row = {"images": images, "goal": GOALS[images]}
    row |= {f"{name}_seconds": rounded(seconds.wall) for name, seconds in times.items()}
    row |= {f"{name}_cpu_seconds": rounded(seconds.cpu) for name, seconds in times.items()}
    for name, keep in (("last", 1), ("all", 0)):
        row[f"times_faster_than_{name}"] = rounded(times[name].wall / times["cached"].wall)
        row[f"times_faster_than_{name}_cpu"] = rounded(times[name].cpu / times["cached"].cpu)
        row[f"{name}_step_speed_of_bare_forward"] = rounded(honesty(model, images, keep, repeats))
    return row


def batch(model: MetaMorph, size: int, repeats: int) -> dict:
    """Images per second of a batch and of a single row, one image each."""
    prompts = torch.randint(5, 90, (size, NUM_PROMPT), generator=torch.Generator().manual_seed(0))
    sides = {"one": lambda: cached(model, prompts[:1], 1), "batch": lambda: cached(model, prompts, 1)}
    times, said = side_by_side(sides, repeats)
    torch.testing.assert_close(said["batch"][0].visual, said["one"][0].visual, atol=1e-4, rtol=0)
    one, many = 1 / times["one"].wall, size / times["batch"].wall
    cpu = size * times["one"].cpu / times["batch"].cpu
    row = {"batch": size, "goal": BATCH_GOAL, "images_per_second_one": rounded(one), "images_per_second_batch": rounded(many)}
    return row | {"times_more_images": rounded(many / one), "times_more_images_cpu": rounded(cpu)}


def main() -> None:
    parser = arguments(__doc__, "generation")
    parser.add_argument("--images", type=int, nargs="*", default=list(GOALS), help="numbers of images in an answer")
    given = parser.parse_args()
    torch.set_num_threads(1)
    shape = TINY if given.quick else Shape()
    model, repeats = build(shape), 1 if given.quick else given.repeats
    rows = [batch(model, 16, repeats), *(compare(model, images, repeats) for images in given.images)]
    write(given.out, rows, shape=vars(shape), prompt=NUM_PROMPT, text_tokens=NUM_TEXT, dtype="float32", repeats=repeats)


if __name__ == "__main__":
    main()
