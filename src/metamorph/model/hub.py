"""What the hub and other libraries expect of a Hugging Face model: a card beside the weights, `push_to_hub`, the manners of a causal LM.

Axes: b sequences, t positions.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from glob import escape
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from metamorph.errors import CheckpointError, ConfigError, HubError
from metamorph.model.card import (
    CARD,
    claims_nothing,
    digest_on,
    holds_for,
    is_hub_name,
    is_ours,
    origin_of,
    write_card,
)
from metamorph.model.configuration import MetaMorphConfig
from metamorph.model.weight_files import check_weights, weight_files, weights_digest
from metamorph.provenance import public_name

PUBLISHED = (
    *("config.json", "generation_config.json", "model.safetensors.index.json"),
    *(
        "processor_config.json",
        "preprocessor_config.json",
        "chat_template.jinja",
        "chat_template.json",
        "additional_chat_templates/*.jinja",
    ),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json"),
    *(CARD, "LICENSE*", "NOTICE*", "card.json", "evaluation.json"),
)
"""What belongs to a model, beside its weights. Nothing else is pushed: a run's directory holds much that is nobody else's business."""
DECODER = "decoder"
DECODER_PARTS = ("config.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors.index.json")
"""The same for each part that the decoder's model_index.json names."""
UPLOAD = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr")


class HubModel(PreTrainedModel):
    """A model that is published with a card and with what belongs to it."""

    @classmethod
    def can_generate(cls) -> bool:
        """False: the generation of transformers cannot draw. `generate` is the model's own."""
        return False

    def prepare_inputs_for_generation(self, input_ids: Int64[Tensor, "b t"], **kwargs: Any) -> dict[str, Any]:
        """The arguments as they are. PEFT wants a causal LM to have this method; `generate` does not use it."""
        return {"input_ids": input_ids, **kwargs}

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save config, weights (safetensors), generation settings and a model card; arguments as in transformers.

        No place on this machine is written into the config. A card that is there stays, unless it is ours and about other weights.
        With `push_to_hub` the directory is then uploaded, see `push_directory`.
        """
        upload = {name: kwargs.pop(name) for name in UPLOAD if name in kwargs}  # for us: transformers would put its own card over ours
        for config in (self.config.text_config, self.config.vision_config):
            config._name_or_path = public_name(config._name_or_path) if config._name_or_path else ""
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        if not is_main_process:
            return
        directory = Path(save_directory)
        self.generation_config.save_pretrained(directory)
        new = write_card(directory, self.config, base=self.origin(directory))
        if push_to_hub:
            if new:
                self._take_card(directory, upload.get("token"))
            push_directory(directory, upload.pop("repo_id", None) or directory.resolve().name, **upload)

    def origin(self, directory: Path) -> dict[str, str] | None:
        """The saved model from which this one was loaded, as a card names it; None if it is new, or lay in this directory."""
        here = not self.name_or_path or Path(self.name_or_path).resolve() == directory.resolve()
        return None if here else origin_of(self.name_or_path, ask_hub=False)

    def _take_card(self, directory: Path, token: bool | str | None) -> None:
        """Copy the card of the model that was loaded, if what was saved here still has its weights."""
        source = _card_of(self.name_or_path, getattr(self.config, "_commit_hash", None), token)
        if source is None or source.parent.resolve() == directory.resolve():
            return
        ours = is_ours(source)
        silent = ours and claims_nothing(source)
        known = digest_on(source) if ours else weights_digest(source.parent)
        if silent or (known is not None and known == weights_digest(directory)):
            shutil.copy(source, directory / CARD)

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

        The card is that of the model that was loaded, if the weights are still the same, else a new one; a card of somebody's own on
        the hub stays.
        """

        def save(directory: Path) -> None:
            self.save_pretrained(directory, max_shard_size=max_shard_size)
            self._take_card(directory, token)
            for part, place in ((processor, directory), (decoder, directory / DECODER)):
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
    """Upload what belongs to a model from its directory: model, processor, decoder, card.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: the directory holds no model, or not all of it.
        ConfigError: no repository can be called so.
        HubError: the hub does not answer, or refuses.
    """
    if not is_hub_name(repo_id):
        raise ConfigError(f"{repo_id!r} but a name on the hub was expected (push). Write it as user/name.")
    _check_whole(directory)
    write_card(directory, MetaMorphConfig.from_pretrained(directory))  # without weights of its own a card is silent about training
    try:
        return _upload(directory, repo_id, private, token, **upload)
    except (OSError, _HttpError) as error:
        raise _not_pushed(error, repo_id) from error


def _upload(directory: Path, repo_id: str, private: bool | None, token: bool | str | None, **upload: Any) -> str:
    """Make the repository and commit to it what belongs to the model."""
    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    _name_repository(directory / CARD, repo)
    revision = upload.get("revision")
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo, branch=revision, exist_ok=True)
    files = published_files(directory)
    if _stays(card_on_hub(repo, revision, token), directory):
        files.remove(CARD)
    address = api.upload_folder(repo_id=repo, folder_path=directory, allow_patterns=[escape(file) for file in files], **upload)
    return str(address)


# The base of the HTTP client's errors, lost connections among them; which client it is depends on the release of the hub's library.
_HttpError: type[Exception] = HfHubHTTPError.__bases__[0]


def _not_pushed(error: BaseException, repo_id: str) -> HubError:
    """What the hub's client raised, in one line with its remedy."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        remedy = "Unset HF_HUB_OFFLINE."
    elif isinstance(error, LocalTokenNotFoundError) or status in (401, 403):
        remedy = "Log in with a token that may write there: hf auth login."
    else:
        remedy = "Try again once the hub can be reached (metamorph doctor --ask-hub), or check the repository's name and your rights."
    found = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return HubError(f"{found} but the hub was expected to take the model ({repo_id} at {ENDPOINT}). {remedy}")


def published_files(directory: Path) -> list[str]:
    """What of a directory belongs to its model, and to the decoder in its folder `decoder`; names relative to it."""
    found = [file for pattern in PUBLISHED for file in directory.glob(pattern)] + weight_files(directory)
    index = directory / DECODER / "model_index.json"
    if index.is_file():
        found += [index, *(index.with_name(name) for name in (CARD, "card.json"))]
        settings: Mapping[str, Any] = json.loads(index.read_text(encoding="utf-8"))
        for part in (index.with_name(name) for name, value in settings.items() if isinstance(value, list)):
            found += [*(part / name for name in DECODER_PARTS), *weight_files(part, "diffusion_pytorch_model.safetensors")]
    return sorted({file.relative_to(directory).as_posix() for file in found if file.is_file()})


def _check_whole(directory: Path) -> None:
    settings = directory / "config.json"
    if not settings.is_file():
        raise CheckpointError(f"no config.json but a saved model was expected ({directory}). Give the directory of a model.")
    outside = json.loads(settings.read_text(encoding="utf-8")).get("vision_encoder_path")
    if outside is not None:
        remedy = "Load it and call its push_to_hub, which saves all of it."
        raise CheckpointError(f"a vision encoder in {outside} but a whole model is needed on the hub ({directory}). {remedy}")
    check_weights(directory)


def _card_of(name_or_path: str, commit: str | None, token: bool | str | None) -> Path | None:
    """The card of a model that was loaded from a directory or from the hub."""
    place = Path(name_or_path)
    if not name_or_path or place.is_dir():
        return place / CARD if name_or_path and (place / CARD).is_file() else None
    return card_on_hub(name_or_path, commit, token) if is_hub_name(name_or_path) else None


def card_on_hub(repo_id: str, revision: str | None, token: bool | str | None) -> Path | None:
    """The card on the hub; None if there is none. A lost connection is an error: nobody knows then what would be written over."""
    try:
        return Path(hf_hub_download(repo_id, CARD, revision=revision, token=token))
    except LocalEntryNotFoundError:
        raise
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return None


def _stays(there: Path | None, directory: Path) -> bool:
    """Whether the card on the hub is kept: somebody's own, or one of ours that tells more of the same weights."""
    if there is None:
        return False
    if not is_ours(there):
        return True
    here = directory / CARD
    return is_ours(here) and claims_nothing(here) and not claims_nothing(there) and holds_for(there, directory)


def _name_repository(path: Path, repo_id: str) -> None:
    """Let the example on a card of ours load the model from where it is now."""
    if path.is_file() and is_ours(path):
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r'from_pretrained\("[^"]*"\)', f'from_pretrained("{repo_id}")', text), encoding="utf-8")


def _add_tags(path: Path, tags: Sequence[str]) -> None:
    if not tags:
        return
    try:
        card = ModelCard.load(path)
    except (yaml.YAMLError, ValueError):  # somebody's own metadata, which do not read
        return
    card.data.tags = [*(card.data.tags or []), *(tag for tag in tags if tag not in (card.data.tags or []))]
    card.save(path)
