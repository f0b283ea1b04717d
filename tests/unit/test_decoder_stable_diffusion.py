"""The paper's decoder start: a directory laid out as Stable Diffusion 1.5, tiny and random, through start, loss, training and sampling."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.diffusion_parts import WEIGHTS, save_stable_diffusion
from torch.nn import functional as F
from typer.testing import CliRunner

from metamorph.decoder import (
    DecoderBatch,
    DecoderModel,
    VisualConditioner,
    VisualDecoderPipeline,
    from_pretrained_diffusion,
    from_stable_diffusion,
)
from metamorph.decoder.batches import image_seeds
from metamorph.decoder.schedule import load_scheduler
from metamorph.errors import CheckpointError, ConfigError
from metamorph.training.config import TrainingConfig
from metamorph.training.optim import build_optimizer
from metamorph.training.stages import select_trainable

K, V, CONTEXT, SAMPLE, SIZE = 64, 12, 32, 8, 64


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    return save_stable_diffusion(tmp_path_factory.mktemp("sd15"), sample_size=SAMPLE, context_width=CONTEXT)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A saved MetaMorph whose encoder wants pixels scaled otherwise than the decoder's."""
    from tests.tiny import save_parts

    from metamorph.model.conversion import initialize

    root = tmp_path_factory.mktemp("encoder")
    model, processor = initialize(*save_parts(root), num_visual_tokens=4, image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.3, 0.2))
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    return root / "model"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Lone images as JSON lines, without captions, not square."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    lines = []
    for number in range(5):
        Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(root / f"{number}.png")
        lines.append(json.dumps({"messages": [{"role": "user", "content": [{"type": "image", "path": f"{number}.png"}]}]}))
    (root / "images.jsonl").write_text("\n".join(lines) + "\n")
    return root / "images.jsonl"


@pytest.fixture
def copied(sd15, tmp_path):
    return shutil.copytree(sd15, tmp_path / "copy")


def start(path, seed: int = 0) -> DecoderModel:
    torch.manual_seed(seed)
    return from_stable_diffusion(path, visual_width=V, num_visual_tokens=K, hidden_size=16)


def batch_of(n: int = 3) -> DecoderBatch:
    generator = torch.Generator().manual_seed(0)
    tokens = F.normalize(torch.randn(n, K, V, generator=generator), dim=-1)
    pixels = torch.rand(n, 3, SIZE, SIZE, generator=generator) * 2 - 1
    return DecoderBatch(pixels=pixels, tokens=tokens, seeds=image_seeds(0, 0, n))


def edit(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestStart:
    def test_reads_what_diffusers_reads_and_nothing_beside_it(self, sd15, copied):
        from diffusers import StableDiffusionPipeline

        with pytest.warns(FutureWarning, match="sample_size"):  # tiny
            whole = StableDiffusionPipeline.from_pretrained(sd15, use_safetensors=True)
        assert type(whole.safety_checker).__name__ == "StableDiffusionSafetyChecker" and whole.tokenizer("a b").input_ids[0] == 4
        for folder in ("text_encoder", "tokenizer", "safety_checker", "feature_extractor"):
            for path in (copied / folder).iterdir():
                path.write_bytes(b"not to be read")
        model = start(copied)
        for ours, theirs in ((model.denoiser, whole.unet), (model.vae, whole.vae)):
            theirs = theirs.state_dict()
            assert all(torch.equal(value, theirs.pop(name)) for name, value in ours.state_dict().items())
            assert not theirs and ours.dtype == torch.float32
        assert model.vae.config["scaling_factor"] == 0.18215
        assert from_pretrained_diffusion(sd15, visual_width=V, num_visual_tokens=K).prediction == "epsilon"

    def test_the_schedule_is_its_own(self, sd15, copied):
        from diffusers import PNDMScheduler

        ours, own = start(sd15).scheduler, PNDMScheduler.from_pretrained(sd15, subfolder="scheduler")
        assert torch.equal(ours.alphas_cumprod, own.alphas_cumprod)
        assert ours.alphas_cumprod[[0, -1]].tolist() == pytest.approx([0.99915, 0.00466], abs=1e-5)
        assert ours.final_alpha_cumprod == own.final_alpha_cumprod == ours.alphas_cumprod[0]
        ours.set_timesteps(50), own.set_timesteps(50)
        assert sorted(ours.timesteps.tolist()) == sorted(set(own.timesteps.tolist()))  # PNDM takes one of them twice
        assert ours.timesteps[[0, -1]].tolist() == [981, 1]
        settings = json.loads((copied / "scheduler/scheduler_config.json").read_text())
        del settings["clip_sample"]  # PNDM knows no such setting, but DDIM would clip latents at 1
        (copied / "scheduler/scheduler_config.json").write_text(json.dumps(settings))
        assert load_scheduler(copied, latent=True).config["clip_sample"] is False

    def test_the_projector_is_the_papers(self, sd15):
        paper = from_stable_diffusion(sd15).conditioner.projector
        kinds = ["Linear", "LayerNorm", "ReLU", "Linear", "LayerNorm"]
        assert [type(layer).__name__ for layer in paper] == kinds
        assert [paper[0].in_features, paper[0].out_features, paper[3].out_features] == [1152, 2048, CONTEXT]
        context = start(sd15).conditioner(batch_of().tokens).context
        assert context.shape == (3, 77, CONTEXT)
        assert not context[:, K:].any() and context[:, :K].any(dim=-1).all()

    def test_loss_is_the_one_computed_by_hand(self, sd15):
        """Noise prediction on scaled latents, with diffusers' own scheduler and VAE, and zeros for what is dropped."""
        from diffusers import AutoencoderKL, PNDMScheduler

        model, batch = start(sd15).eval(), batch_of(6)
        draws = model.draws(batch)
        assert 0 < draws.keep.sum() < 6
        with torch.no_grad():
            term = model.loss_terms(batch)["decoder"]
            posterior = AutoencoderKL.from_pretrained(sd15, subfolder="vae", use_safetensors=True).encode(batch.pixels).latent_dist
            latents = 0.18215 * (posterior.mean + posterior.std * draws.latent_noise)
            timesteps = (draws.time * 1000).long()
            noisy = PNDMScheduler.from_pretrained(sd15, subfolder="scheduler").add_noise(latents, draws.noise, timesteps)
            context = torch.zeros(6, 77, CONTEXT)
            context[:, :K] = model.conditioner.projector(batch.tokens)
            context[~draws.keep] = 0
            predicted = model.denoiser(noisy, timesteps, context).sample
        assert model.space.shape == (4, SAMPLE, SAMPLE) and int(term.count) == 6
        torch.testing.assert_close(term.mean, F.mse_loss(predicted, draws.noise))

    def test_seventy_percent_are_told_nothing(self, sd15):
        model = start(sd15)
        seeds = image_seeds(0, 0, 400)
        batch = DecoderBatch(pixels=torch.zeros(400, 3, 1, 1), tokens=torch.zeros(400, K, V), seeds=seeds)
        draws = model.draws(batch)
        assert 0.25 < draws.keep.float().mean() < 0.35
        assert 0.45 < draws.time.mean() < 0.55  # uniform

    def test_the_vae_is_never_trained(self, sd15):
        model = start(sd15).train()
        select_trainable(model, None)
        trained = {name for name, value in model.named_parameters() if value.requires_grad}
        assert trained == {name for name, _ in model.named_parameters() if not name.startswith("vae.")}
        optimized = [value for group in build_optimizer(model, TrainingConfig(steps=1)).param_groups for value in group["params"]]
        assert {id(value) for value in optimized} == {id(value) for name, value in model.named_parameters() if name in trained}
        assert not model.vae.training
        model.objective = type(model.objective)(time_shift=1.0, condition_dropout=0.0)
        model.loss_terms(batch_of())["decoder"].sum.backward()
        assert {name for name, value in model.named_parameters() if value.grad is not None} == trained


class TestDrawing:
    def test_draws_what_diffusers_draws(self, sd15):
        """Stable Diffusion's own pipeline, given our context for its text and zeros for the negative one, makes the same picture."""
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        model, tokens = start(sd15).eval(), batch_of(2).tokens
        ours = VisualDecoderPipeline.from_model(model)
        with pytest.warns(FutureWarning, match="sample_size"):  # tiny
            theirs = StableDiffusionPipeline.from_pretrained(sd15, use_safetensors=True, safety_checker=None, requires_safety_checker=False)
        theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config)
        theirs.set_progress_bar_config(disable=True)
        with torch.no_grad():
            context = model.conditioner(tokens).context
        noise = torch.stack([torch.randn(4, SAMPLE, SAMPLE, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)])
        settings = {"num_inference_steps": 5, "guidance_scale": 7.5, "output_type": "pt"}
        told = {"prompt_embeds": context, "negative_prompt_embeds": torch.zeros_like(context)}
        expected = theirs(**told, latents=noise, height=SIZE, width=SIZE, **settings).images
        drawn = ours(tokens, seeds=[5, 6], **settings)
        assert drawn.shape == (2, 3, SIZE, SIZE) and drawn.std() > 0.01
        torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=0)
        assert torch.equal(drawn, ours(tokens, seeds=[5, 6], **settings))
        assert not torch.allclose(drawn, ours(tokens, seeds=[6, 5], **settings), atol=1e-3)

    def test_saving_keeps_every_part_and_its_class(self, sd15, tmp_path):
        ours, tokens = VisualDecoderPipeline.from_model(start(sd15).eval()), batch_of(1).tokens
        ours.save_pretrained(tmp_path)
        loaded = VisualDecoderPipeline.from_pretrained(tmp_path)
        for name, part in ours.components.items():
            assert type(loaded.components[name]) is type(part)
            if isinstance(part, torch.nn.Module):
                state = loaded.components[name].state_dict()
                assert all(torch.equal(value, state[key]) for key, value in part.state_dict().items())
        assert loaded.scheduler.config["steps_offset"] == 1 and loaded.vae.config["scaling_factor"] == 0.18215
        drawn = [one(tokens, num_inference_steps=2, guidance_scale=6.0, output_type="pt") for one in (ours, loaded)]
        torch.testing.assert_close(*drawn, atol=1e-5, rtol=0)  # equal weights at other addresses may take another CPU kernel


class TestRecipe:
    """`metamorph train sd15_decoder`, in small."""

    def train(self, sd15, encoder, pictures, out, *options, **changes):
        from metamorph.cli.main import build_app

        settings = {
            "decoder.encoder": encoder,
            "decoder.base": sd15,
            "decoder.conditioner.hidden_size": 16,
            "decoder.batches.kwargs.kwargs.path": pictures,
            "decoder.batches.kwargs.image_size": SIZE,
            "stages.0.training.steps": 2,
            "stages.0.training.batch_size": 4,
            "stages.0.training.micro_batch_size": 2,
            "stages.0.training.learning_rate": 0.01,
            "stages.0.training.warmup_ratio": 0,
            "stages.0.training.device": "cpu",
        }
        assignments = [word for name, value in (settings | changes).items() for word in ("--set", f"{name}={value}")]
        return CliRunner().invoke(build_app(), ["train", "sd15_decoder", *assignments, "--output-dir", str(out), *options])

    def test_dry_run_needs_the_shapes_only(self, copied, encoder, pictures, tmp_path):
        for path in copied.rglob("*.safetensors"):
            path.unlink()
        result = self.train(copied, encoder, pictures, tmp_path, "--dry-run")
        assert result.exit_code == 0, result.exception
        rows = [line.split() for line in result.output.splitlines()]
        counts = {row[0]: row[1:] for row in rows if row and row[0] in ("denoiser", "conditioner", "vae")}
        assert counts["denoiser"][0] == counts["denoiser"][1] and counts["conditioner"][0] == counts["conditioner"][1]
        assert counts["vae"][1] == "-"
        assert not (tmp_path / "config.yaml").exists()

    def test_trains_projector_and_unet_and_keeps_the_vae(self, sd15, encoder, pictures, tmp_path):
        result = self.train(sd15, encoder, pictures, tmp_path / "run")
        assert result.exit_code == 0, result.exception
        pipe = VisualDecoderPipeline.from_pretrained(tmp_path / "run/model")
        before = start(sd15)
        assert pipe.conditioner.config["pad_to"] == 77 and pipe.conditioner.config["visual_width"] == 24
        vae, unet = pipe.vae.state_dict(), pipe.unet.state_dict()
        assert all(torch.equal(value, vae[name]) for name, value in before.vae.state_dict().items())
        assert not any(torch.equal(value, unet[name]) for name, value in before.denoiser.state_dict().items())
        tokens = F.normalize(torch.randn(2, 4, 24, generator=torch.Generator().manual_seed(0)), dim=-1)
        drawn = [
            pipe(tokens, seeds=seeds, num_inference_steps=3, guidance_scale=6.0, output_type="pt") for seeds in ([1, 2], [1, 2], [3, 2])
        ]
        assert torch.equal(drawn[0], drawn[1]) and torch.isfinite(drawn[0]).all()
        assert not torch.allclose(drawn[0][0], drawn[2][0], atol=1e-3)

    def test_the_encoder_reads_images_as_its_processor_prepares_them(self, encoder, pictures):
        from metamorph.messages import ImagePart
        from metamorph.model.conversion import load
        from metamorph.training.assembly import TokenEncoder
        from metamorph.training.images import image_batches

        model, processor = load(encoder)
        settings = {"source": "metamorph.data.source.open_source", "kwargs": {"path": str(pictures), "needs_answer": False}}
        batch = image_batches(TokenEncoder(model, processor), 2, 0, image_size=SIZE, **settings)(0)
        number = int(batch.ids[0].rpartition(":")[2]) - 1
        pixels = torch.from_numpy(processor.prepare_image(ImagePart(pictures.parent / f"{number}.png")))
        torch.testing.assert_close(batch.tokens[:1], model.encode_images(pixels[None]))
        assert batch.pixels.shape == (2, 3, SIZE, SIZE) and -1 <= batch.pixels.min() < 0 < batch.pixels.max() <= 1

    def test_refusals(self, sd15, encoder, pictures, tmp_path):
        cases = (
            ({"decoder.batches.kwargs.image_size": 32}, "images of 32 x 32 pixels but 64 x 64 .*8 x 8 positions, each 8 pixels wide"),
            ({"decoder.conditioner.hidden_sise": 16}, "Did you mean 'hidden_size'"),
            ({"decoder.objective.dropout": 0.1}, "Did you mean 'condition_dropout'"),
            ({"decoder.base": tmp_path / "nowhere"}, "no such directory but a saved diffusion model was expected"),
        )
        for number, (changes, message) in enumerate(cases):
            result = self.train(sd15, encoder, pictures, tmp_path / str(number), **changes)
            with pytest.raises((ConfigError, CheckpointError), match=message):
                raise result.exception


class TestRefusals:
    def test_a_directory_of_another_layout(self, copied, tmp_path):
        (tmp_path / "weights.safetensors").write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"no readable model_index.json .* Give a directory laid out as Stable Diffusion 1.5"):
            start(tmp_path)
        edit(copied / "model_index.json", vae=[None, None])
        with pytest.raises(CheckpointError, match="but a vae, a scheduler and a unet or transformer are needed"):
            start(copied)
        edit(copied / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
        with pytest.raises(ConfigError, match="vae of class AutoencoderTiny but AutoencoderKL or AutoencoderDC is known"):
            start(copied)

    def test_a_part_that_is_not_there(self, copied):
        shutil.rmtree(copied / "unet")
        with pytest.raises(CheckpointError, match=r"no unet/ but config.json and"):
            start(copied)

    def test_pickled_weights(self, copied):
        for path in (copied / "unet").glob("*.safetensors"):
            path.unlink()
        with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model.bin.*pickle is never read.*Convert pickled weights"):
            start(copied)

    def test_weights_that_are_not_all_there(self, copied):
        state = load_file(copied / "unet" / WEIGHTS)
        del state["conv_in.weight"]
        save_file(state, copied / "unet" / WEIGHTS)
        with pytest.raises(CheckpointError, match=r"1 tensors absent, such as conv_in.weight"):
            start(copied)

    def test_a_scheduler_without_betas(self, copied):
        edit(copied / "scheduler/scheduler_config.json", _class_name="EDMEulerScheduler", beta_schedule=None)
        (copied / "scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": "SCMScheduler", "prediction_type": "trigflow"}))
        with pytest.raises(ConfigError, match="SCMScheduler but one with betas"):
            start(copied)
        (copied / "scheduler/scheduler_config.json").unlink()
        with pytest.raises(CheckpointError, match=r"no readable scheduler/scheduler_config.json"):
            start(copied)

    def test_a_conditioner_of_another_width(self, sd15):
        model = start(sd15)
        conditioner = VisualConditioner(V, CONTEXT + 8, num_visual_tokens=K, hidden_size=8, pad_to=77, sample_size=SAMPLE)
        with pytest.raises(ConfigError, match="conditioner with context width 40 but a denoiser with 32"):
            DecoderModel(model.denoiser, model.scheduler, conditioner, model.vae)

    def test_a_denoiser_that_wants_more_than_a_context(self, copied):
        edit(copied / "unet/config.json", addition_embed_type="text")  # as Stable Diffusion XL's kind of conditioning
        state = load_file(copied / "unet" / WEIGHTS)
        from diffusers import UNet2DConditionModel

        save_file(
            UNet2DConditionModel.from_config(json.loads((copied / "unet/config.json").read_text())).state_dict() | state,
            copied / "unet" / WEIGHTS,
        )
        with pytest.raises(ConfigError, match="addition_embed_type='text' but it is told only a sample, a time and a context"):
            start(copied)

    def test_a_vae_of_other_channels(self, sd15):
        from diffusers import AutoencoderKL

        model = start(sd15)
        with pytest.raises(ConfigError, match="a VAE of 8 latent channels but a denoiser of 4"):
            DecoderModel(model.denoiser, model.scheduler, vae=AutoencoderKL(latent_channels=8, block_out_channels=(8,), norm_num_groups=4))
