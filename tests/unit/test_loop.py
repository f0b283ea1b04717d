"""The loop, with a small real module: normalisation, errors, metrics, resume."""

import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metamorph.errors import AlignmentError, CheckpointError, NonFiniteLossError
from metamorph.losses import LossTerm
from metamorph.training import TrainingConfig, train
from metamorph.training.trackers import SilentTracker, read_metrics

CONFIG = TrainingConfig(steps=8, learning_rate=1e-2, precision="float32", log_every=1, device="cpu")


@dataclass(frozen=True)
class Points:
    """Rows x "r 4", labels of a class "r" (-1 = no text target) and whether a row has a visual target "r"."""

    x: Tensor
    classes: Tensor
    drawn: Tensor
    ids: tuple[str, ...]

    @property
    def target_counts(self) -> dict[str, int]:
        return {"text": int((self.classes >= 0).sum()), "visual": int(self.drawn.sum())}

    def to(self, device: Any) -> "Points":
        return self

    def rows(self, rows: slice) -> "Points":
        return Points(self.x[rows], self.classes[rows], self.drawn[rows], self.ids[rows])


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Dropout(0.1))
            self.text, self.visual = nn.Linear(8, 3), nn.Linear(8, 4)


def step(model: TwoHeads, batch: Points) -> dict[str, LossTerm]:
    hidden = model.body(batch.x)
    text = nn.functional.cross_entropy(model.text(hidden), batch.classes, ignore_index=-1, reduction="sum")
    visual = (model.visual(hidden) - batch.x).square().mean(1)[batch.drawn].sum()
    return {"text": LossTerm(text, (batch.classes >= 0).sum()), "visual": LossTerm(visual, batch.drawn.sum())}


class PointStream:
    """Twelve rows a step, cut into micro-batches; step i is a function of i only."""

    def __init__(self, cuts: tuple[int, ...] = (12,), spoil: int | None = None) -> None:
        self.cuts, self.spoil, self.taken = cuts, spoil, 0

    def __next__(self) -> list[Points]:
        self.taken += 1
        generator = torch.Generator().manual_seed(self.taken)
        x = torch.randn(12, 4, generator=generator)
        if self.spoil == self.taken:
            x[8, 0] = float("nan")
        classes = torch.where(torch.arange(12) < 5, torch.randint(0, 3, (12,), generator=generator), -1)
        batch = Points(x, classes, torch.arange(12) % 3 == 2, tuple(f"step{self.taken}-row{i}" for i in range(12)))
        starts = [sum(self.cuts[:i]) for i in range(len(self.cuts))]
        return [batch.rows(slice(start, start + cut)) for start, cut in zip(starts, self.cuts, strict=True)]

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.taken = state["taken"]


def run(path, config=CONFIG, stream=None, model=None, **kwargs):
    return train(step, model or TwoHeads(), stream or PointStream(), config, path, tracker=SilentTracker(), **kwargs)


def losses(result, key="loss"):
    return [row[key] for row in result.history if key in row]


def without_dropout() -> TwoHeads:
    model = TwoHeads()
    model.body[2] = nn.Identity()
    return model


def test_it_learns_and_writes_one_row_per_logged_step(tmp_path):
    result = run(tmp_path, replace_config(steps=60, log_every=20))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 20, 40, 60]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    keys = "step stage loss text_loss visual_loss learning_rate grad_norm tokens_per_second seconds data_wait_seconds".split()
    assert set(rows[0]) == set(keys)
    assert result.step == 60 and result.checkpoint.name == "step-00000060"


def replace_config(**changes) -> TrainingConfig:
    return TrainingConfig(**{**CONFIG.to_dict(), **changes})


@pytest.mark.parametrize("cuts", [(6, 6), (1, 2, 9), (11, 1)])
def test_accumulation_does_not_change_the_losses(tmp_path, cuts):
    # the targets of both kinds lie unevenly: a mean of means would differ
    whole = run(tmp_path / "whole", model=without_dropout())
    parts = run(tmp_path / "parts", stream=PointStream(cuts), model=without_dropout())
    for key in ("loss", "text_loss", "visual_loss", "grad_norm"):
        assert losses(parts, key) == pytest.approx(losses(whole, key), rel=1e-5)


def test_micro_batch_normalization_is_the_mean_of_means(tmp_path):
    config = replace_config(steps=1, normalization="micro_batch")
    result = run(tmp_path, config, PointStream((3, 9)), without_dropout())
    model, batches = without_dropout(), next(PointStream((3, 9)))
    means = [step(model, batch)["text"].mean.item() for batch in batches]
    assert losses(result, "text_loss")[0] == pytest.approx(sum(means) / 2, rel=1e-5)


def test_weights_and_missing_targets(tmp_path):
    class TextOnly(PointStream):
        def __next__(self):
            return [replace(batch, drawn=torch.zeros_like(batch.drawn)) for batch in super().__next__()]

    model = without_dropout()
    before = model.visual.weight.detach().clone()
    result = run(tmp_path, replace_config(visual_loss_weight=0.5), TextOnly(), model)
    assert losses(result, "visual_loss") == [None] * 8
    assert losses(result) == losses(result, "text_loss")
    torch.testing.assert_close(model.visual.weight.detach(), before, rtol=0, atol=0)  # a count of 0 contributes exactly 0


def test_a_non_finite_loss_stops_before_the_weights_change(tmp_path):
    model = TwoHeads()
    with pytest.raises(NonFiniteLossError, match=r"visual loss nan in records step3-row6, step3-row7.*step 3") as caught:
        run(tmp_path, stream=PointStream((6, 6), spoil=3), model=model)
    assert "row2" not in str(caught.value)  # only the micro-batch that holds it
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_count_that_is_not_the_batchs_is_refused(tmp_path):
    def wrong(model, batch):
        terms = step(model, batch)
        return terms | {"visual": LossTerm(terms["visual"].sum, terms["visual"].count + 1)}

    with pytest.raises(AlignmentError, match="a visual loss over 5 targets but the batch has 4"):
        train(wrong, TwoHeads(), PointStream(), CONFIG, tmp_path, tracker=SilentTracker())
    with pytest.raises(AlignmentError, match=r"losses of \['text'\]"):
        train(lambda m, b: {"text": step(m, b)["text"]}, TwoHeads(), PointStream(), CONFIG, tmp_path, tracker=SilentTracker())


class Stop(Exception):
    pass


class StopAt(SilentTracker):
    def __init__(self, step: int) -> None:
        self.step = step

    def log(self, row):
        if row["step"] == self.step:
            raise Stop


def timeless(path):
    return [{key: value for key, value in row.items() if "second" not in key} for row in read_metrics(path / "metrics.jsonl")]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_repeats_an_uninterrupted_run_exactly(tmp_path, optimizer):
    config = replace_config(checkpoint_every=3, evaluate_every=2, optimizer=optimizer)
    evaluators = {"noise": lambda model, number: {"value": torch.randn(()).item()}}  # must not disturb dropout
    run(tmp_path / "whole", config, evaluators=evaluators)
    with pytest.raises(Stop):
        train(step, TwoHeads(), PointStream(), config, tmp_path / "cut", tracker=StopAt(5), evaluators=evaluators)
    (tmp_path / "cut/checkpoints/train/step-00000004.partial").mkdir()  # as a process leaves it that dies while writing
    with (tmp_path / "cut/metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "los')
    run(tmp_path / "cut", config, evaluators=evaluators, resume=True)
    assert timeless(tmp_path / "cut") == timeless(tmp_path / "whole")


def test_a_directory_with_checkpoints_is_not_overwritten(tmp_path):
    run(tmp_path)
    with pytest.raises(CheckpointError, match=r"metamorph train --resume.*choose another directory"):
        run(tmp_path)
    again = run(tmp_path, resume=True)
    assert again.step == 8 and again.history == []


def test_only_the_newest_checkpoints_stay(tmp_path):
    run(tmp_path, replace_config(checkpoint_every=1, keep=2))
    assert sorted(path.name for path in (tmp_path / "checkpoints/train").iterdir()) == ["step-00000007", "step-00000008"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run(tmp_path)
    other = TwoHeads()
    other.text = nn.Linear(8, 5)
    with pytest.raises(CheckpointError, match=r"model.text.weight of shape \[3, 8\] but \[5, 8\]"):
        run(tmp_path, replace_config(steps=9), model=other, resume=True)
    details = tmp_path / "checkpoints/train/step-00000008/training.json"
    details.write_text(json.dumps(json.loads(details.read_text()) | {"processes": 4}))
    with pytest.raises(CheckpointError, match="written by 4 processes but read by 1"):
        run(tmp_path, resume=True)


@pytest.mark.parametrize(("first", "then", "found"), [("adamw", "muon", "exp_avg"), ("muon", "adamw", "momentum_buffer")])
def test_moments_of_another_optimizer_are_refused(tmp_path, first, then, found):
    run(tmp_path, replace_config(optimizer=first))
    with pytest.raises(CheckpointError, match=rf"body.0.weight.{found} but .* moments of another optimizer"):
        run(tmp_path, replace_config(optimizer=then, steps=9), resume=True)


def test_frozen_parts_neither_change_nor_drop_out(tmp_path):
    model = TwoHeads()
    for module in (model.body, model.text):
        module.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = []
    train(lambda m, b: modes.append(m.body[2].training) or step(m, b), model, PointStream(), CONFIG, tmp_path, tracker=SilentTracker())
    after = model.state_dict()
    assert {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])} == {"visual"}
    assert not model.body.training and not any(modes) and model.visual.training


class Average:
    def __init__(self, model) -> None:
        self.values = {name: value.detach().clone() for name, value in model.named_parameters()}

    def update(self, model) -> None:
        for name, value in model.named_parameters():
            self.values[name].lerp_(value.detach(), 0.1)

    def state_dict(self):
        return self.values


def test_companions_follow_and_are_resumed(tmp_path):
    config = replace_config(checkpoint_every=3)
    model = TwoHeads()
    whole = Average(model)
    run(tmp_path / "whole", config, model=model, companions={"ema": whole})
    model = TwoHeads()
    with pytest.raises(Stop):
        train(step, model, PointStream(), config, tmp_path / "cut", tracker=StopAt(5), companions={"ema": Average(model)})
    model = TwoHeads()
    resumed = Average(model)
    run(tmp_path / "cut", config, model=model, companions={"ema": resumed}, resume=True)
    for name, value in whole.values.items():
        assert torch.equal(value, resumed.values[name])
