"""What the hub and other libraries expect of a Hugging Face model: a card beside the weights, `push_to_hub`, the manners of a causal LM.

Axes: b sequences, t positions.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from metamorph.errors import CheckpointError
from metamorph.model.card import CARD, MARK, is_ours, write_card
from metamorph.provenance import public_name

NOT_PUBLISHED = ("checkpoints/*", "*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", ".*", "*/.*")
"""What stays here when a directory is pushed: training states, pickle, hidden files."""


class HubModel(PreTrainedModel):
    """A model that is published with a card and with what belongs to it."""

    @classmethod
    def can_generate(cls) -> bool:
        """False: the generation of transformers cannot draw. `generate` is the model's own."""
        return False

    def prepare_inputs_for_generation(self, input_ids: Int64[Tensor, "b t"], **kwargs: Any) -> dict[str, Any]:
        """The arguments as they are. PEFT wants a causal LM to have this method; `generate` does not use it."""
        return {"input_ids": input_ids, **kwargs}

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save config, weights (safetensors), generation settings and, where there is none, a model card.

        No place on this machine is written into the config.
        """
        for config in (self.config.text_config, self.config.vision_config):
            config._name_or_path = public_name(config._name_or_path) if config._name_or_path else ""
        if kwargs.get("is_main_process", True):  # before the weights: with `push_to_hub=True` these are pushed with them
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            self.generation_config.save_pretrained(save_directory)
            write_card(save_directory, self.config)
        super().save_pretrained(save_directory, *args, **kwargs)

    def push_to_hub(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        repo_id: str,
        *,
        processor: Any = None,
        decoder: Any = None,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: list[str] | None = None,
    ) -> str:
        """Upload the model, with its processor and decoder if given, in one commit; arguments as in transformers.

        The card is the one beside the weights that were loaded, else a new one; a card of somebody's own on the hub stays.
        """

        def save(directory: Path) -> None:
            source = Path(self.name_or_path) / CARD
            if self.name_or_path and source.is_file():
                shutil.copy(source, directory / CARD)
            self.save_pretrained(directory, max_shard_size=max_shard_size)
            for part, place in ((processor, directory), (decoder, directory / "decoder")):
                if part is not None:
                    part.save_pretrained(place)
            _add_tags(directory / CARD, tags or ())

        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(temporary) / repo_id.rpartition("/")[2]
            directory.mkdir()
            save(directory)
            upload = {"commit_description": commit_description, "revision": revision, "create_pr": create_pr}
            return push_directory(
                directory, repo_id, private=private, token=token, commit_message=commit_message or "Upload MetaMorph", **upload
            )


def push_directory(directory: Path, repo_id: str, *, private: bool | None = None, token: bool | str | None = None, **upload: Any) -> str:
    """Upload a model's directory as it is: model, processor, decoder, card; no training state and no pickle.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: the directory holds no model, or not all of it.
    """
    _check_whole(directory)
    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    _name_repository(directory / CARD, repo)
    ignored = [*NOT_PUBLISHED, *([CARD] if _has_own_card(repo, token) else [])]
    revision = upload.get("revision")
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo, branch=revision, exist_ok=True)
    return str(api.upload_folder(repo_id=repo, folder_path=directory, ignore_patterns=ignored, **upload))


def _check_whole(directory: Path) -> None:
    settings = directory / "config.json"
    if not settings.is_file():
        raise CheckpointError(f"no config.json but a saved model was expected ({directory}). Give the directory of a model.")
    outside = json.loads(settings.read_text(encoding="utf-8")).get("vision_encoder_path")
    if outside is not None:
        remedy = "Load it and call its push_to_hub, which saves all of it."
        raise CheckpointError(f"a vision encoder in {outside} but a whole model is needed on the hub ({directory}). {remedy}")


def _has_own_card(repo_id: str, token: bool | str | None) -> bool:
    """Whether there is a card on the hub that we did not write."""
    load: Callable[..., ModelCard] = ModelCard.load
    try:
        return MARK not in load(repo_id, token=token, ignore_metadata_errors=True).content
    except EntryNotFoundError:
        return False


def _name_repository(path: Path, repo_id: str) -> None:
    """Let the example on a card of ours load the model from where it is now."""
    if path.is_file() and is_ours(path):
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r'from_pretrained\("[^"]*"\)', f'from_pretrained("{repo_id}")', text), encoding="utf-8")


def _add_tags(path: Path, tags: Sequence[str]) -> None:
    if tags:
        card = ModelCard.load(path)
        card.data.tags = [*(card.data.tags or []), *(tag for tag in tags if tag not in (card.data.tags or []))]
        card.save(path)
