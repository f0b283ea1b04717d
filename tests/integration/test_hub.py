"""The real `push_to_hub` and the real loading, against a stand-in for the hub on this machine: what was pushed comes back whole."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from tests.integration.hub_server import Hub, running_hub
from tests.tiny import make_eager_to_draw, save_decoder, save_parts
from tests.unit.test_card import REPORT

from metamorph.errors import CheckpointError
from metamorph.model import MetaMorph, initialize
from metamorph.model.card import CardFacts, write_card
from metamorph.model.hub import card_on_hub, published_files, push_directory

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
SAVE_THEN_PUSH = f"""{LOAD}
from pathlib import Path
from metamorph.model.hub import push_directory
pipeline.model.save_pretrained("{{out}}")
push_directory(Path("{{out}}"), "me/scored")
"""
CHANGE_AND_SAVE = f"""{LOAD}
pipeline.model.projector.requires_grad_(False)
next(pipeline.model.projector.parameters()).add_(1)
pipeline.model.save_pretrained("{{out}}", push_to_hub=True, repo_id="me/changed")
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


@pytest.mark.slow
def test_a_card_goes_with_its_weights(hub, model_dir, tmp_path):
    """Recorded results stay on the hub while the weights are theirs, whichever way they are pushed, and go when the weights change."""
    scored = tmp_path / "scored"
    shutil.copytree(model_dir, scored)
    config = MetaMorph.config_class.from_pretrained(scored)
    write_card(scored, config, CardFacts("Scored", training={"recipe": "stars"}, evaluation=REPORT))
    python(hub, tmp_path / "mine", "-c", f"{LOAD}pipeline.model.push_to_hub('me/scored', processor=pipeline.processor)", str(scored))
    files, theirs = hub.repositories["me/scored"], tmp_path / "theirs"
    card = files["README.md"]
    assert b"drawing_exact" in card and b"- recipe: stars" in card and b"# Scored" in card

    python(hub, theirs, "-c", f"{LOAD}pipeline.model.push_to_hub('me/scored')", "me/scored")
    assert files["README.md"] == card
    python(hub, theirs, "-c", f"{LOAD}pipeline.model.save_pretrained('{tmp_path}/out', push_to_hub=True, repo_id='me/scored')", "me/scored")
    assert files["README.md"] == card
    python(hub, theirs, "-c", SAVE_THEN_PUSH.format(out=tmp_path / "again"), "me/scored")
    assert files["README.md"] == card

    python(hub, theirs, "-c", CHANGE_AND_SAVE.format(out=tmp_path / "changed"), "me/scored")
    changed = hub.repositories["me/changed"]
    assert changed.keys() >= {"config.json", "model.safetensors", "generation_config.json", "README.md"}
    text = changed["README.md"].decode()
    assert "drawing_exact" not in text and "recipe: stars" not in text and "library_name: metamorph" in text
    assert "| started as | [me/scored](https://huggingface.co/me/scored) | unknown |" in text and "- me/scored" in text

    hub.repositories["me/scored@dev"] = files | {"README.md": b"Mine."}
    python(hub, theirs, "-c", f"{LOAD}pipeline.model.push_to_hub('me/scored', revision='dev')", "me/scored")
    assert hub.repositories["me/scored@dev"]["README.md"] == b"Mine." and files["README.md"] == card


def test_a_lost_connection_is_not_taken_for_an_absent_card():
    with pytest.raises(LocalEntryNotFoundError):  # the tests run without a connection
        card_on_hub("me/star", None, None)


def test_only_what_belongs_to_a_model_is_published(model_dir, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(model_dir, directory)
    before = published_files(directory)
    expected = {"config.json", "model.safetensors", "generation_config.json", "README.md", "tokenizer.json", "processor_config.json"}
    expected |= {"decoder/model_index.json", "decoder/unet/config.json", "decoder/unet/diffusion_pytorch_model.safetensors"}
    assert expected <= set(before)
    assert set(before) == {file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file()}  # all that we save
    for name in (
        *("checkpoint-500/model.safetensors", "checkpoint-500/config.json", "checkpoints/vpit/step-1/__0_0.distcp", "trainer_state.json"),
        *("runs/events.out.tfevents.1.host.2.0", "state.pickle", "train.jsonl", "optimizer.safetensors", ".env", "decoder/.cache/x.json"),
        *("decoder/checkpoint-5/unet/diffusion_pytorch_model.safetensors", "decoder/unet/optimizer.safetensors", "decoder/rows.jsonl"),
    ):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(b"x")
    assert published_files(directory) == before


def test_a_model_without_weights_is_not_pushed(model_dir, tmp_path):
    shutil.copy(model_dir / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"no model\.safetensors but weights in safetensors were expected"):
        push_directory(tmp_path, "me/star")
    (tmp_path / "model.safetensors").write_bytes((model_dir / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"a broken model\.safetensors"):
        push_directory(tmp_path, "me/star")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"no model-00001-of-00001\.safetensors"):
        push_directory(tmp_path, "me/star")


def test_a_model_without_its_encoder_is_not_pushed(model_dir, tmp_path):
    settings = json.loads((model_dir / "config.json").read_text()) | {"vision_encoder_path": "../encoder"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"a vision encoder in \.\./encoder but a whole model is needed"):
        push_directory(tmp_path, "me/star")
    with pytest.raises(CheckpointError, match=r"no config\.json but a saved model"):
        push_directory(tmp_path / "nowhere", "me/star")
