"""Experts over processes: each of n ranks holds E / n experts of every layer, and a whole copy of everything else.

The batch is cut into n equal parts, of which rank r has the r-th. Hidden states go to the ranks of their experts and
come back as outputs (`ShardedExperts`); gradients of what all ranks have are averaged by DistributedDataParallel.

What one process would compute is computed, up to the order of sums: the same losses, gradients and weights. For that,
these are taken over the whole batch and not over the part of a rank: the shares in the balance loss; the capacity, and
the order in which its slots are given (`limit_over`); counts that move the selection bias; the norm of the gradient.

A run with a folder `out`, which all processes must see, keeps there what `train` keeps, but as its state a folder

    training_state/step-N/    weights and optimizer (torch.distributed.checkpoint), and run.json

from which any number of processes that divides the experts goes on. The finished folder is that of `train`.

Shapes: B batch, S sequence, T tokens of one rank, H hidden size, E experts, K experts per token, n processes.
"""

import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from minimoe.model.balance import apply_capacity, chosen_experts, expert_capacity, expert_load
from minimoe.model.config import MoEConfig, require
from minimoe.model.moe import Experts, within_capacity
from minimoe.model.routing import RouterOutput
from minimoe.model.transformer import MoEForCausalLM
from minimoe.training.accumulate import BatchLosses, add_gradients, size_of
from minimoe.training.corpus import Corpus
from minimoe.training.loop import STATE_FOLDER, Run, Settings, adamw
from minimoe.training.processes import Ranks, ring_bytes

ABOUT = "run.json"  # of a saved state
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of each parameter


def train_parallel(
    model: MoEForCausalLM,
    corpus: Corpus,
    ranks: Ranks,
    *,
    out: str | Path | None = None,
    save_every: int = 100,
    **settings: Any,
) -> list[dict[str, Any]]:
    """`train` over processes, each of which calls this with the same arguments; returns the log of the whole batch.

    Args:
        model: the same on all ranks. Trained in place: it has all experts again at the end, on every rank.
        corpus: as for `train`.
        ranks: of `processes.joined` or `processes.run_processes`.
        out, save_every, **settings: as for `train`. All ranks must see the folder.

    Raises:
        ValueError: as `train`; the experts or the sequences of a batch do not divide among the ranks; the router is
            one that looks at all tokens of a batch or draws noise; the processes differ in what they train or run on.
        FloatingPointError: as `train`.
    """
    return ParallelRun(model, corpus, Settings(**settings), out and Path(out), save_every, None, (), ranks).to_the_end()


class ShardedExperts(Experts):
    """The experts of one layer, of which this rank holds the `ranks.rank`-th E / n: tensors [E / n, ...].

    `received` is how many rows it was given to compute so far.
    """

    def __init__(self, whole: Experts, ranks: Ranks) -> None:
        nn.Module.__init__(self)
        self.implementation, self.biases, self.act = whole.implementation, whole.biases, whole.act
        self.ranks, self.received = ranks, 0
        for name, tensor in whole.named_parameters():
            self.register_parameter(name, nn.Parameter(tensor.detach().chunk(ranks.size)[ranks.rank].clone()))

    def forward(self, hidden_states: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Map [T, H] to [T, H], as `Experts.forward`: dispatch, compute what came, combine."""
        experts, ranks = len(self.gate_proj), self.ranks
        _, slots = indices.flatten().sort(stable=True)
        slots = slots[: int((indices < experts * ranks.size).sum())]  # without the empty ones, which are last
        to = expert_load(indices, experts * ranks.size).view(ranks.size, experts)  # of each rank, each of its experts
        of = ranks.all_to_all("counts", to, ranks.size * [1], ranks.size * [1])
        sent, received = to.sum(1).tolist(), of.sum(1).tolist()
        token = slots // indices.shape[1]
        rows = _Exchange.apply(hidden_states.index_select(0, token), ranks, "dispatch", sent, received)
        own = torch.arange(experts, device=of.device).repeat(ranks.size).repeat_interleave(of.flatten())
        self.received += len(rows)
        computed = super().forward(rows, own[:, None], torch.ones_like(own[:, None]))
        back = _Exchange.apply(computed, ranks, "combine", received, sent)
        weighted = back * weights.flatten().index_select(0, slots)[:, None].to(back.dtype)
        return torch.zeros_like(hidden_states).index_add(0, token, weighted)

    def whole(self, config: MoEConfig) -> Experts:
        """All experts, on every rank."""
        experts = Experts(config, seed=None)
        for name, tensor in self.named_parameters():
            gathered = self.ranks.all_gather("whole experts", tensor.detach()).flatten(0, 1)
            setattr(experts, name, nn.Parameter(gathered))
        return experts


class _Exchange(torch.autograd.Function):
    """`Ranks.all_to_all`, whose gradient goes the other way round."""

    @staticmethod
    def forward(ctx, rows: Tensor, ranks: Ranks, kind: str, to: Sequence[int], of: Sequence[int]) -> Tensor:
        ctx.arguments = ranks, f"{kind}, backward", of, to
        return ranks.all_to_all(kind, rows, to, of)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ranks, kind, to, of = ctx.arguments
        return ranks.all_to_all(kind, gradient, to, of), None, None, None, None


def limit_over(ranks: Ranks, chosen: RouterOutput, config: MoEConfig, _real: Tensor | None) -> RouterOutput:
    """`apply_capacity` over the batch of all ranks, of which these are the tokens of one, as many as of every other.

    All first choices of the batch come before any second choice, and among equal choices those of lower ranks first.
    """
    experts, k = config.num_experts, config.num_experts_per_tok
    own = torch.stack([expert_load(choice[:, None], experts + 1) for choice in chosen.indices.T])  # [K, E + 1]
    counts = ranks.all_gather("capacity", own)  # [n, K, E + 1]
    tokens = int(counts[:, 0, :experts].sum())  # padding has empty slots
    others = counts.sum(0) - own
    ahead = others.cumsum(0) - others + counts[: ranks.rank].sum(0)
    return apply_capacity(chosen, expert_capacity(tokens, experts, k, config.capacity_factor), ahead)


def shard(model: MoEForCausalLM, ranks: Ranks) -> list[ShardedExperts]:
    """Leave this rank its experts of every sparse layer of `model`, in place; returns them. `gather` undoes it."""
    layers = [block.mlp for block in model.model.layers if block.is_sparse]
    for layer in layers:
        layer.experts, layer.limit = ShardedExperts(layer.experts, ranks), partial(limit_over, ranks)
    return [layer.experts for layer in layers]


def gather(model: MoEForCausalLM) -> None:
    """Give every rank all experts of `model` again, in place."""
    for layer in (block.mlp for block in model.model.layers if block.is_sparse):
        layer.experts, layer.limit = layer.experts.whole(model.config), within_capacity


class _Replicated(DistributedDataParallel):
    """DistributedDataParallel of all but the experts, counted."""

    def __init__(self, model: MoEForCausalLM, ranks: Ranks) -> None:
        names = [name for name, _ in model.named_parameters() if ".experts." in name]
        self._set_params_and_buffers_to_ignore_for_model(model, names)
        super().__init__(model, process_group=dist.new_group(), broadcast_buffers=False)
        self.config = model.config
        self.register_comm_hook(ranks, _average)


def _average(ranks: Ranks, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    ranks.note("gradients", ring_bytes(bucket.buffer(), ranks.size))
    return allreduce_hook(None, bucket)


@dataclass
class ParallelRun(Run):
    """A run over processes: what `Run` does, where another way is needed."""

    ranks: Ranks
    state_name = STATE_FOLDER

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_parts(self.model.config, self.settings, self.ranks.size)
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        require_agreement(self.ranks, self.identity() | versions)
        self.experts = [tensor for layer in shard(self.model, self.ranks) for tensor in layer.parameters()]
        self.optimizer = adamw(self.model, self.settings)
        self.replicated = _Replicated(self.model, self.ranks)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes log and model."""
        return self.ranks.rank == 0

    def gradients(self, ids: Tensor) -> BatchLosses:
        """Leave the gradient of the whole batch, ids [B, S], in the model; the losses are of the whole batch too."""
        part = ids.chunk(self.ranks.size)[self.ranks.rank]
        batch = {"input_ids": part, "labels": part}
        size = size_of(batch)  # means over the parts, which are equally large, and then over the ranks
        losses = add_gradients(self.replicated, batch, size, size, self._shares)
        for tensor in self.experts:  # which have had the gradients of all ranks' losses
            tensor.grad /= self.ranks.size
        numbers = torch.stack([torch.zeros_like(losses.loss) if x is None else x for x in losses[:3]])
        loss, cross_entropy, aux_loss = self.ranks.sum("losses", numbers / self.ranks.size)
        load = list(self.ranks.sum("load", torch.stack(losses.load)))
        return BatchLosses(loss, cross_entropy, None if losses.aux_loss is None else aux_loss, load)

    def _shares(self, chosen: Sequence[RouterOutput]) -> Tensor:
        """The share of the tokens of the whole batch that chose each expert, [L, E]."""
        counts = torch.stack([chosen_experts(output).sum(0) for output in chosen])
        return self.ranks.sum("load", counts) / (self.ranks.size * len(chosen[0].indices))

    def clip(self) -> Tensor:
        own = {id(tensor) for tensor in self.experts}
        others = [tensor for tensor in self.model.parameters() if id(tensor) not in own]
        of_own, of_others = (
            nn.utils.get_total_norm([tensor.grad for tensor in part]) for part in (self.experts, others)
        )
        squares = self.ranks.sum("norm", of_own.square()) + of_others.square()
        nn.utils.clip_grads_with_norm_(self.model.parameters(), self.settings.max_grad_norm, squares.sqrt())
        return squares.sqrt()

    def write(self, record: dict[str, Any]) -> None:
        if self.first:
            super().write(record)

    def rewind_log(self, path: Path) -> None:
        if self.first:
            super().rewind_log(path)
        dist.barrier(self.ranks.group)
        if not self.first:
            self.log = [json.loads(line) for line in path.read_bytes().splitlines()[: self.step]]
        dist.barrier(self.ranks.group)  # before the first adds to it

    def save(self) -> None:
        """Write weights and optimizer as a folder that gets its name once it is complete; then older ones go."""
        folder = self.out / STATE_FOLDER / f"step-{self.step}"
        partial_folder = folder.with_name(f".{folder.name}")
        if self.first:
            shutil.rmtree(partial_folder, ignore_errors=True)  # of a save that was killed
        dcp.save(self._state(), checkpoint_id=partial_folder, process_group=self.ranks.group)
        if self.first:
            about = {**self.identity(), "step": self.step, "seconds": self.log[-1]["seconds"]}
            (partial_folder / ABOUT).write_text(json.dumps(about), encoding="utf-8")
            partial_folder.rename(folder)
            for other in folder.parent.iterdir():
                if other != folder:
                    shutil.rmtree(other)
        dist.barrier(self.ranks.group)

    def load(self, path: Path) -> None:
        steps = [int(folder.name.removeprefix("step-")) for folder in path.glob("step-*")]
        if not steps:
            return  # killed during its first save
        folder = path / f"step-{max(steps)}"
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        self.check_identity(about)
        dcp.load(self._state(), checkpoint_id=folder, process_group=self.ranks.group)
        self.step, self.seconds_before = about["step"], about["seconds"]

    def _state(self) -> dict[str, Tensor]:
        """The tensors of model and optimizer by name, those of experts as parts of one: to fill them is to resume."""
        tensors = dict(self.model.state_dict())
        for name, parameter in self.model.named_parameters():
            if not self.optimizer.state[parameter]:  # before the first step
                zeros = (
                    torch.zeros((), device=parameter.device),
                    torch.zeros_like(parameter),
                    torch.zeros_like(parameter),
                )
                self.optimizer.state[parameter] = dict(zip(MOMENTS, zeros, strict=True))
            tensors |= {f"optimizer.{name}.{moment}": self.optimizer.state[parameter][moment] for moment in MOMENTS}
        return {name: self._placed(name, tensor) for name, tensor in tensors.items()}

    def _placed(self, name: str, tensor: Tensor) -> Tensor:
        is_part = ".experts." in name and tensor.dim() > 0
        return DTensor.from_local(tensor, self.ranks.mesh, [Shard(0)], run_check=False) if is_part else tensor

    def finish(self) -> None:
        gather(self.model)
        if self.first:
            super().finish()
        dist.barrier(self.ranks.group)


def require_agreement(ranks: Ranks, own: Mapping[str, Any]) -> None:
    """Raise a ValueError that names rank and difference, unless all processes call this with equal values."""
    everyone = ranks.size * [None]
    dist.all_gather_object(everyone, own, ranks.group)
    for rank, other in enumerate(everyone):
        names = [name for name in own if other[name] != everyone[0][name]]
        if names:
            found, wanted = (", ".join(f"{name}={of[name]!r:.99}" for name in names) for of in (other, everyone[0]))
            raise ValueError(f"rank {rank} has {found}: wanted {wanted}, as rank 0 has")


def _require_parts(config: MoEConfig, settings: Settings, size: int) -> None:
    """Raise a ValueError where the work cannot be cut into `size` equal parts with the same result."""
    require(config.num_experts > 0, "num_experts", config.num_experts, "at least one for each process")
    wanted = f"a multiple of the {size} processes"
    require(config.num_experts % size == 0, "num_experts", config.num_experts, f"{wanted}, which hold as many each")
    require(
        settings.batch_size % size == 0,
        "batch_size",
        settings.batch_size,
        f"{wanted}, which see as many sequences each",
    )
    alone = config.router not in ("expert_choice", "noisy_topk")
    require(alone, "router", config.router, "one that looks at a token alone and draws nothing, to run over processes")
    parts = settings.gradient_accumulation_steps
    require(parts == 1, "gradient_accumulation_steps", parts, "1 over processes")
