"""Training: `train(model, corpus)` from the first step to the last, and again from wherever it was killed.

One step: draw a batch that depends on (seed, step) alone; forward with the router losses the configuration asks for;
backward; clip; AdamW with warm-up and cosine decay; move the selection bias, if the model has one.

A run with a folder `out` keeps there

    log.jsonl                   one line per step
    step-N/                     the model after step N, where a snapshot was asked for
    training_state.safetensors  weights, optimizer and random state of the last saved step, in one atomic file
    config.json, model.safetensors, tokenizer.json, training.json    the finished model and how it was made

and continues from the last saved state when it is started again: on one thread to bit-identical weights.
"""

import hashlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from minimoe.atomic import write_atomically
from minimoe.model.balance import max_violation, update_bias
from minimoe.model.config import MoEConfig, require
from minimoe.model.transformer import MoEForCausalLM
from minimoe.progress import progress_bar
from minimoe.training.accumulate import BatchLosses, accumulate_gradients
from minimoe.training.corpus import Corpus
from minimoe.training.tokenizer import read_tokenizer

STATE_FILE = "training_state.safetensors"
STATE_FOLDER = "training_state"  # of a run over several processes (parallel.py)
STATES = (STATE_FILE, STATE_FOLDER)
LOG_FILE = "log.jsonl"
RECIPE_FILE = "training.json"
# The smallest value of a setting; of all others 0.
LEAST = {"steps": 1, "batch_size": 1, "gradient_accumulation_steps": 1, "seq_len": 2}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the outcome of a run, besides the model it starts from and the corpus."""

    steps: int = 1600
    batch_size: int = 8
    seq_len: int = 128
    learning_rate: float = 4e-3
    warmup_steps: int = 100
    final_learning_rate: float = 0.1  # as a share of learning_rate, where the cosine ends
    weight_decay: float = 0.1  # on matrices only
    max_grad_norm: float = 1.0
    bias_update_rate: float = 1e-3  # of e_score_correction_bias, where the model has one
    gradient_accumulation_steps: int = 1  # micro-batches that a batch is cut into, to need less memory
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, whole, least = getattr(self, field.name), isinstance(field.default, int), LEAST.get(field.name, 0)
            right_type = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            wanted = f"a {'whole' if whole else 'finite'} number of at least {least}"
            require(right_type and least <= value < math.inf, field.name, value, wanted)
        parts = self.gradient_accumulation_steps
        wanted = f"a divisor of batch_size={self.batch_size}"
        require(self.batch_size % parts == 0, "gradient_accumulation_steps", parts, wanted)


def train(
    model: MoEForCausalLM,
    corpus: Corpus,
    *,
    out: str | Path | None = None,
    save_every: int = 100,
    evaluate_every: int | None = None,
    snapshots: Collection[int] = (),
    **settings: Any,
) -> list[dict[str, Any]]:
    """Train `model` in place and return its log, one record per step.

    The model's configuration chooses how its experts are balanced: `router_aux_loss_coef` > 0 adds the balance loss,
    `e_score_correction_bias` moves a bias after each step, both or neither are possible.

    Args:
        model: starts from its present weights, in float32 or float64. Its tokenizer becomes that of the corpus: it has
            the same tokens already, or none and as many rows.
        corpus: where batches come from.
        out: a folder to log to, save to, and resume from; None keeps everything in memory.
        save_every: steps between saved states.
        evaluate_every: steps between evaluations on held-out text, as `evaluate` does them by default; None: never.
        snapshots: steps after which the model is also saved as `out`/step-N; 0 is before the first.
        **settings: fields of `Settings`. Only they influence the weights; the three above do not.

    Returns:
        Records with step, loss, cross_entropy (nats per token), aux_loss, learning_rate, grad_norm, load (for each
        sparse layer, the tokens that chose each expert), max_violation (per sparse layer), seconds since the start, and
        held_out (nats per token, by domain) where the step was evaluated.

    Raises:
        ValueError: a setting is impossible, the router could not learn (`MoEConfig.router_learns`), the model's
            tokenizer or vocabulary is not that of the corpus, its weights are in half precision, snapshots are wanted
            and `out` is None, or `out` holds another run, another model or a damaged state.
        FloatingPointError: the loss is no longer finite. The last saved state stays.
    """
    run = Run(model, corpus, Settings(**settings), out and Path(out), save_every, evaluate_every, snapshots)
    return run.to_the_end()


@torch.no_grad()
def evaluate(
    model: MoEForCausalLM, corpus: Corpus, *, batches: int = 8, batch_size: int = 16, seq_len: int = 128, seed: int = 0
) -> dict[str, float]:
    """Held-out cross-entropy in nats per token, by domain.

    With `seed`, so many batches of `batch_size` sequences of `seq_len` tokens are drawn. Each sequence counts for its
    own domain, and a domain that was not drawn is absent. The model is in evaluation mode meanwhile, then as it was.
    """
    was_training = model.training
    model.eval()
    losses: dict[str, list[float]] = {domain: [] for domain in corpus.domains}
    for step in range(batches):
        batch = corpus.batch("held_out", batch_size=batch_size, seq_len=seq_len, seed=seed, step=step)
        ids = batch.input_ids.to(next(model.parameters()).device)
        logits = model(ids).logits[:, :-1]
        by_token = F.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
        for domain, loss in zip(batch.domains.tolist(), by_token.mean(1).tolist(), strict=True):
            losses[corpus.domains[domain]].append(loss)
    model.train(was_training)
    return {domain: sum(values) / len(values) for domain, values in losses.items() if values}


def learning_rate(step: int, settings: Settings) -> float:
    """The rate of a step, from 0: linear warm-up, whose first step already learns, then half a cosine down to
    `final_learning_rate` (Loshchilov & Hutter 2017, arXiv 1608.03983)."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    floor = settings.final_learning_rate
    return settings.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass
class Run:
    """The state of one training run and how it is stored."""

    state_name = STATE_FILE  # of what it resumes from

    model: MoEForCausalLM
    corpus: Corpus
    settings: Settings
    out: Path | None
    save_every: int
    evaluate_every: int | None
    snapshots: Collection[int]

    def __post_init__(self) -> None:
        """Begin, or raise ValueError, as `train` says, for what could not be trained, or not as it is asked for."""
        _require_full_precision(self.model)
        _require_same_tokens(self.model, self.corpus)
        if not self.model.config.router_learns:
            reason = "since the router gets no gradient of the loss where its only weight is always 1"
            wanted = f"wanted 2 or more, or norm_topk_prob=False, {reason}"
            raise ValueError(f"num_experts_per_tok=1 with normalised weights: {wanted}")
        for name in ("save_every", "evaluate_every"):
            every = getattr(self, name)
            require(every is None or every >= 1, name, every, "at least 1")
        steps, snapshots = self.settings.steps, list(self.snapshots)
        fits = not snapshots or (self.out is not None and set(snapshots) <= set(range(steps + 1)))
        require(fits, f"out={self.out}, snapshots", snapshots, f"a folder, and steps from 0 to {steps}")
        self.model.tokenizer_json = self.corpus.tokenizer.to_str(pretty=True)
        self.first_weights = _weights_sha256(self.model)
        self.optimizer = adamw(self.model, self.settings)
        self.step = 0
        self.log: list[dict[str, Any]] = []
        self.seconds_before, self.started = 0.0, time.perf_counter()

    def to_the_end(self) -> list[dict[str, Any]]:
        """Resume, take all steps that are left, write the finished model; returns the log."""
        self.resume()
        bar = progress_bar(total=self.settings.steps, initial=self.step, unit="step", desc="training", leave=True)
        self.model.train()
        with bar:
            while self.step < self.settings.steps:
                record = self.advance()
                tokens = self.settings.batch_size * self.settings.seq_len * record["step"]
                speed = f"{tokens / record['seconds']:,.0f} tokens/s"
                bar.set_postfix_str(f"loss {record['loss']:.3f}, {speed}", refresh=False)
                bar.update()
        self.model.eval()
        self.finish()
        return self.log

    def advance(self) -> dict[str, Any]:
        """Take one step, log it, and save if it is time."""
        settings = self.settings
        shape = {"batch_size": settings.batch_size, "seq_len": settings.seq_len}
        batch = self.corpus.batch("train", **shape, seed=settings.seed, step=self.step)
        ids = batch.input_ids.to(next(self.model.parameters()).device)
        rate = learning_rate(self.step, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.gradients(ids)
        if not losses.loss.isfinite():
            raise FloatingPointError(f"loss={losses.loss.item()} at step {self.step + 1}: wanted a finite number")
        grad_norm = self.clip()
        if self.model.config.e_score_correction_bias:
            sparse = (block.mlp for block in self.model.model.layers if block.is_sparse)
            for layer, load in zip(sparse, losses.load, strict=True):
                update_bias(layer.gate.e_score_correction_bias, load, settings.bias_update_rate)
        self.optimizer.step()
        self.step += 1
        self._record(losses, rate, grad_norm)
        self.take_snapshot()
        if self.out and (self.step % self.save_every == 0 or self.step == settings.steps):
            self.save()
        return self.log[-1]

    def gradients(self, ids: Tensor) -> BatchLosses:
        """Leave the gradient of a batch, ids [B, S], in the model."""
        micro_batches = ids.split(self.settings.batch_size // self.settings.gradient_accumulation_steps)
        return accumulate_gradients(self.model, [{"input_ids": part, "labels": part} for part in micro_batches])

    def clip(self) -> Tensor:
        """Shorten the gradient where it is longer than `max_grad_norm`; returns how long it was."""
        return nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)

    def _record(self, losses: BatchLosses, rate: float, grad_norm: Tensor) -> None:
        """Log the step that was just taken."""
        record = {
            "step": self.step,
            "loss": losses.loss.item(),
            "cross_entropy": losses.cross_entropy.item(),
            "aux_loss": None if losses.aux_loss is None else losses.aux_loss.item(),
            "learning_rate": rate,
            "grad_norm": grad_norm.item(),
            "load": [load.tolist() for load in losses.load],
            "max_violation": [max_violation(load) for load in losses.load],
            "seconds": self.seconds_before + time.perf_counter() - self.started,
        }
        if self.evaluate_every and self.step % self.evaluate_every == 0:
            record["held_out"] = evaluate(self.model, self.corpus)
        self.log.append(record)
        if self.out:
            self.write(record)

    def write(self, record: dict[str, Any]) -> None:
        """Add a record to the file of the log."""
        with open(self.out / LOG_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def take_snapshot(self) -> None:
        """Save the model as it is now, if it is wanted."""
        if self.step in self.snapshots:
            self.model.save_pretrained(self.out / f"step-{self.step}")

    def save(self) -> None:
        """Write weights, optimizer and random state as one file, replacing the last one only when complete."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
        tensors["torch_rng_state"] = torch.get_rng_state()
        about = {**self.identity(), "step": self.step, "seconds": self.log[-1]["seconds"]}
        write_atomically(self.out / STATE_FILE, to_safetensors(tensors, metadata={"minimoe": json.dumps(about)}))

    def resume(self) -> None:
        """Continue from the saved state if there is one, else start with an empty log."""
        torch.manual_seed(self.settings.seed)  # only a noisy router draws from it; a saved state brings its own
        if self.out:
            self.out.mkdir(parents=True, exist_ok=True)
            for leftover in self.out.glob(f".{STATE_FILE}.*"):  # of a save that was killed
                leftover.unlink()
            found = [name for name in (*STATES, "config.json", "model.safetensors") if (self.out / name).exists()]
            if self.state_name in found:
                self.load(self.out / self.state_name)
            elif found:  # which no run of this kind has made, and so is not ours to replace
                held = f"{self.out} holds {' and '.join(found)} but no {self.state_name}"
                raise ValueError(f"{held}: wanted a folder without a model; name another `out`")
            self.rewind_log(self.out / LOG_FILE)
        if self.step == 0:
            self.take_snapshot()

    def load(self, path: Path) -> None:
        """Take weights, optimizer, random state and step from a file of `save`."""
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["minimoe"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, TypeError, KeyError, json.JSONDecodeError) as error:
            size = path.stat().st_size
            raise ValueError(f"{path}: {size} bytes, not a whole saved state; remove it to start again") from error
        self.check_identity(about)
        torch.set_rng_state(tensors.pop("torch_rng_state"))
        moments: dict[int, dict[str, Tensor]] = defaultdict(dict)  # of each parameter, as AdamW numbers them
        for name in tensors:
            if name.startswith("optimizer."):
                _, index, moment = name.split(".")
                moments[int(index)][moment] = tensors[name]
        self.model.load_state_dict({name: tensors[f"model.{name}"] for name in self.model.state_dict()})
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": dict(moments)})
        self.step, self.seconds_before = about["step"], about["seconds"]

    def rewind_log(self, path: Path) -> None:
        """Forget the steps that were logged after the saved state: they are taken again."""
        lines = path.read_bytes().splitlines()[: self.step] if path.exists() else []
        try:
            self.log = [json.loads(line) for line in lines]
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {len(lines)} or an earlier one is not JSON ({error})") from error
        if [record["step"] for record in self.log] != list(range(1, self.step + 1)):
            wanted = (
                f"those of steps 1 to {self.step}, where the saved state is; remove {self.state_name} to start again"
            )
            raise ValueError(f"{path}: {len(lines)} lines, wanted {wanted}")
        write_atomically(path, b"".join(line + b"\n" for line in lines))

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to be continued, as JSON gives it back."""
        identity = {"settings": asdict(self.settings), "config": asdict(self.model.config)}
        identity |= {"corpus_sha256": self.corpus.sha256, "first_weights_sha256": self.first_weights}
        return json.loads(json.dumps(identity))

    def check_identity(self, saved: dict[str, Any]) -> None:
        """Raise ValueError, naming every difference, where the saved run is not the one that is asked for."""
        for name, defaults in (("settings", Settings()), ("config", MoEConfig())):
            saved[name] = json.loads(json.dumps(asdict(defaults))) | saved[name]  # what is younger than the run
        there, wanted = (about | about["settings"] | about["config"] for about in (saved, self.identity()))
        differences = [
            f"{name}={there.get(name)!r} there, {value!r} asked for"
            for name, value in wanted.items()
            if name not in ("settings", "config") and there.get(name) != value
        ]
        if differences:
            remedy = "Use another folder, or remove this one to start again"
            raise ValueError(f"{self.out} holds another run: {'; '.join(differences)}. {remedy}")

    def finish(self) -> None:
        """Leave a complete model folder behind, and the recipe that made it."""
        if not self.out:
            return
        self.model.save_pretrained(self.out)
        recipe = {**self.identity(), "tokens": self.step * self.settings.batch_size * self.settings.seq_len}
        write_atomically(self.out / RECIPE_FILE, (json.dumps(recipe, indent=2) + "\n").encode())


def adamw(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """The optimizer of a run: only matrices decay."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    decaying = {"params": matrices, "weight_decay": settings.weight_decay}
    return torch.optim.AdamW([decaying, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95), fused=True)


def _require_full_precision(model: nn.Module) -> None:
    """Raise a ValueError for weights of 16 bits, in which most of what AdamW adds would be rounded away."""
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            remedy = "use model.float(), or from_pretrained(..., dtype=torch.float32)"
            raise ValueError(f"{name} is in {parameter.dtype}: wanted torch.float32 to train in; {remedy}")


def _require_same_tokens(model: MoEForCausalLM, corpus: Corpus) -> None:
    """Raise a ValueError unless the model and the corpus give the same tokens the same ids."""
    rows, needed = model.config.vocab_size, corpus.vocab_size
    if model.tokenizer_json is None:
        wanted = f"{needed}, that of the corpus, for a model without a tokenizer"
        require(rows == needed, "vocab_size", rows, wanted)
        return
    ours, theirs = read_tokenizer(model.tokenizer_json).get_vocab(), corpus.tokenizer.get_vocab()
    if ours != theirs:
        token = min(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        sizes = f"the model's tokenizer has {len(ours)} tokens, that of the corpus {len(theirs)}"
        found = f"but {token!r} is {ours.get(token)} in the first and {theirs.get(token)} in the second"
        raise ValueError(f"tokenizer_json: {sizes}; wanted the same tokens with the same ids, {found}")
    require(rows >= needed, "vocab_size", rows, f"at least {needed}, that of the corpus")


def _weights_sha256(model: nn.Module) -> str:
    """The sha256 of all weights, with their names and dtypes."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
