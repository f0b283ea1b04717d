"""The decoder: conditioning, objectives, training, sampling, starts, saving."""

import subprocess
import sys

import pytest
import torch
from PIL import Image
from torch.distributed.fsdp import fully_shard

from metamorph.decoder import (
    DecoderBatch,
    DecoderModel,
    DecoderStream,
    Objective,
    VisualConditioner,
    VisualDecoderPipeline,
    WeightAverage,
    build_denoiser,
    build_scheduler,
    decoder_step,
    from_base,
    microworld_denoiser,
    sketch_step,
    widen_input,
)
from metamorph.decoder.batches import image_seeds
from metamorph.decoder.objective import draw
from metamorph.decoder.schedule import noised
from metamorph.errors import AlignmentError, ConfigError

K, V, CONTEXT, SIZE, SAMPLE = 4, 12, 16, 16, 8
PREDICTIONS = ("flow", "epsilon", "v_prediction", "sample")


def tiny_unet(map_channels: int = 0):
    return build_denoiser(
        image_size=SIZE, patch=2, context_width=CONTEXT, channels=(16, 16), attention=(False, True), map_channels=map_channels
    )


def tiny_model(prediction: str = "flow", map_channels: int = 4, **objective) -> DecoderModel:
    torch.manual_seed(0)
    conditioner = VisualConditioner(
        V, CONTEXT, num_visual_tokens=K, hidden_size=16, map_channels=map_channels, map_hidden_size=16, sample_size=SAMPLE
    )
    return DecoderModel(tiny_unet(map_channels), build_scheduler(prediction), conditioner, objective=Objective(**objective))


def tiny_batch(n: int = 3, seed: int = 0, **changes) -> DecoderBatch:
    generator = torch.Generator().manual_seed(seed)
    fields = {
        "pixels": torch.rand(n, 3, SIZE, SIZE, generator=generator) * 2 - 1,
        "tokens": torch.nn.functional.normalize(torch.randn(n, K, V, generator=generator), dim=-1),
        "seeds": image_seeds(seed, 0, n),
    }
    return DecoderBatch(**(fields | changes))


def quadrants(n: int) -> DecoderBatch:
    """Images of four coloured quadrants; each token is its quadrant's colour."""
    colours = torch.rand(n, K, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1
    pixels = colours.transpose(1, 2).reshape(n, 3, 2, 2).repeat_interleave(SIZE // 2, 2).repeat_interleave(SIZE // 2, 3)
    return DecoderBatch(pixels=pixels, tokens=torch.nn.functional.pad(colours, (0, V - 3)), seeds=image_seeds(1, 0, n))


@pytest.fixture
def pipeline() -> VisualDecoderPipeline:
    return VisualDecoderPipeline.from_model(tiny_model().eval())


class TestConditioner:
    def test_pads_the_context_with_zero_rows(self):
        condition = VisualConditioner(V, CONTEXT, num_visual_tokens=K, hidden_size=8, pad_to=7)(tiny_batch().tokens)
        assert condition.context.shape == (3, 7, CONTEXT)
        assert condition.map is None
        assert not condition.context[:, K:].any()
        assert condition.context[:, :K].abs().amax(dim=-1).gt(0).all()

    def test_a_token_describes_its_own_patch_most(self):
        conditioner = VisualConditioner(
            V, CONTEXT, num_visual_tokens=K, hidden_size=8, map_channels=3, map_hidden_size=16, sample_size=SAMPLE
        )
        tokens = tiny_batch(40).tokens
        changed = tokens.clone()
        changed[:, 1] = tokens.roll(1, 0)[:, 1]  # top right
        with torch.no_grad():
            difference = (conditioner(changed).map - conditioner(tokens).map).abs().mean(dim=(0, 1))
        inside = difference[:4, 4:].mean()
        assert inside > difference[:4, :4].mean() > 0  # its neighbour
        assert inside > difference[4:, :4].mean() > 0  # the one across

    def test_refuses_other_tokens_and_sizes(self):
        conditioner = VisualConditioner(V, CONTEXT, num_visual_tokens=K, hidden_size=8)
        with pytest.raises(AlignmentError, match="9 x 12 visual tokens but 4 x 12"):
            conditioner(torch.zeros(1, 9, V))
        with pytest.raises(ConfigError, match="5 visual tokens but a square grid"):
            VisualConditioner(V, CONTEXT, num_visual_tokens=5, map_channels=3)
        with pytest.raises(ConfigError, match="pad_to=3"):
            VisualConditioner(V, CONTEXT, num_visual_tokens=5, pad_to=3)


class TestObjective:
    @pytest.mark.parametrize("prediction", PREDICTIONS)
    def test_target_leads_back_to_the_image(self, prediction):
        """From the noisy sample and the target, the clean sample follows: the parametrisation is the scheduler's."""
        scheduler = build_scheduler(prediction)
        clean, noise = torch.randn(2, 2, 12, 4, 4).unbind()
        time = torch.tensor([0.2, 0.7])
        noisy, timesteps, target = noised(scheduler, clean, noise, time)
        level = time[:, None, None, None]
        if prediction == "flow":
            torch.testing.assert_close(noisy - level * target, clean)
            torch.testing.assert_close(timesteps, time * 1000)
            return
        if prediction == "sample":
            assert target is clean
            return
        signal = scheduler.alphas_cumprod[timesteps][:, None, None, None].sqrt()
        sigma = (1 - signal**2).sqrt()
        back = (noisy - sigma * target) / signal if prediction == "epsilon" else signal * noisy - sigma * target
        torch.testing.assert_close(back, clean, rtol=1e-4, atol=1e-4)

    def test_time_shift_visits_noise_more_often(self):
        seeds = image_seeds(0, 0, 400)
        plain, shifted = (draw(seeds, Objective(time_shift=shift), (1, 1, 1), None).time for shift in (1.0, 3.0))
        assert 0.45 < plain.mean() < 0.55
        torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))
        centred = draw(seeds, Objective(times="logit_normal", time_shift=1.0), (1, 1, 1), None).time
        assert (centred > 0.9).float().mean() < 0.05 < (plain > 0.9).float().mean()

    def test_dropout_is_the_share_of_images_that_are_told_nothing(self):
        kept = draw(image_seeds(0, 0, 400), Objective(condition_dropout=0.7), (1, 1, 1), None).keep
        assert 0.25 < kept.float().mean() < 0.35
        model = tiny_model()
        condition = model.condition(tiny_batch(2)).where(torch.tensor([True, False]))
        assert condition.context[0].any()
        assert not condition.context[1].any()
        assert not condition.map[1].any()

    def test_condition_noise_turns_tokens_and_keeps_their_length(self):
        seen = []
        model, batch = tiny_model(condition_noise=0.5), tiny_batch(50)
        model.conditioner.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model.loss_terms(batch)
        torch.testing.assert_close(seen[0].norm(dim=-1), torch.ones(50, K))
        cosine = (seen[0] * batch.tokens).sum(dim=-1).mean()
        assert 0.84 < cosine < 0.95  # 1 / sqrt(1 + 0.5^2) = 0.89

    @pytest.mark.parametrize("prediction", PREDICTIONS)
    def test_draws_do_not_depend_on_the_rest_of_the_batch(self, prediction):
        model, batch = tiny_model(prediction).eval(), tiny_batch(3)
        whole = decoder_step(model, batch)["decoder"]
        alone = [
            decoder_step(model, DecoderBatch(pixels=batch.pixels[i : i + 1], tokens=batch.tokens[i : i + 1], seeds=batch.seeds[i : i + 1]))
            for i in range(3)
        ]
        torch.testing.assert_close(whole.sum, sum(one["decoder"].sum for one in alone))
        assert int(whole.count) == 3 == batch.target_counts["decoder"]
        assert torch.equal(whole.sum, decoder_step(model, batch)["decoder"].sum)
        other = decoder_step(model, tiny_batch(3, seeds=image_seeds(0, 1, 3)))["decoder"]
        assert whole.sum != other.sum

    def test_settings_are_checked(self):
        with pytest.raises(ConfigError, match="condition_dropout"):
            Objective(condition_dropout=1.5)


class TestSketch:
    """The spatial path's map as a first guess of the picture."""

    def model(self, **changes) -> DecoderModel:
        torch.manual_seed(0)
        base = DecoderModel(tiny_unet(), build_scheduler("sample"), objective=Objective(condition_dropout=0.0))
        sizes = {"visual_width": V, "num_visual_tokens": K, "hidden_size": 8, "map_hidden_size": 16}
        return from_base(base, **(sizes | {"sketch": True} | changes))

    def test_a_decoder_begins_by_drawing_its_sketch(self):
        model, batch = self.model().eval(), tiny_batch()
        sketch = model.condition(batch).sketch
        assert sketch.shape == (3, 12, SAMPLE, SAMPLE)
        drawn = VisualDecoderPipeline.from_model(model)(batch.tokens, output_type="pt")
        torch.testing.assert_close(drawn, model.space.decode(sketch.detach()), atol=1e-5, rtol=0)
        torch.testing.assert_close(
            decoder_step(model, batch)["decoder"].sum, 2 * sketch_step(model, batch)["decoder"].sum, atol=1e-5, rtol=1e-5
        )

    def test_an_image_that_is_told_nothing_has_no_sketch(self):
        condition = self.model().condition(tiny_batch(2)).where(torch.tensor([True, False]))
        assert condition.sketch[0].any() and not condition.sketch[1].any()

    def test_a_first_stage_teaches_the_spatial_path_alone(self):
        model = self.model()
        sketch_step(model, tiny_batch())["decoder"].sum.backward()
        assert all(value.grad is not None for value in model.conditioner.spatial.parameters())
        assert all(value.grad is None for value in model.denoiser.parameters())
        with pytest.raises(ConfigError, match="without sketch"):
            sketch_step(tiny_model(), tiny_batch())

    def test_learns_coloured_quadrants_quickly(self):
        model, batch = self.model(), quadrants(6)
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
        for _ in range(80):
            loss = sketch_step(model, batch)["decoder"].mean
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert loss < 0.01

    def test_a_sketch_needs_a_denoiser_of_clean_samples(self):
        with pytest.raises(ConfigError, match=r"12 channels and flow prediction but 12 channels and sample prediction"):
            from_base(DecoderModel(tiny_unet(), build_scheduler("flow")), visual_width=V, num_visual_tokens=K, sketch=True)
        with pytest.raises(ConfigError, match=r"map_channels=3 but a multiple of map_fold\^2 = 4"):
            VisualConditioner(V, CONTEXT, num_visual_tokens=K, map_channels=3, map_fold=2, sample_size=SAMPLE)


class TestTraining:
    def test_learns_coloured_quadrants(self):
        model, batch = tiny_model(condition_dropout=0.0), quadrants(6)
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
        average = WeightAverage(model, decay=0.9)
        stream = DecoderStream(lambda step: DecoderBatch(pixels=batch.pixels, tokens=batch.tokens, seeds=image_seeds(0, step, 6)))
        losses = []
        for _ in range(60):
            (micro_batch,) = next(stream)
            loss = decoder_step(model, micro_batch)["decoder"].mean
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update(model)
            losses.append(float(loss.detach()))
        assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
        with average.applied(model):
            drawn = VisualDecoderPipeline.from_model(model.eval())(batch.tokens, output_type="pt")
        truth = batch.pixels / 2 + 0.5
        error, wrong = (drawn - truth).abs().mean(), (drawn - truth.roll(1, 0)).abs().mean()
        assert error < 0.8 * wrong

    def test_every_parameter_learns(self):
        model = tiny_model(condition_dropout=0.0)
        decoder_step(model, tiny_batch())["decoder"].sum.backward()
        assert not [name for name, value in model.named_parameters() if value.grad is None]

    def test_stream_resumes_where_it_stopped(self):
        def make(step):
            return tiny_batch(seed=step)

        stream, other = DecoderStream(make), DecoderStream(make)
        next(stream), next(stream)
        other.load_state_dict(stream.state_dict())
        assert torch.equal(next(stream)[0].pixels, next(other)[0].pixels)

    def test_batch_needs_one_condition_and_one_seed_per_image(self):
        with pytest.raises(AlignmentError, match="0 of `tokens` and `context`"):
            tiny_batch(tokens=None)
        with pytest.raises(AlignmentError, match="2 seeds but 3 images"):
            tiny_batch(seeds=(1, 2))

    def test_average_follows_and_is_put_back(self):
        model = torch.nn.Linear(2, 1, bias=False)
        average = WeightAverage(model, decay=0.5)
        before = model.weight.detach().clone()
        with torch.no_grad():
            model.weight += 1
        average.update(model)
        torch.testing.assert_close(average.state_dict()["weight"], before + 1 - 2 / 11)
        with average.applied(model):
            torch.testing.assert_close(model.weight.detach(), before + 1 - 2 / 11)
        torch.testing.assert_close(model.weight.detach(), before + 1)
        other = WeightAverage(model, decay=0.5)
        other.load_state_dict({name: value.clone() for name, value in average.state_dict().items()})
        assert int(other.updates) == 1
        with pytest.raises(ConfigError, match="averages of"):
            other.load_state_dict({"updates": torch.zeros(()), "bias": torch.zeros(1)})

    def test_average_follows_a_model_that_is_sharded_later(self):
        model = torch.nn.Linear(2, 1, bias=False)
        before = model.weight.detach().clone()
        average = WeightAverage(model, decay=0.5)
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
        try:
            fully_shard(model)
            with torch.no_grad():
                model.weight += 1
            average.update(model)
            torch.testing.assert_close(average.state_dict()["weight"].full_tensor(), before + 1 - 2 / 11)
            average.copy_to(model)
            torch.testing.assert_close(model.weight.detach().full_tensor(), before + 1 - 2 / 11)
        finally:
            torch.distributed.destroy_process_group()


class TestStarts:
    def test_text_conditioned_base_becomes_a_decoder(self):
        base = DecoderModel(tiny_unet(), build_scheduler("flow"))
        batch = tiny_batch(tokens=None, context=torch.randn(3, 5, CONTEXT), context_mask=torch.tensor([[True] * 3 + [False] * 2] * 3))
        loss = base.loss_terms(batch)["decoder"].sum
        other = tiny_batch(tokens=None, context=batch.context + torch.eye(5)[4][None, :, None], context_mask=batch.context_mask)
        torch.testing.assert_close(base.loss_terms(other)["decoder"].sum, loss)  # what is masked is not read
        with pytest.raises(ConfigError, match="no conditioner"):
            base.loss_terms(tiny_batch())

        model = from_base(base, visual_width=V, num_visual_tokens=K, hidden_size=8, map_channels=4, map_hidden_size=8)
        torch.testing.assert_close(model.loss_terms(batch)["decoder"].sum, loss)  # still does what the base does
        model.loss_terms(tiny_batch())["decoder"].sum.backward()
        assert model.denoiser.conv_in.weight.grad[:, 12:].any()
        assert base.denoiser.conv_in.weight.shape[1] == 12

    def test_widened_denoiser_ignores_new_channels_at_first(self):
        unet = tiny_unet().eval()
        wide = widen_input(unet, 3).eval()
        sample, context = torch.randn(2, 12, SAMPLE, SAMPLE), torch.randn(2, K, CONTEXT)
        with torch.no_grad():
            expected = unet(sample, 10, context).sample
            torch.testing.assert_close(wide(torch.cat([sample, torch.randn(2, 3, SAMPLE, SAMPLE)], 1), 10, context).sample, expected)

    def test_microworld_denoiser_is_small_and_of_the_right_shape(self):
        unet = microworld_denoiser(context_width=64, map_channels=48)
        with torch.no_grad():
            assert unet(torch.zeros(1, 96, 16, 16), 0, torch.zeros(1, 16, 64)).sample.shape == (1, 48, 16, 16)
        assert sum(value.numel() for value in unet.parameters()) < 4e6

    def test_parts_must_fit(self):
        conditioner = VisualConditioner(V, CONTEXT + 1, num_visual_tokens=K, hidden_size=8)
        with pytest.raises(ConfigError, match="context width 17 but a denoiser with 16"):
            DecoderModel(tiny_unet(), build_scheduler("flow"), conditioner)
        with pytest.raises(ConfigError, match="map channels 0 but a denoiser with 4"):
            DecoderModel(tiny_unet(4), build_scheduler("flow"), VisualConditioner(V, CONTEXT, num_visual_tokens=K, hidden_size=8))
        with pytest.raises(ConfigError, match="18 pixels but 2 resolutions"):
            build_denoiser(image_size=18, patch=2, context_width=8, channels=(8, 8), attention=(False, True))
        with pytest.raises(ConfigError, match="Resize the images"):
            tiny_model().loss_terms(tiny_batch(pixels=torch.zeros(3, 3, 32, 32)))


class TestPipeline:
    @pytest.mark.parametrize("prediction", PREDICTIONS)
    def test_saving_is_the_identity(self, prediction, tmp_path):
        pipe = VisualDecoderPipeline.from_model(tiny_model(prediction).eval())
        pipe.save_pretrained(tmp_path)
        assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
        loaded = VisualDecoderPipeline.from_pretrained(tmp_path)
        state, other = pipe.unet.state_dict(), loaded.unet.state_dict()
        assert all(torch.equal(state[name], other[name]) for name in state | other)
        tokens = tiny_batch().tokens
        assert torch.equal(pipe(tokens, output_type="pt"), loaded(tokens, output_type="pt"))
        assert torch.isfinite(loaded(tokens, output_type="pt")).all()

    def test_half_precision_on_disk_is_float32_in_memory(self, pipeline, tmp_path):
        pipeline.save_pretrained(tmp_path / "half", dtype=torch.float16)
        pipeline.save_pretrained(tmp_path / "full")
        assert pipeline.unet.dtype == torch.float32
        sizes = [(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size for name in ("half", "full")]
        assert sizes[0] < 0.6 * sizes[1]
        loaded = VisualDecoderPipeline.from_pretrained(tmp_path / "half")
        assert {value.dtype for part in (loaded.unet, loaded.conditioner) for value in part.parameters()} == {torch.float32}
        tokens = tiny_batch().tokens
        torch.testing.assert_close(pipeline(tokens, output_type="pt"), loaded(tokens, output_type="pt"), atol=0.02, rtol=0)

    def test_an_image_depends_on_its_tokens_and_seed_only(self, pipeline):
        tokens = tiny_batch().tokens
        together = pipeline(tokens, num_inference_steps=3, seeds=[5, 6, 7], output_type="pt")
        alone = pipeline(tokens[1:2], num_inference_steps=3, seeds=6, output_type="pt")
        torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=0)
        assert not torch.equal(alone, pipeline(tokens[1:2], num_inference_steps=3, seeds=7, output_type="pt"))

    def test_guidance_goes_past_the_conditioned_prediction(self, pipeline):
        tokens = tiny_batch().tokens
        plain, guided = (pipeline(tokens, num_inference_steps=3, guidance_scale=scale, output_type="pt") for scale in (1.0, 4.0))
        assert not torch.allclose(plain, guided)
        untold = pipeline(tokens, num_inference_steps=3, guidance_scale=0.0, output_type="pt")
        torch.testing.assert_close(untold, pipeline(tokens.flip(0), num_inference_steps=3, guidance_scale=0.0, output_type="pt"))

    def test_gives_pictures_and_is_silent(self, pipeline, capsys):
        pictures = pipeline(tiny_batch(2).tokens, num_inference_steps=2)
        assert [type(one) for one in pictures] == [Image.Image] * 2
        assert pictures[0].size == (SIZE, SIZE)
        assert pipeline(torch.zeros(0, K, V)) == []
        assert pipeline(torch.zeros(0, K, V), output_type="pt").shape == (0, 3, SIZE, SIZE)
        captured = capsys.readouterr()
        assert not captured.out
        assert not captured.err

    def test_calls_the_denoiser_as_often_as_asked(self, pipeline):
        times = []
        pipeline.unet.register_forward_pre_hook(lambda _, args, kwargs: times.append(float(kwargs["timestep"])), with_kwargs=True)
        pipeline(tiny_batch(1).tokens, num_inference_steps=4)
        assert times == [1000.0, 750.0, 500.0, 250.0]

    def test_refuses_wrong_seeds_and_pickle(self, pipeline, tmp_path):
        with pytest.raises(AlignmentError, match="2 seeds but 3 images"):
            pipeline(tiny_batch().tokens, seeds=[1, 2])
        with pytest.raises(ConfigError, match="only safetensors"):
            pipeline.save_pretrained(tmp_path, safe_serialization=False)
        with pytest.raises(ConfigError, match="pickle is never loaded"):
            VisualDecoderPipeline.from_pretrained(tmp_path, use_safetensors=False)

    def test_a_base_is_saved_and_draws_from_context(self, tmp_path):
        base = VisualDecoderPipeline.from_model(DecoderModel(tiny_unet(), build_scheduler("flow")).eval())
        base.save_pretrained(tmp_path)
        loaded = VisualDecoderPipeline.from_pretrained(tmp_path)
        assert loaded.conditioner is None
        context, mask = torch.randn(2, 5, CONTEXT), torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
        drawn = [
            one(context=context, context_mask=mask, num_inference_steps=2, guidance_scale=2.0, output_type="pt") for one in (base, loaded)
        ]
        assert torch.equal(*drawn)
        with pytest.raises(ConfigError, match="no conditioner"):
            loaded(tiny_batch().tokens)
        with pytest.raises(ConfigError, match="exactly one is needed"):
            loaded()


def test_missing_diffusers_is_named_only_when_the_decoder_is_used():
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "import metamorph, metamorph.decoder\n"
        "for use in (lambda: metamorph.decoder.DecoderModel, lambda: metamorph.VisualDecoderPipeline):\n"
        "    try: use()\n"
        "    except ImportError as error: assert 'pip install' in str(error) and 'diffusers>=0.42' in str(error), error\n"
        "    else: raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
