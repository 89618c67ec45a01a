"""The zoo: models whose history is known, to test fingerprints on.

The tree stands in tree.py. A member that was trained lies in data/zoo, or in the folder that `Zoo.build` fills: a
complete Hugging Face folder in float16, with lineage.json beside it. The rounded weights are the member, and what its
descendants start from. What needs no training is made from its parents whenever it is asked for.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from shutil import rmtree
from statistics import fmean
from threading import Thread
from typing import Any

import torch

from minimoe.atomic import write_atomically
from minimoe.data_files import data_path
from minimoe.lineage.derive import Derivation
from minimoe.lineage.recipes import INSTANT, TRAINED, open_corpus
from minimoe.lineage.tree import MEMBERS, Member
from minimoe.model import MoEForCausalLM
from minimoe.progress import progress_bar
from minimoe.training import Corpus, Settings, evaluate

HOME = Path("runs/zoo")
LINEAGE = "lineage.json"


@dataclass(frozen=True, kw_only=True)
class Verification:
    """A member made once more, beside the one there is."""

    name: str
    identical: bool  # to the bit
    cosine: float  # of all weights of the two
    loss: float  # held out, of the new one, in nats per token
    stored_loss: float

    @property
    def agrees(self) -> bool:
        """Whether the two are one model, up to what rounding makes of it.

        On a like processor they are identical. Another one rounds differently, and training amplifies that: little from
        stored weights, much from random ones. What other batches give is below both limits.

            measured, against what is stored           from stored weights      from random weights
            with another instruction set of the CPU    0.9999997 and above      0.86 alder, 0.71 mixture-1
            with other batches                         0.995, 0.997             0.61 alder
        """
        from_random = origins(self.name) == {self.name}
        return self.identical or self.cosine > (0.65 if from_random else 0.9999)


class Zoo:
    """The members of the tree, by name.

    Args:
        home: where members that are not shipped lie, and are built.
    """

    def __init__(self, home: str | Path = HOME) -> None:
        self.home = Path(home)

    def folder(self, name: str) -> Path | None:
        """Where a member lies, shipped or built; None if it does not.

        Raises:
            ValueError: there is no such member.
        """
        _find(name)
        places = (data_path("zoo") / name, self.home / name)
        return next((place for place in places if (place / "config.json").exists()), None)

    def has(self, name: str) -> bool:
        """Whether `load` can give it without training."""
        member = _find(name)
        return self.folder(name) is not None or (member.recipe in INSTANT and all(map(self.has, member.parents)))

    def load(self, name: str) -> MoEForCausalLM:
        """A member in float32, in evaluation mode.

        Raises:
            ValueError: there is no such member; it, or an ancestor, was not built.
        """
        member, folder = _find(name), self.folder(name)
        if folder is not None:
            return MoEForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if member.recipe in TRAINED:
            command = f"minimoe zoo build {name}" + (f" --home {self.home}" if self.home != HOME else "")
            raise ValueError(f"{name}: not shipped, and not built in {self.home}; run `{command}`")
        return self._make(member, out=None)

    def build(self, names: Iterable[str] = (), *, processes: int | None = None) -> list[str]:
        """Make members, and whatever they descend from, and leave each as a folder in `home`.

        What is there already is not made again; training that was interrupted goes on.

        Args:
            names: which; none: every member that takes training.
            processes: how many at once, with one thread each; None: as many as there are cores.

        Returns:
            The names that were made, in the order in which they were finished.

        Raises:
            ValueError: there is no such member.
        """
        wanted = list(names) or [name for name, member in MEMBERS.items() if member.recipe in TRAINED]
        missing = self._missing(wanted)
        finished: list[str] = []
        running: dict[Future[None], str] = {}
        processes = processes or os.cpu_count()
        bar = progress_bar(total=sum(map(_steps, missing)), unit="step", desc="building", leave=True)
        pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_prepare_process)
        with bar, pool:
            while len(finished) < len(missing):
                waiting = [name for name in missing if name not in finished and name not in running.values()]
                ready = [name for name in waiting if all(map(self.has, MEMBERS[name].parents))]
                for name in ready[: processes - len(running)]:  # none waits in the pool, so that an interrupt ends it
                    running[pool.submit(self.build_one, name)] = name
                bar.set_postfix_str(", ".join(running.values()))
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    future.result()
                    finished.append(running.pop(future))
                    bar.update(_steps(finished[-1]))
        return finished

    def build_one(self, name: str) -> None:
        """Make one member whose parents are there, and leave it as a folder in `home`."""
        member, folder, training = _find(name), self.home / name, self.home / ".training" / name
        model = self._make(member, out=training)
        facts = {"name": name, **asdict(derivation(name)), "options": dict(member.options)}
        if member.recipe in TRAINED:
            facts["corpus_sha256"] = open_corpus(member.options.get("corpus", "real")).sha256
        write_atomically(folder / LINEAGE, (json.dumps(facts, indent=2) + "\n").encode())
        if member.recipe in TRAINED:
            model.half()  # loses nothing: `_make` has rounded it
        model.save_pretrained(folder)  # config.json last: with it, the folder is whole
        rmtree(training, ignore_errors=True)  # of no use any more, and several times the size of the member

    def verify(self, name: str) -> Verification:
        """Make a member once more, from the parents there are, and compare.

        Raises:
            ValueError: the member, or a parent, was not built.
        """
        stored = self.load(name)
        with tempfile.TemporaryDirectory() as folder:
            again = self._make(_find(name), out=Path(folder))
        ours, theirs = (torch.cat([w.flatten() for w in model.state_dict().values()]) for model in (again, stored))
        corpus = Corpus.real()
        loss, stored_loss = (fmean(evaluate(model, corpus).values()) for model in (again, stored))
        return Verification(
            name=name,
            identical=torch.equal(ours, theirs),
            cosine=float(torch.nn.functional.cosine_similarity(ours.double(), theirs.double(), dim=0)),
            loss=loss,
            stored_loss=stored_loss,
        )

    def _make(self, member: Member, out: Path | None) -> MoEForCausalLM:
        """A new model in float32; one that was trained, rounded to what float16 can hold."""
        parents = [self.load(parent) for parent in member.parents]
        if member.recipe in INSTANT:
            return INSTANT[member.recipe](*parents, **member.options)
        return TRAINED[member.recipe](*parents, out=out, **member.options).eval().half().float()

    def _missing(self, names: Iterable[str]) -> list[str]:
        """Those of `names`, and of the trained members they come from, that are neither shipped nor built."""
        wanted = [name for name in names if self.folder(name) is None]
        needed = [[*(one for one in ancestors(name) if MEMBERS[one].recipe in TRAINED), name] for name in wanted]
        return list(dict.fromkeys(name for each in needed for name in each if self.folder(name) is None))


def derivation(name: str) -> Derivation:
    """Where a member comes from.

    Raises:
        ValueError: there is no such member.
    """
    member = _find(name)
    options = ", ".join(f"{key}={value!r}" for key, value in member.options.items())
    return Derivation(
        parents=member.parents,
        recipe=f"{member.recipe}({options})",
        seed=member.options.get("seed", 0),
        tokens=_steps(name) * Settings.batch_size * Settings.seq_len if member.recipe in TRAINED else 0,
        function_unchanged=member.exact,
    )


def ancestors(name: str) -> list[str]:
    """All members that a member was made from, whatever was taken from them, the oldest first."""
    found: dict[str, None] = {}
    for parent in _find(name).parents:
        found |= dict.fromkeys([*ancestors(parent), parent])
    return list(found)


def origins(name: str) -> frozenset[str]:
    """The members trained from random weights from which a member inherited weights.

    A student has none of its teacher, a framed model none of the one it imitates.
    """
    member = _find(name)
    if member.recipe in ("from_scratch", "distil"):
        return frozenset([name])
    givers = member.parents[:1] if member.recipe.startswith("frame") else member.parents
    return frozenset().union(*map(origins, givers))


def relation(a: str, b: str) -> str:
    """What is true of two members: "shared lineage", "same first weights", "teacher and student" or "strangers".

    "same first weights" are twins: trained apart, on other text, from the same random weights. "teacher and student":
    one learnt from what the other, or a relative of it, predicts, and no weight was passed on.
    """
    if origins(a) & origins(b):
        return "shared lineage"
    if _beginnings(a) & _beginnings(b):
        return "same first weights"
    if _teachers(a) & origins(b) or _teachers(b) & origins(a):
        return "teacher and student"
    return "strangers"


def _beginnings(name: str) -> set[tuple[Any, ...]]:
    options = [MEMBERS[origin].options for origin in origins(name)]
    return {(o["weights"], o.get("shape"), o.get("initialisation")) for o in options}


def _teachers(name: str) -> set[str]:
    """The origins of the models that a member's origins were taught by."""
    students = [MEMBERS[origin] for origin in origins(name) if MEMBERS[origin].recipe == "distil"]
    return set().union(*(origins(parent) for student in students for parent in student.parents))


def _find(name: str) -> Member:
    if name not in MEMBERS:
        raise ValueError(f"{name!r}: not in the zoo; `minimoe zoo list` names its members")
    return MEMBERS[name]


def _steps(name: str) -> int:
    return MEMBERS[name].options.get("steps", 1)


def _prepare_process() -> None:
    torch.set_num_threads(1)
    os.environ["MINIMOE_PROGRESS"] = "0"  # one bar, that of the parent process
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A build that was killed must not go on in the folders that the next one works in."""
    parent_process().join()
    os._exit(1)
