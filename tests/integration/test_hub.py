"""The real `push_to_hub` and the real loading, against a stand-in for the hub on this machine: what was pushed comes back whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.integration.hub_server import Hub, running_hub
from tests.tiny import make_eager_to_draw, save_decoder, save_parts

from metamorph.model import MetaMorph, initialize

ASK = """
reply = pipeline("Draw", begin_with_image=True, max_new_tokens=12, steps=1, seed=4)
print("said", list(reply.token_ids), len(reply.images))
"""
LOAD = """
import sys
from metamorph import MetaMorphPipeline
pipeline = MetaMorphPipeline.from_pretrained(sys.argv[1], device="cpu")
"""
PUSH = f"""{LOAD}{ASK}
model, processor, decoder = pipeline.model, pipeline.processor, pipeline.decoder
print(model.push_to_hub("me/star", processor=processor, decoder=decoder, tags=["tiny"], commit_message="All of it"))
"""
PUSH_ONE_BY_ONE = f"""{LOAD}
pipeline.model.push_to_hub("me/parts")
pipeline.processor.push_to_hub("me/parts")
"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("star")
    model, processor = initialize(*save_parts(root), num_visual_tokens=4)
    make_eager_to_draw(model)
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    save_decoder(root / "model" / "decoder", num_visual_tokens=4, vision_width=24)
    return root / "model"


@pytest.fixture(scope="module")
def hub():
    with running_hub() as hub:
        yield hub


def python(hub: Hub, home: Path, *arguments: str) -> str:
    """A process of its own: the hub's address is read when huggingface_hub is imported."""
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_TOKEN": "hf_nobody", "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
    settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run([sys.executable, *arguments], env=os.environ | settings, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_what_is_pushed_comes_back_whole(hub, model_dir, tmp_path):
    said = python(hub, tmp_path / "mine", "-c", PUSH, str(model_dir)).splitlines()
    assert said[1].startswith(f"{hub.endpoint}/me/star/commit/")
    (name, message, paths), *more = hub.commits
    assert (name, message, more) == ("me/star", "All of it", [])
    expected = {"config.json", "model.safetensors", "generation_config.json", "README.md"}
    expected |= {"tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja", "decoder/model_index.json"}
    assert expected <= set(paths)
    assert not [path for path in paths if path.endswith((".bin", ".pt", ".pkl"))]
    files = hub.repositories["me/star"]
    here = str(model_dir.parent).encode()
    assert not [path for path, content in files.items() if here in content], "no path of this machine is published"
    card = files["README.md"].decode()
    assert 'from_pretrained("me/star")' in card and "- tiny" in card

    elsewhere = python(hub, tmp_path / "another", "-c", LOAD + ASK, "me/star").splitlines()
    assert elsewhere[0] == said[0]
    command = [f"{Path(sys.executable).parent}/metamorph", "generate", "Draw", "--model", "me/star", "-o", str(tmp_path / "a.png")]
    python(hub, tmp_path / "another", *command, "--steps", "1")
    assert (tmp_path / "a.png").is_file()


@pytest.mark.slow
def test_model_and_processor_one_by_one_and_a_card_of_ones_own(hub, model_dir, tmp_path):
    python(hub, tmp_path, "-c", PUSH_ONE_BY_ONE, str(model_dir))
    files = hub.repositories["me/parts"]
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= files.keys()
    assert b"Written by metamorph" in files["README.md"]  # the processor's push leaves it
    files["README.md"] = b"---\nlicense: mit\n---\nMine."
    assert "/commit/" in python(hub, tmp_path, "-c", "from metamorph.cli.main import main; main()", "push", str(model_dir), "me/parts")
    assert files["README.md"].endswith(b"Mine.")
    assert "decoder/model_index.json" in files


def test_saving_with_push_to_hub_saves_all_before_it_pushes(model_dir, tmp_path, monkeypatch):
    """transformers uploads in the middle of `save_pretrained`: card and generation settings must be there by then."""
    found = []

    def upload(self, working_dir, repo_id, *args, **kwargs):
        found.extend(sorted(path.name for path in Path(working_dir).iterdir()))

    monkeypatch.setattr(MetaMorph, "_upload_modified_files", upload)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, repo_id, **kwargs: type("Repo", (), {"repo_id": repo_id}))
    MetaMorph.from_pretrained(model_dir).save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="me/star")
    assert found == ["README.md", "config.json", "generation_config.json", "model.safetensors"]


def test_a_model_without_its_encoder_is_not_pushed(model_dir, tmp_path):
    from metamorph.errors import CheckpointError
    from metamorph.model.hub import push_directory

    settings = json.loads((model_dir / "config.json").read_text()) | {"vision_encoder_path": "../encoder"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"a vision encoder in \.\./encoder but a whole model is needed"):
        push_directory(tmp_path, "me/star")
    with pytest.raises(CheckpointError, match=r"no config\.json but a saved model"):
        push_directory(tmp_path / "nowhere", "me/star")
