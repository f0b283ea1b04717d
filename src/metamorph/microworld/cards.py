"""A card beside every set of weights: how it was made, what it scores, and the hash by which it is known."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from metamorph.errors import ComponentError

CARD = "card.json"


@dataclass(frozen=True)
class Card:
    """What a part is. `scores` are the figures that the test of the shipped weights checks; `how` are settings and seeds."""

    name: str
    what: str
    how: Mapping[str, Any]
    scores: Mapping[str, float]
    sha256: str = ""


def hash_weights(directory: Path) -> str:
    """SHA-256 over all safetensors files below a directory, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(directory.rglob("*.safetensors")):
        digest.update(file.relative_to(directory).as_posix().encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def write_card(directory: Path, card: Card) -> None:
    """Write the card with the hash of the weights that lie beside it."""
    values = {**asdict(card), "sha256": hash_weights(directory)}
    (directory / CARD).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_card(directory: Path) -> Card:
    """Read a card and check that it belongs to the weights.

    Raises:
        ComponentError: there is no card, or the weights are not those that it describes.
    """
    file = directory / CARD
    if not file.is_file():
        raise ComponentError(f"no card but one was expected ({file}). Build the part again: metamorph microworld build.")
    card = Card(**json.loads(file.read_text(encoding="utf-8")))
    found = hash_weights(directory)
    if found != card.sha256:
        raise ComponentError(
            f"weights with hash {found[:12]} but the card says {card.sha256[:12]} ({directory}). Restore the files or build the part again."
        )
    return card
