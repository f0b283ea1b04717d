"""A diffusion transformer with flow matching as the denoiser: Sana's published layout in small, and one built from scratch."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from tests.diffusion_parts import save_sana, save_stable_diffusion
from torch.nn import functional as F

from metamorph.decoder import (
    DecoderBatch,
    DecoderModel,
    Objective,
    VisualConditioner,
    VisualDecoderPipeline,
    WeightAverage,
    build_denoiser,
    build_dit,
    build_scheduler,
    decoder_step,
    from_base,
    from_pretrained_diffusion,
    from_sana,
    from_stable_diffusion,
    widen_input,
)
from metamorph.decoder.batches import image_seeds
from metamorph.decoder.denoiser import sizes_of
from metamorph.errors import ConfigError
from metamorph.training.assembly import build_decoder
from metamorph.training.config import DecoderConfig, RunConfig, SourceConfig, StageConfig, TrainingConfig
from metamorph.training.run import run
from metamorph.training.trackers import read_metrics

# diffusers' own, each time its DPM-Solver lays out its steps with numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
K, V, CONTEXT, SAMPLE, SIZE = 4, 24, 16, 8, 64


class Quiet:
    """Shows nothing."""

    def log(self, row):
        pass

    def close(self):
        pass


@pytest.fixture(scope="module")
def sana(tmp_path_factory):
    return save_sana(tmp_path_factory.mktemp("sana"), sample_size=SAMPLE, context_width=CONTEXT)


def start(path) -> DecoderModel:
    torch.manual_seed(0)
    return from_sana(path, visual_width=V, num_visual_tokens=K, hidden_size=16)


def batch_of(n: int = 3, size: int = SIZE) -> DecoderBatch:
    generator = torch.Generator().manual_seed(0)
    tokens = F.normalize(torch.randn(n, K, V, generator=generator), dim=-1)
    pixels = torch.rand(n, 3, 1, 1, generator=generator).expand(-1, -1, size, size) * 2 - 1
    return DecoderBatch(pixels=pixels.contiguous(), tokens=tokens, seeds=image_seeds(0, 0, n))


def small_dit(map_channels: int = 0):
    torch.manual_seed(0)
    return build_dit(sample_size=4, channels=12, context_width=CONTEXT, width=32, num_layers=2, num_heads=2, map_channels=map_channels)


def small_unet():
    return build_denoiser(image_size=8, patch=2, context_width=CONTEXT, channels=(8, 8), attention=(False, True))


class TestSana:
    def test_reads_transformer_autoencoder_and_scheduler_only(self, sana, tmp_path):
        from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel

        copy = shutil.copytree(sana, tmp_path / "copy")
        shutil.rmtree(copy / "text_encoder")
        shutil.rmtree(copy / "tokenizer")
        model = start(copy)
        assert [type(part) for part in (model.denoiser, model.vae, model.scheduler)] == [
            SanaTransformer2DModel,
            AutoencoderDC,
            DPMSolverMultistepScheduler,
        ]
        saved = SanaTransformer2DModel.from_pretrained(sana, subfolder="transformer").state_dict()
        assert all(torch.equal(value, saved[name]) for name, value in model.denoiser.state_dict().items())
        assert model.prediction == "flow" and model.space.shape == (8, SAMPLE, SAMPLE) and model.space.image_size == SIZE
        assert model.objective == Objective(times="logit_normal", time_shift=3.0, condition_dropout=0.7)
        assert model.conditioner(batch_of().tokens).context.shape == (3, K, CONTEXT)  # no padding: it reads any number of rows
        chosen = from_pretrained_diffusion(sana, visual_width=V, num_visual_tokens=K)
        assert type(chosen.denoiser) is SanaTransformer2DModel and chosen.objective == model.objective

    @pytest.mark.parametrize("scheduler", ["dpm", "euler"])
    def test_loss_is_flow_matching_computed_by_hand(self, scheduler, tmp_path):
        from diffusers import AutoencoderDC

        path = save_sana(tmp_path, sample_size=SAMPLE, context_width=CONTEXT, scheduler=scheduler)
        model, batch = start(path).eval(), batch_of(6)
        draws = model.draws(batch)
        assert 0 < draws.keep.sum() < 6
        with torch.no_grad():
            loss = model.loss_terms(batch)["decoder"].mean
            latents = AutoencoderDC.from_pretrained(path, subfolder="vae").encode(batch.pixels).latent * 0.41407
            level = draws.time[:, None, None, None]
            context = model.conditioner.projector(batch.tokens) * draws.keep[:, None, None]
            noisy = (1 - level) * latents + level * draws.noise
            velocity = model.denoiser(noisy, encoder_hidden_states=context, timestep=1000 * draws.time).sample
        torch.testing.assert_close(loss, F.mse_loss(velocity, draws.noise - latents))

    def test_trains_all_but_the_autoencoder_and_the_average_follows(self, sana):
        model, batch = start(sana), batch_of(2)
        model.requires_grad_(True).train()
        model.objective = Objective(condition_dropout=0.0)
        trained = {name for name, value in model.named_parameters() if value.requires_grad}
        assert trained == {name for name, _ in model.named_parameters() if not name.startswith("vae.")} and not model.vae.training
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        average = WeightAverage(model, decay=0.5)
        optimizer = torch.optim.AdamW((value for value in model.parameters() if value.requires_grad), lr=1e-2)
        decoder_step(model, batch)["decoder"].mean.backward()
        optimizer.step()
        average.update(model)
        after = dict(model.named_parameters())
        assert {name for name in after if not torch.equal(after[name], before[name])} == trained
        name = "denoiser.proj_out.weight"
        expected = before[name].lerp(after[name].detach(), 1 - 2 / 11)  # early on the decay is (1 + updates) / (10 + updates)
        with average.applied(model):
            torch.testing.assert_close(after[name].detach(), expected)
        assert not torch.equal(after[name], expected)

    def test_draws_what_diffusers_draws(self, sana):
        """Sana's own pipeline, given our context for its text and zeros for the negative one, makes the same picture."""
        from diffusers import SanaPipeline

        model, tokens = start(sana).eval(), batch_of(2).tokens
        ours = VisualDecoderPipeline.from_model(model)
        theirs = SanaPipeline(tokenizer=None, text_encoder=None, vae=model.vae, transformer=model.denoiser, scheduler=model.scheduler)
        theirs.set_progress_bar_config(disable=True)
        with torch.no_grad():
            context = model.conditioner(tokens).context
        noise = torch.stack([torch.randn(8, SAMPLE, SAMPLE, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)])
        mask = torch.ones(context.shape[:2])
        told = {"prompt_embeds": context, "prompt_attention_mask": mask}
        untold = {"negative_prompt_embeds": torch.zeros_like(context), "negative_prompt_attention_mask": mask}
        size = {"height": SIZE, "width": SIZE, "use_resolution_binning": False}
        for scale in (4.5, 1.0):
            settings = {"num_inference_steps": 5, "guidance_scale": scale, "output_type": "pt"}
            expected = theirs(**told, **untold, **size, negative_prompt=None, latents=noise, **settings).images
            drawn = ours(tokens, seeds=[5, 6], **settings)
            assert drawn.shape == (2, 3, SIZE, SIZE) and drawn.std() > 0.01
            torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=0)
            assert torch.equal(drawn, ours(tokens, seeds=[5, 6], **settings))
            assert not torch.allclose(drawn, ours(tokens, seeds=[6, 5], **settings), atol=1e-3)

    @pytest.mark.parametrize("scheduler", ["dpm", "euler"])
    def test_saving_keeps_every_part_and_its_class(self, scheduler, tmp_path):
        path = save_sana(tmp_path / "base", sample_size=SAMPLE, context_width=CONTEXT, scheduler=scheduler)
        ours, tokens = VisualDecoderPipeline.from_model(start(path).eval()), batch_of(2).tokens
        ours.save_pretrained(tmp_path / "decoder")
        index = json.loads((tmp_path / "decoder/model_index.json").read_text())
        assert index["transformer"] == ["diffusers", "SanaTransformer2DModel"] and index["unet"] == [None, None]
        assert index["vae"] == ["diffusers", "AutoencoderDC"]
        loaded = VisualDecoderPipeline.from_pretrained(tmp_path / "decoder")
        assert {name: type(part) for name, part in loaded.components.items()} == {
            name: type(part) for name, part in ours.components.items()
        }
        assert loaded.unet is None and loaded.denoiser is loaded.transformer
        for scale in (1.0, 4.0):
            drawn = [one(tokens, num_inference_steps=3, guidance_scale=scale, seeds=[1, 2], output_type="pt") for one in (ours, loaded)]
            torch.testing.assert_close(*drawn, atol=1e-5, rtol=0)
        together = ours(tokens, num_inference_steps=3, seeds=[1, 2], output_type="pt")
        torch.testing.assert_close(together[1:], ours(tokens[1:], num_inference_steps=3, seeds=2, output_type="pt"), atol=1e-5, rtol=0)

    def test_a_run(self, sana, tmp_path):
        from tests.tiny import save_parts

        from metamorph.model.conversion import initialize

        model, processor = initialize(*save_parts(tmp_path), num_visual_tokens=K)
        model.save_pretrained(tmp_path / "model")
        processor.save_pretrained(tmp_path / "model")
        batches = SourceConfig(source="tests.drawing_examples.decoder_batches", kwargs={"side": SIZE})
        decoder = DecoderConfig(
            encoder=str(tmp_path / "model"),
            base=str(sana),
            latent=True,
            conditioner={"hidden_size": 16},
            objective={"condition_dropout": 0.5},
            batches=batches,
            ema_decay=0.9,
        )
        starts = [build_decoder(decoder, seed)[0].conditioner.projector[0].weight for seed in (0, 0, 1)]
        assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
        training = TrainingConfig(steps=3, batch_size=2, learning_rate=1e-3, device="cpu")
        stage = StageConfig(name="decoder", training=training)  # nothing is frozen by the settings: the autoencoder is anyway
        config = RunConfig(name="tiny", output_dir=str(tmp_path / "run"), decoder=decoder, stages=(stage,))
        result = run(config, tracker=lambda _: Quiet())
        losses = [row["decoder_loss"] for row in read_metrics(tmp_path / "run/metrics.jsonl") if "decoder_loss" in row]
        assert losses and all(0 < loss < 20 for loss in losses)
        pipe, before = VisualDecoderPipeline.from_pretrained(result.model_dir), start(sana)
        state = pipe.vae.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in before.vae.state_dict().items())
        assert not torch.equal(pipe.transformer.proj_out.weight, before.denoiser.proj_out.weight)
        assert torch.isfinite(pipe(batch_of(1).tokens, num_inference_steps=2, output_type="pt")).all()

    def test_refusals(self, sana, tmp_path):
        base = save_stable_diffusion(tmp_path / "sd15")
        with pytest.raises(ConfigError, match="UNet2DConditionModel in unet/ but SanaTransformer2DModel was expected"):
            from_sana(base)
        with pytest.raises(ConfigError, match="SanaTransformer2DModel in transformer/ but UNet2DConditionModel was expected"):
            from_stable_diffusion(sana)
        copy = shutil.copytree(sana, tmp_path / "copy")
        index = json.loads((copy / "model_index.json").read_text())
        (copy / "model_index.json").write_text(json.dumps(index | {"transformer": ["diffusers", "FluxTransformer2DModel"]}))
        with pytest.raises(ConfigError, match="transformer of class FluxTransformer2DModel but SanaTransformer2DModel is known"):
            start(copy)
        with pytest.raises(ConfigError, match="images of 32 x 32 pixels but 64 x 64"):
            start(sana).loss_terms(batch_of(size=32))
        with pytest.raises(ConfigError, match="both or neither of unet and transformer"):
            VisualDecoderPipeline(None, build_scheduler("flow"))

    def test_a_transformer_that_wants_its_guidance_told(self):
        """Sana Sprint's."""
        from diffusers import SanaTransformer2DModel

        heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8}
        dit = SanaTransformer2DModel(**heads, cross_attention_dim=16, num_layers=1, caption_channels=8, guidance_embeds=True)
        with pytest.raises(ConfigError, match="guidance_embeds=True but it is told only"):
            sizes_of(dit)


class TestBuiltDit:
    def test_overfits_a_batch(self):
        conditioner = VisualConditioner(V, CONTEXT, num_visual_tokens=K, hidden_size=16, sample_size=4)
        objective = Objective(time_shift=1.0, condition_dropout=0.0)
        model, batch = DecoderModel(small_dit(), build_scheduler("flow"), conditioner, objective=objective), batch_of(4, size=8)
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
        losses = []
        for step in range(150):
            loss = decoder_step(model, replace(batch, seeds=image_seeds(0, step, 4)))["decoder"].mean
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert sum(losses[-10:]) < 0.3 * sum(losses[:10])
        drawn = VisualDecoderPipeline.from_model(model.eval())(batch.tokens, output_type="pt")
        truth = batch.pixels / 2 + 0.5
        assert (drawn - truth).abs().mean() < 0.3 * (drawn - truth.roll(1, 0)).abs().mean()

    @pytest.mark.parametrize("build", [small_dit, small_unet])
    def test_both_kinds_say_their_sizes_and_widen(self, build):
        denoiser = build()
        assert sizes_of(denoiser) == (CONTEXT, 12, 0, 4)
        wide = widen_input(denoiser, 5)
        assert type(wide) is type(denoiser) and sizes_of(wide) == (CONTEXT, 12, 5, 4)

    def test_a_base_becomes_a_decoder_with_a_map_and_a_sketch(self):
        base = DecoderModel(small_dit(), build_scheduler("sample"), objective=Objective(condition_dropout=0.0))
        sizes = {"visual_width": V, "num_visual_tokens": K, "hidden_size": 8, "map_hidden_size": 8}
        batch = batch_of(2, size=8)
        told = DecoderBatch(pixels=batch.pixels, seeds=batch.seeds, context=torch.randn(2, 5, CONTEXT))
        model = from_base(base, map_channels=4, **sizes)
        torch.testing.assert_close(model.loss_terms(told)["decoder"].sum, base.loss_terms(told)["decoder"].sum)  # the map is ignored yet
        sketching = from_base(base, sketch=True, **sizes).eval()
        with torch.no_grad():
            sketch = sketching.condition(batch).sketch
        drawn = VisualDecoderPipeline.from_model(sketching)(batch.tokens, output_type="pt")
        torch.testing.assert_close(drawn, sketching.space.decode(sketch), atol=1e-5, rtol=0)

    def test_what_is_masked_is_not_read(self):
        model = DecoderModel(small_dit(), build_scheduler("flow")).eval()
        context, mask = torch.randn(1, 5, CONTEXT), torch.tensor([[True] * 3 + [False] * 2])
        other = context + torch.tensor([0, 0, 0, 1.0, 1.0])[None, :, None]
        pixels, seeds = torch.zeros(1, 3, 8, 8), (1,)
        losses = [
            model.loss_terms(DecoderBatch(pixels=pixels, seeds=seeds, context=one, context_mask=mask))["decoder"].sum
            for one in (context, other)
        ]
        torch.testing.assert_close(*losses)

    def test_heads_divide_the_width(self):
        with pytest.raises(ConfigError, match="width 30 but 4 heads"):
            build_dit(sample_size=4, channels=3, context_width=8, width=30)
