"""The parts of one step: counts shared between processes, forward and backward, clipping, and the check of the losses.

Every loss is a sum over targets. The total that is minimised is, for each kind, weight x sum / number of targets of the kind in the whole
step (over all micro-batches and processes), so that neither packing nor accumulation nor the number of processes changes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from metamorph.errors import AlignmentError, ConfigError, NonFiniteLossError
from metamorph.losses import LossTerm
from metamorph.training.config import TrainingConfig
from metamorph.training.device import world_size

StepFunction = Callable[[Any, Any], Mapping[str, LossTerm]]
"""Model, batch -> for each kind of loss its sum over the batch's targets, and their number."""


@runtime_checkable
class TrainingBatch(Protocol):
    """What the loop needs of a batch; `ids` of its records, and `attention_mask` or `input_ids` to count tokens, are used if present."""

    @property
    def target_counts(self) -> Mapping[str, int]:
        """Number of targets of each kind of loss; every batch of a run names the same kinds."""
        ...

    def to(self, device: Any, /) -> Any:
        """The batch on another device."""
        ...


@dataclass(frozen=True)
class SharedCounts:
    """What all processes know about the step before it begins."""

    totals: Mapping[str, int]
    """Targets of each kind in the whole step."""
    micro_batches: int
    """Micro-batches in the whole step."""
    passes: int
    """Forward passes that every process makes: the most micro-batches that one has."""

    def padded(self, micro_batches: Sequence[TrainingBatch]) -> list[tuple[TrainingBatch, bool]]:
        """Each micro-batch and whether it counts: a process with fewer repeats its last at weight 0, for the others wait in each pass."""
        own = [(batch, True) for batch in micro_batches]
        return own + [(micro_batches[-1], False)] * (self.passes - len(own))


def share_counts(micro_batches: Sequence[TrainingBatch], device: torch.device) -> SharedCounts:
    """Add up the target counts of a step over micro-batches and processes, in one exchange.

    Raises:
        AlignmentError: no micro-batch, or two that do not name the same kinds of targets.
    """
    if not micro_batches:
        raise AlignmentError("0 micro-batches but at least 1 is needed (the stream's next step). Check the stream.")
    kinds = sorted(micro_batches[0].target_counts)
    for batch in micro_batches:
        if sorted(batch.target_counts) != kinds:
            found = f"targets of {sorted(batch.target_counts)} but of {kinds} in the first micro-batch"
            raise AlignmentError(f"{found} ({_place(batch)}). Name every kind, with 0 for none.")
    sums = [sum(batch.target_counts[kind] for batch in micro_batches) for kind in kinds]
    rows = [[*sums, len(micro_batches)]]
    if dist.is_initialized():
        mine = torch.tensor(rows[0], dtype=torch.int64, device=device)
        everyone = [torch.empty_like(mine) for _ in range(world_size())]
        dist.all_gather(everyone, mine)
        rows = [row.tolist() for row in everyone]
    totals = {kind: sum(row[i] for row in rows) for i, kind in enumerate(kinds)}
    return SharedCounts(totals, sum(row[-1] for row in rows), max(row[-1] for row in rows))


@dataclass(frozen=True)
class StepPart:
    """One micro-batch's losses, still on the device: sum and count of each kind, and what makes the sum its share of the mean."""

    kinds: list[str]
    sums: Float[Tensor, " kinds"]
    counts: Float[Tensor, " kinds"]
    scales: list[float]
    per_target: dict[str, Float[Tensor, " _"] | None]


class Engine(nn.Module):
    """A model with its step function: one callable, so that a sharded run gathers what the step needs, whatever methods it calls."""

    def __init__(
        self,
        step: StepFunction,
        model: nn.Module,
        config: TrainingConfig,
        device: torch.device,
        precision: str,
        replicate: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.model, self.step = model, step
        self.config, self.device, self.precision = config, device, precision
        if config.gradient_checkpointing:
            # transformers renames it; the old name warns from 5.23 on and goes in 6
            enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        if world_size() > 1:
            self._shard([model.get_submodule(name) for name in replicate])
        set_modes(model)

    def _shard(self, whole: Sequence[nn.Module]) -> None:
        """Split all parameters over the processes, layer by layer, except those of the modules in `whole`."""
        kept = {parameter for module in whole for parameter in module.parameters()}
        if any(parameter.requires_grad for parameter in kept):
            raise ConfigError("a module to keep whole on every process trains but it must be frozen (replicate). Freeze or shard it.")
        for block in _blocks(self.model, whole):
            fully_shard(block)
        fully_shard(self, ignored_params=kept)
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # gradients add up: the losses are divided already
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sums

    def forward(self, batch: TrainingBatch) -> Mapping[str, LossTerm]:
        """The losses of a batch."""
        return self.step(self.model, batch)

    def forward_backward(self, part: tuple[TrainingBatch, bool], shared: SharedCounts) -> StepPart:
        """Add a micro-batch's share to the gradients.

        Raises:
            AlignmentError: the step function returned other kinds of loss than the batch has targets of.
        """
        batch, counted = part
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            terms = self(batch.to(self.device))
        kinds = sorted(terms)
        expected = {kind for kind, count in batch.target_counts.items() if count}
        if not expected <= set(kinds) <= set(batch.target_counts):
            remedy = "Return a loss for each kind of target."
            raise AlignmentError(f"losses of {kinds} but targets of {sorted(expected)} ({_place(batch)}). {remedy}")
        scales = [self._scale(kind, batch, shared) if counted else 0.0 for kind in kinds]
        weights = [self.config.loss_weight(kind) for kind in kinds]
        total = torch.stack([terms[kind].sum * (weight * scale) for kind, weight, scale in zip(kinds, weights, scales, strict=True)]).sum()
        if total.requires_grad:
            total.backward()
        sums = torch.stack([terms[kind].sum.detach().float() for kind in kinds])
        counts = torch.stack([torch.as_tensor(terms[kind].count, device=sums.device).float() for kind in kinds])
        return StepPart(kinds, sums, counts, scales, {kind: terms[kind].per_target for kind in kinds})

    def _scale(self, kind: str, batch: TrainingBatch, shared: SharedCounts) -> float:
        if self.config.normalization == "global":
            return 1 / shared.totals[kind] if shared.totals[kind] else 0.0
        own = batch.target_counts[kind]
        return 1 / (own * shared.micro_batches) if own else 0.0

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Evaluation mode, without gradients, random states kept; afterwards everything is as before."""
        devices = [self.device] if self.device.type == "cuda" else []
        sharded = world_size() > 1
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            self.model.eval()
            if sharded:
                self.unshard()  # pyright: ignore[reportCallIssue]
            try:
                yield
            finally:
                if sharded:
                    self.reshard()  # pyright: ignore[reportCallIssue]
                set_modes(self.model)


def set_modes(model: nn.Module) -> None:
    """Training mode for what trains, evaluation mode (no dropout) for modules that are frozen as a whole."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def clip_gradients(model: nn.Module, limit: float | None) -> Float[Tensor, ""]:
    """Scale all gradients so that their norm over all processes is at most `limit`; returns the norm before."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf if limit is None else limit)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # pyright: ignore[reportAttributeAccessIssue]


def check_losses(
    parts: Sequence[StepPart],
    norm: Float[Tensor, ""],
    micro_batches: Sequence[TrainingBatch],
    shared: SharedCounts,
    config: TrainingConfig,
    step: int,
) -> dict[str, float | None]:
    """Fetch the step's losses from the device, once, and check them before the weights change.

    Returns:
        `loss` (weighted total), `<kind>_loss` (mean over targets; None without targets) and `grad_norm`.

    Raises:
        NonFiniteLossError: a loss or the norm of the gradients is not finite, on any process.
        AlignmentError: a loss over another number of targets than the batch has.
    """
    kinds = sorted(shared.totals)
    fetched = torch.cat([*(part.sums for part in parts), *(part.counts for part in parts), norm.reshape(1).float()]).tolist()
    width = [len(part.kinds) for part in parts]
    sums, counts = _split(fetched, width), _split(fetched[sum(width) :], width)
    means = dict.fromkeys(kinds, 0.0)
    bad: list[str] = []
    for part, part_sums, part_counts, (batch, counted) in zip(parts, sums, counts, shared.padded(micro_batches), strict=True):
        for kind, value, count, scale in zip(part.kinds, part_sums, part_counts, part.scales, strict=True):
            if count != batch.target_counts[kind]:
                raise AlignmentError(
                    f"a {kind} loss over {count:.0f} targets but the batch has {batch.target_counts[kind]} (step {step}, {_place(batch)})."
                    " Count in the collator what the step function sums."
                )
            if counted and not math.isfinite(value):
                bad.append(f"{kind} loss {value} in {_place(batch)}")
            means[kind] += value * scale
    grad_norm = fetched[-1]
    _raise_if_not_finite(bad, grad_norm, micro_batches, step)
    values = _add_up([means[kind] for kind in kinds], parts[0].sums.device)
    losses: dict[str, float | None] = {"loss": sum(config.loss_weight(kind) * value for kind, value in zip(kinds, values, strict=True))}
    losses |= {f"{kind}_loss": value if shared.totals[kind] else None for kind, value in zip(kinds, values, strict=True)}
    return losses | {"grad_norm": grad_norm}


def gather_objects(own: Any) -> list[Any]:
    """A value of each process (small, of plain types), in the order of ranks, on all of them."""
    if not dist.is_initialized():
        return [own]
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, own)
    return everyone


def count_tokens(micro_batches: Sequence[Any]) -> int:
    """Positions that are not padding; targets, where a batch has no positions."""
    return sum(_count_tokens(batch) for batch in micro_batches)


def _count_tokens(batch: Any) -> int:
    mask, ids = getattr(batch, "attention_mask", None), getattr(batch, "input_ids", None)
    if isinstance(mask, Tensor):
        return int(mask.sum())
    return ids.numel() if isinstance(ids, Tensor) else sum(batch.target_counts.values())


def _blocks(model: nn.Module, whole: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """The units that are sharded and gathered one at a time: the members of the outermost module lists, which is where layers are."""
    for child in model.children():
        if any(child is module for module in whole):
            continue
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child, whole)


def _raise_if_not_finite(bad: list[str], grad_norm: float, micro_batches: Sequence[TrainingBatch], step: int) -> None:
    own = bad or ([] if math.isfinite(grad_norm) else [f"a gradient norm of {grad_norm} from {_place(*micro_batches)}"])
    if dist.is_initialized():
        failed = _add_up([float(bool(own))], torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu"))[0]
        if failed:
            own = [text for texts in gather_objects(own) for text in texts]
    if own:
        remedy = "Look at these records, or lower the learning rate."
        raise NonFiniteLossError(f"{'; '.join(own)} but finite numbers are needed (step {step}). {remedy}")


def _add_up(values: list[float], device: torch.device) -> list[float]:
    """Sum of each value over the processes."""
    if not dist.is_initialized():
        return values
    tensor = torch.tensor(values, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def _split(values: list[float], widths: list[int]) -> list[list[float]]:
    starts = [sum(widths[:i]) for i in range(len(widths))]
    return [values[start : start + width] for start, width in zip(starts, widths, strict=True)]


def _place(*batches: TrainingBatch) -> str:
    ids = [str(one) for batch in batches for one in getattr(batch, "ids", ())]
    return f"records {', '.join(ids)}" if ids else "a batch without ids"
