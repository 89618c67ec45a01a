"""What the tests of parallel.py run in several processes: functions that a new process can import."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tokenizers import Tokenizer, models

from minimoe.model import MoEConfig, MoEForCausalLM
from minimoe.training.loop import Run, Settings
from minimoe.training.parallel import ParallelRun, require_agreement, shard, train_parallel
from minimoe.training.processes import joined

SHAPE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_experts": 8,
    "num_experts_per_tok": 4,
}
# Of each way to route, and of what else is counted over the whole batch: the bias, a shared expert, sequences, biases.
RULES = {
    "topk": {"router": "topk", "router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.01},
    "sequence": {"router": "topk_softmax", "router_aux_loss_coef": 0.1, "seq_aux": True, "moe_bias": True},
    "bias": {"score_func": "sigmoid", "e_score_correction_bias": True, "mlp_only_layers": (0,)},
    "grouped": {
        "router": "grouped",
        "n_group": 4,
        "router_scale": True,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.1,
        "shared_expert_intermediate_size": 8,
    },
    "capacity": {"router": "topk", "capacity_factor": 0.6, "router_aux_loss_coef": 0.1, "tie_word_embeddings": False},
    "switch": {"router": "switch", "num_experts_per_tok": 1, "norm_topk_prob": False, "capacity_factor": 0.8},
}
FEW = {"steps": 20, "batch_size": 4, "seq_len": 12, "warmup_steps": 4, "learning_rate": 0.01}


class Drawn:
    """A corpus of random tokens, of which low ones are more frequent."""

    domains = ("drawn",)
    vocab_size = 32
    sha256 = "drawn"
    tokenizer = Tokenizer(models.BPE())

    def batch(self, split, *, batch_size, seq_len, seed, step):
        rng = np.random.default_rng([seed, step, split == "train"])
        ids = (32 * rng.random((batch_size, seq_len)) ** 2).astype(np.int64)
        return SimpleNamespace(input_ids=torch.from_numpy(ids), domains=torch.zeros(batch_size, dtype=torch.int64))


def build(rule, **settings):
    """A model of a rule, in float64, whose router prefers some experts."""
    model = MoEForCausalLM(MoEConfig(**SHAPE | RULES[rule] | settings)).double()
    with torch.no_grad():
        for block in model.model.layers:
            if block.is_sparse:
                block.mlp.gate.weight *= 20
    return model


def trained(ranks, rules, out, settings):
    """Of each rule: the log and the weights after training, in `out`/rule if a folder is given."""
    results = {}
    for rule in rules:
        model = build(rule)
        log = train_parallel(model, Drawn(), ranks, out=out and f"{out}/{rule}", **FEW | settings)
        results[rule] = log, model.state_dict()
    return results


class Stopping(Drawn):
    """The same corpus, until a step at which it stops the run, as a kill would."""

    def __init__(self, at):
        self.at = at

    def batch(self, split, *, step, **options):
        if step == self.at:
            raise KeyError("stop")
        return super().batch(split, step=step, **options)


def stopped_then_resumed(ranks, rule, out, at, settings):
    """Train from what lies in `out`, up to step `at` (then None is returned), or to the end."""
    model = build(rule)
    try:
        log = train_parallel(model, Stopping(at), ranks, out=out, **FEW | settings)
    except KeyError:
        return None
    return log, model.state_dict()


def undisturbed_and_resumed(ranks, rule, out, other, settings):
    """Log and weights of a run that nothing stopped, and of one that was stopped at step 5 and resumed.

    A second one, in the folder `other`, is left stopped.
    """
    whole = stopped_then_resumed(ranks, rule, None, None, settings)
    for folder in (out, other):
        assert stopped_then_resumed(ranks, rule, folder, 5, settings) is None
    return whole, stopped_then_resumed(ranks, rule, out, None, settings)


def first_steps(rule, steps, settings):
    """The log of the first steps of a run in one process."""
    log = []

    class Kept(Run):
        def write(self, record):
            log.append(record)

    run = Kept(build(rule), Drawn(), Settings(**FEW | settings), Path("nowhere"), 10**9, None, ())
    run.model.train()
    for _ in range(steps):
        run.advance()
    return log


def sent_and_written(ranks):
    """Bytes that were counted in two steps, those that the system saw this process write, and the calls."""

    def written():
        return int(Path("/proc/self/io").read_text(encoding="utf-8").split("wchar: ")[1].split()[0])

    run = ParallelRun(build("capacity"), Drawn(), Settings(**FEW), None, 100, None, (), ranks)
    run.model.train()
    ranks.sent.clear()
    before = written()
    run.advance(), run.advance()
    return sum(s.bytes for s in ranks.sent.values()), written() - before, sum(s.calls for s in ranks.sent.values())


def sent_in_a_forward(ranks, rules):
    """By rule: what one forward pass sent and received, what its routers chose, and the bytes of a row."""
    found = {}
    for rule in rules:
        model, ranks.sent = build(rule), {}
        experts = shard(model, ranks)
        chosen = model(torch.arange(24).view(2, 12) + ranks.rank, output_router_logits=True).router_outputs
        found[rule] = ranks.sent, [layer.received for layer in experts], [output.indices for output in chosen], 16 * 8
    return found


def abort(ranks):
    """The last rank ends as a process does whose C++ code gives up."""
    if ranks.rank == ranks.size - 1:
        print("about to give up", flush=True)
        os.abort()


def threads():
    """The names of the threads of this process, those that torch has begun among them."""
    return [path.read_text(encoding="utf-8").strip() for path in Path("/proc/self/task").glob("*/comm")]


def refusals(ranks):
    """What is said of runs that cannot be cut into parts, and of processes that differ."""
    said = []
    for config, settings in (
        ({}, {}),
        ({"num_experts": 6}, {}),
        ({"num_experts": 0}, {"batch_size": 6}),
        ({"num_experts": 6, "router": "expert_choice", "capacity_factor": 1.0}, {"batch_size": 6}),
        ({"num_experts": 6}, {"batch_size": 6, "gradient_accumulation_steps": 3}),
    ):
        model = MoEForCausalLM(MoEConfig(**SHAPE | config))
        try:
            train_parallel(model, Drawn(), ranks, **FEW | settings)
        except ValueError as error:
            said.append(str(error))
    try:
        require_agreement(
            ranks, {"settings": {"seed": int(ranks.rank == 1)}, "torch": "other" if ranks.rank == 1 else "here"}
        )
    except ValueError as error:
        said.append(str(error))
    return said


if __name__ == "__main__":  # started by torchrun: trains for longer than anybody waits
    torch.set_num_threads(1)
    with joined() as ranks:
        Path(sys.argv[1]).mkdir(exist_ok=True)
        (Path(sys.argv[1]) / f"{ranks.rank}.pid").write_text(str(os.getpid()), encoding="utf-8")
        train_parallel(build("topk"), Drawn(), ranks, out=sys.argv[1], **FEW | {"steps": 10**6}, save_every=5)
