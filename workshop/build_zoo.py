"""The members of the zoo that take training, made and checked.

    python -m workshop.build_zoo [NAME ...] [--processes N] [--home runs/zoo]
    python -m workshop.build_zoo --verify [NAME ...] [--home runs/zoo]

The first makes the members named, all that take training if none is, and whatever they descend from; what was
interrupted goes on. The second trains members once more, a root and a descendant if none is named, and compares; exit
status 1 if one comes out as another model.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from shutil import rmtree
from statistics import fmean
from threading import Thread

import torch

from minimoe.lineage.tree import MEMBERS
from minimoe.lineage.zoo import HOME, Zoo, ancestors, origins
from minimoe.model import MoEForCausalLM
from minimoe.progress import progress_bar
from minimoe.training import Corpus, evaluate
from workshop.training_recipes import TRAINED, open_corpus


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


class ZooBuilder(Zoo):
    """A zoo that also makes the members that take training."""

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
        missing = self.missing(wanted)
        self.home.mkdir(parents=True, exist_ok=True)  # what cannot be written to is found before the work is done
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
        """Make one member whose parents are there, by training too, and leave it as a folder in `home`.

        Raises:
            ValueError: there is no such member; an ancestor was not built.
        """
        if name not in MEMBERS or MEMBERS[name].recipe not in TRAINED:
            return super().build_one(name)
        training = self.home / ".training" / name
        model = self._train(name, out=training).half()  # loses nothing: it has been rounded
        self._write(name, model, corpus_sha256=open_corpus(MEMBERS[name].options.get("corpus", "real")).sha256)
        rmtree(training, ignore_errors=True)  # of no use any more, and several times the size of the member

    def verify(self, name: str) -> Verification:
        """Make a member once more, from the parents there are, and compare.

        Raises:
            ValueError: there is no such member; it, or a parent, was not built.
        """
        stored = self.load(name)
        with tempfile.TemporaryDirectory() as folder:
            again = self._train(name, out=Path(folder)) if MEMBERS[name].recipe in TRAINED else self.make(name)
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

    def _train(self, name: str, out: Path) -> MoEForCausalLM:
        """A new model in float32, rounded to what float16 can hold."""
        member = MEMBERS[name]
        parents = map(self.load, member.parents)
        return TRAINED[member.recipe](*parents, out=out, **member.options).eval().half().float()

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of `names`, and of the trained members they come from, that are neither shipped nor built."""
        wanted = [name for name in names if self.folder(name) is None]
        needed = [[*(one for one in ancestors(name) if MEMBERS[one].recipe in TRAINED), name] for name in wanted]
        return list(dict.fromkeys(name for each in needed for name in each if self.folder(name) is None))


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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m workshop.build_zoo", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a member")
    parser.add_argument("--verify", action="store_true", help="make members that are there once more, and compare")
    parser.add_argument("--processes", type=int, help="at once; as many as cores when left out")
    parser.add_argument("--home", type=Path, default=HOME, help="for members that are not shipped (default runs/zoo)")
    given = parser.parse_args(arguments)
    builder = ZooBuilder(given.home)
    try:
        return _verify(builder, given.names) if given.verify else _build(builder, given.names, given.processes)
    except (ValueError, OSError, FloatingPointError) as error:
        parser.exit(1, f"error: {error}\n")


def _build(builder: ZooBuilder, names: Sequence[str], processes: int | None) -> int:
    made = builder.build(names, processes=processes)
    print(f"{len(made)} made in {builder.home}" + (f": {', '.join(made)}" if made else ", nothing was missing"))
    return 0


def _verify(builder: ZooBuilder, names: Sequence[str]) -> int:
    torch.set_num_threads(1)
    agree = []
    for name in names or ("alder", "alder-finetuned"):
        found = builder.verify(name)
        words = "identical to the bit" if found.identical else f"cosine of all weights {found.cosine:.4f}"
        print(f"{name}: {words}; held-out loss {found.loss:.3f}, stored {found.stored_loss:.3f} nats")
        agree.append(found.agrees)
    return 0 if all(agree) else 1


if __name__ == "__main__":
    raise SystemExit(main())
