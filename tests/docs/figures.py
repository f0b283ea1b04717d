"""The tables of docs/visual-tokens.md, from a model's config and from what the benchmark measured.

    python -m tests.docs.figures        # rewrite them

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

from __future__ import annotations

import json
import re

from tests.docs.pages import DOCS, ROOT

PAGE = DOCS / "visual-tokens.md"
RESULTS = ROOT / "benchmarks" / "results" / "visual_tokens.json"
LLAMA = ROOT / "src" / "metamorph" / "recipes" / "configs" / "llama3_1_8b.json"
NUMBERS_OF_TOKENS = (4, 16, 64, 144, 256)
WHAT = {
    "vqa_accuracy": "questions about test pictures answered",
    "vqa_blind": "the same with the picture blanked",
    "drawing_exact": "scenes drawn right, whole",
    "drawing_attribute_accuracy": "the same, by attribute",
    "reconstruction_exact": "real pictures, encoded and decoded, whole",
    "token_skill": "visual tokens: 0 is the mean token, 1 the true one",
    "names_in_text": "names known, asked in text",
}


def cache_bytes_per_position() -> int:
    """Keys and values of every layer in 16 bits."""
    config = json.loads(LLAMA.read_text(encoding="utf-8"))["config"]
    head = config["hidden_size"] // config["num_attention_heads"]
    return 2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head


def context_table() -> str:
    lines = ["| k | positions per image | images in 4,096 | images in 8,192 | KV cache per image |", "|---|---|---|---|---|"]
    for k in NUMBERS_OF_TOKENS:
        size = (k + 2) * cache_bytes_per_position() / 2**20
        lines.append(f"| {k} | {k + 2} | {4096 // (k + 2):,} | {8192 // (k + 2):,} | {size:.2f} MiB |")
    return "\n".join(lines)


def measured_table() -> str:
    if not RESULTS.is_file():
        return "*Not measured yet.*"
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = results["rows"]
    several = len({row["seed"] for row in rows}) > 1
    head = [f"k = {row['k']}" + (f", seed {row['seed']}" if several else "") for row in rows]
    lines = ["| figure | what | " + " | ".join(head) + " |", "|" + "---|" * (2 + len(rows))]
    for name, what in WHAT.items():
        cells = [f"{m['value']:.2f} ({m['low']:.2f} to {m['high']:.2f})" for m in (row["metrics"][name] for row in rows)]
        lines.append(f"| `{name}` | {what} | " + " | ".join(cells) + " |")
    images = " | ".join(str(row["images_in_context"]) for row in rows)
    seconds = " | ".join(f"{row['training_seconds']:,.0f}" for row in rows)
    lines += [
        f"| | images in the context of the microworld's model | {images} |",
        f"| | seconds of training, both stages (other jobs ran beside it: not to be compared) | {seconds} |",
    ]
    source = f"Measured by `{results['command']}`; 95% intervals in parentheses. All of it: `{RESULTS.relative_to(ROOT)}`."
    return "\n".join(lines) + "\n\n" + source


def rewritten() -> str:
    """The page with its tables as they should be."""
    text = PAGE.read_text(encoding="utf-8")
    for name, table in {"context": context_table(), "measured": measured_table()}.items():
        pattern = rf"(<!-- table: {name} -->)\n.*?(<!-- end of table -->)"
        text, count = re.subn(pattern, lambda match, made=table: f"{match[1]}\n\n{made}\n\n{match[2]}", text, flags=re.DOTALL)
        assert count == 1, f"{PAGE}: {count} tables named {name} but 1 is needed"
    return text


if __name__ == "__main__":
    PAGE.write_text(rewritten(), encoding="utf-8")
