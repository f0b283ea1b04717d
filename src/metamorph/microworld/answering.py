"""How well the model answers: about pictures (against blind and majority baselines), about text, and after VPiT as before."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from metamorph.batch import IGNORE_INDEX
from metamorph.errors import ComponentError
from metamorph.evaluation.metrics import Metric, Metrics, difference_of_means, majority_share, proportion, ratio_of_exponentials
from metamorph.messages import ImagePart, Message
from metamorph.microworld.examples import make_row, to_messages
from metamorph.microworld.language import name_questions
from metamorph.microworld.names import named_looks
from metamorph.microworld.questions import EXTRA, SCORED
from metamorph.microworld.rows import Row, image_qa, video_qa
from metamorph.microworld.scenes import IMAGE_SIZE
from metamorph.microworld.subject import Subject, final_text


@dataclass(frozen=True)
class Asked:
    """One question with the model's answers to it: with the picture, and with the picture blanked."""

    type: str
    truth: str
    said: str
    blind: str

    @property
    def right(self) -> bool:
        """Whether the answer is exactly the truth."""
        return self.said == self.truth

    @property
    def right_blind(self) -> bool:
        """Whether the answer without a picture is the truth."""
        return self.blind == self.truth


def blanked(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The same conversation with every picture replaced by plain grey."""
    grey = ImagePart(image=Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (128, 128, 128)))
    return tuple(replace(m, parts=tuple(grey if isinstance(part, ImagePart) else part for part in m.parts)) for m in messages)


def question_rows(types: Sequence[str], count: int, seed: int) -> list[Row]:
    """`count` single questions about test scenes, the types in turn."""
    rows = []
    for index in range(count):
        rng = np.random.default_rng([seed, 101, index])
        rows.append(image_qa(rng, "test", (types[index % len(types)],), turns=1))
    return rows


def ask_all(subject: Subject, rows: Sequence[Row]) -> list[Asked]:
    """Ask every question with its picture and without."""
    conversations = [to_messages(row)[:-1] for row in rows]
    said = subject.answer(conversations, allow_images=False, max_new_tokens=16)
    blind = subject.answer([blanked(messages) for messages in conversations], allow_images=False, max_new_tokens=16)
    return [
        Asked(row.type, str(row.turns[-1][1][0]), final_text(one), final_text(other))
        for row, one, other in zip(rows, said, blind, strict=True)
    ]


def vqa(subject: Subject, samples: int, seed: int) -> Metrics:
    """Accuracy over the nine scored types, and each type with its blind and majority baselines."""
    scored = ask_all(subject, question_rows(tuple(SCORED), samples, seed))
    extra = ask_all(subject, question_rows(tuple(EXTRA), max(40, samples // 3), seed + 1))
    metrics: dict[str, Metric] = {
        "vqa_accuracy": proportion([one.right for one in scored]),
        "vqa_blind": proportion([one.right_blind for one in scored]),
        "vqa_over_blind": difference_of_means([one.right for one in scored], [one.right_blind for one in scored]),
    }
    by_type: dict[str, list[Asked]] = defaultdict(list)
    for one in [*scored, *extra]:
        by_type[one.type].append(one)
    majority: list[bool] = []
    for name, asked in by_type.items():
        share = majority_share([one.truth for one in asked])
        metrics[f"vqa_accuracy/{name}"] = proportion([one.right for one in asked])
        metrics[f"vqa_blind/{name}"] = proportion([one.right_blind for one in asked])
        metrics[f"vqa_majority/{name}"] = proportion([index < round(share * len(asked)) for index in range(len(asked))])
        if name in SCORED:
            majority += [index < round(share * len(asked)) for index in range(len(asked))]
    metrics["vqa_majority"] = proportion(majority)
    return metrics


def video(subject: Subject, samples: int, seed: int) -> Metrics:
    """Accuracy of answers about three-frame clips."""
    rows = [video_qa(np.random.default_rng([seed, 102, index]), "test") for index in range(samples)]
    answers = subject.answer([to_messages(row)[:-1] for row in rows], allow_images=False, max_new_tokens=16)
    right = [final_text(answer) == row.turns[-1][1][0] for answer, row in zip(answers, rows, strict=True)]
    return {"video_qa_accuracy": proportion(right)}


def names_in_text(subject: Subject, samples: int, seed: int) -> Metrics:
    """Whether names that were learnt from text are still known, asked in text."""
    asked = name_questions(named_looks(), seed, -(-samples // len(named_looks())))[:samples]
    answers = subject.answer([[Message.user(question)] for question, _ in asked], allow_images=False, max_new_tokens=16)
    return {"names_in_text": proportion([final_text(answer) == truth for answer, (_, truth) in zip(answers, asked, strict=True)])}


@torch.no_grad()
def text_perplexity_ratio(subject: Subject, samples: int, seed: int) -> Metrics:
    """Perplexity of what the assistant says in held-out text dialogues, after VPiT over before, on the same dialogues.

    Only the assistant's words count: what users say is a target neither before an answer nor in VPiT.

    Raises:
        ComponentError: the language model of before has other tokens.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    known = subject.pipeline.processor.tokenizer.get_vocab()
    changed = [token for token, id_ in AutoTokenizer.from_pretrained(subject.llm_before).get_vocab().items() if known.get(token) != id_]
    if changed:
        found = f"{len(changed)} tokens such as {changed[0]!r} differ between model and language model"
        raise ComponentError(f"{found} but one tokenizer was expected ({subject.llm_before}). Give the one that VPiT started from.")
    before = AutoModelForCausalLM.from_pretrained(subject.llm_before, dtype=torch.float32, use_safetensors=True).eval()
    after = subject.pipeline.model.language_model
    rows = [make_row("text", seed + 1, "test", index) for index in range(samples)]
    sequences = [subject.pipeline.processor.encode(to_messages(row)) for row in rows]

    def per_row(model: torch.nn.Module) -> list[float]:
        means = []
        device = next(model.parameters()).device
        for sequence in sequences:
            logits = model(input_ids=sequence.input_ids[None].to(device)).logits[0, :-1].float().cpu()
            means.append(float(F.cross_entropy(logits, sequence.labels[1:], ignore_index=IGNORE_INDEX)))
        return means

    return {"text_perplexity_ratio": ratio_of_exponentials(per_row(after), per_row(before))}
