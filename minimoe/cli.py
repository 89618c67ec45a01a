"""The command line: `minimoe train | sample | site | figures | compare | fingerprint | tree | families`,
`minimoe card make | check`, `minimoe fleet add | find | tree | stats`, and
`minimoe zoo list | show | build | path | verify`."""

import os
import shlex
import subprocess
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(
    help="Learn how mixture-of-experts language models work.", no_args_is_help=True, pretty_exceptions_enable=False
)
_PLACES = "A folder in the Hugging Face layout, a safetensors or GGUF file, a repository of the hub, an address"
Model = Annotated[str, typer.Argument(help=f"{_PLACES}, or a saved .npz.")]
zoo = typer.Typer(help="Models whose history is known.", no_args_is_help=True)
app.add_typer(zoo, name="zoo")
card = typer.Typer(help="What to publish with a model, so that nobody has to guess.", no_args_is_help=True)
app.add_typer(card, name="card")
fleet = typer.Typer(help="A store of many models, to find relatives in.", no_args_is_help=True)
app.add_typer(fleet, name="fleet")

StoreFolder = Annotated[Path, typer.Option("--store", help="Folder of the store.")]
Home = Annotated[Path, typer.Option(help="Folder for members that are not shipped.")]
_STOPPED = 130  # the exit status of what Ctrl-C has ended
HOME, RUN, FLEET, SITE = Path("runs/zoo"), Path("runs/moe"), Path("runs/fleet"), Path("site")


@contextmanager
def _plain(status: int = 1) -> Iterator[None]:
    """Run a command on one thread; say errors that a user can cause, warnings and Ctrl-C in one line each."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: typer.secho(f"warning: {message}", fg="yellow", err=True)
        try:
            import torch

            torch.set_num_threads(1)
            yield
        except KeyboardInterrupt as error:
            typer.secho("stopped", fg="red", err=True)
            raise typer.Exit(_STOPPED) from error
        except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
            typer.secho(f"error: {error}", fg="red", err=True)
            raise typer.Exit(status) from error


@app.command("train")
@_plain()
def train_command(
    corpus: Annotated[str, typer.Option(help="'real', 'planted', or a folder of text files.")] = "real",
    out: Annotated[Path, typer.Option(help="Folder for log, checkpoints and model; resumes what it holds.")] = RUN,
    steps: Annotated[int, typer.Option(min=1, help="Of 8 x 128 tokens each.")] = 1600,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights and of the batches.")] = 0,
    experts: Annotated[int, typer.Option(min=0, help="0 trains a dense model of equal active parameters.")] = 8,
    experts_per_token: Annotated[int, typer.Option(min=1)] = 2,
    balance: Annotated[
        Literal["loss", "sequence", "bias", "none"],
        typer.Option(help="A loss over the batch or in each sequence, a selection bias, or none."),
    ] = "loss",
    threads: Annotated[int, typer.Option(min=1, help="More than one gives up bit-identical repeats.")] = 1,
    expert_parallel: Annotated[
        bool, typer.Option("--expert-parallel", help="Experts over the processes that torchrun started.")
    ] = False,
) -> None:
    """Train a small mixture of experts and show what it has learnt."""
    import torch

    torch.set_num_threads(threads)
    if not expert_parallel:
        _train(corpus, out, steps, seed, experts, experts_per_token, balance)
        return
    from minimoe.training.processes import joined

    with joined() as ranks:
        _train(corpus, out, steps, seed, experts, experts_per_token, balance, ranks)


def _train(
    corpus: str, out: Path, steps: int, seed: int, experts: int, experts_per_token: int, balance: str, ranks=None
) -> None:
    """Train, in this process or over `ranks`, of which the first alone speaks."""
    from minimoe import Corpus, MoEForCausalLM, evaluate, train
    from minimoe.training.presets import small_config

    say = typer.echo if ranks is None or ranks.rank == 0 else lambda _: None
    _check_writable(out)  # before the corpus is read, which takes a while
    known = {"real": Corpus.real, "planted": Corpus.planted}
    text = known[corpus]() if corpus in known else Corpus.from_folder(corpus)
    config = small_config(text.vocab_size, experts=experts, experts_per_token=experts_per_token, balance=balance)
    model = MoEForCausalLM(config, seed=seed)
    total, active = config.num_parameters(), config.num_parameters(active=True)
    say(f"{total:,} parameters, {active:,} active per token; corpus: {', '.join(text.domains)}")
    if ranks is None:
        log = train(model, text, out=out, steps=steps, seed=seed)
    else:
        from minimoe.training.parallel import train_parallel

        log = train_parallel(model.to(ranks.device), text, ranks, out=out, steps=steps, seed=seed)
        if ranks.rank > 0:
            return
    typer.echo("\nHeld-out loss, nats per token")
    for domain, loss in evaluate(model, text).items():
        typer.echo(f"  {domain:<20} {loss:.2f}")
    _show_samples(model, text, seed)
    typer.echo(f"\nTrained in {log[-1]['seconds']:.0f} s, saved in {out}. Try:")
    typer.echo(f"  minimoe sample {shlex.quote(str(out))} --prompt 'def '")


@app.command()
@_plain()
def site(
    out: Annotated[Path, typer.Option(help="Folder for the pages.")] = SITE,
    serve: Annotated[bool, typer.Option("--serve", help="Open them in a browser, until Ctrl-C.")] = False,
) -> None:
    """Write the course as pages, in a clone of the repository; models run in two of them."""
    _check_writable(out)
    _run_in_workshop("workshop.website", "--out", str(out), *(["--serve"] if serve else []))


@app.command()
@_plain()
def sample(
    model: Annotated[str, typer.Argument(help=f"{_PLACES}; with its tokenizer.json.")],
    prompt: Annotated[str, typer.Option()] = "def ",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 120,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1)] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0)] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Continue a prompt with a trained model."""
    from minimoe import MoEForCausalLM, generate

    network = MoEForCausalLM.from_pretrained(model)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    typer.echo(generate(network, prompt, max_new_tokens, **options))


@app.command()
@_plain()
def figures(
    names: Annotated[list[str] | None, typer.Argument(help="Which ones; all when left out.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for PNG, SVG and CSV files.")] = Path("figures"),
) -> None:
    """Make the figures of the course, with their numbers."""
    from minimoe.course import figures as course_figures

    for path in course_figures.make(names, out):
        typer.echo(path)


@app.command("compare")
@_plain(status=2)
def compare_command(
    a: Model,
    others: Annotated[list[str], typer.Argument(metavar="B", help="The other model; with --parents, one or more.")],
    methods: Annotated[
        str | None,
        typer.Option(help="'all', or names with commas between; those that decide the verdict when left out."),
    ] = None,
    background: Annotated[
        list[str] | None, typer.Option(help="A model known to be a stranger to both; give at least three.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Look at the last layers alone, which takes a small part of the files.")
    ] = False,
    direction: Annotated[
        bool, typer.Option("--direction", help="Say of relatives which is the ancestor; reads all of both.")
    ] = False,
    parents: Annotated[
        bool, typer.Option("--parents", help="How much A has of each of the others, which were merged in it.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="With --parents: what they were trained from, where differences were merged.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The whole report, for programs.")] = False,
) -> None:
    """Say what evidence there is that two models share weights. Exit status 2 where they cannot be read."""
    from minimoe import compare
    from minimoe.fingerprints.merges import shares
    from minimoe.fingerprints.weights import open_weights

    if parents:
        if methods or background or quick or direction:
            raise ValueError("--parents: wanted none of --methods, --background, --quick, --direction beside it")
        model, *opened = map(open_weights, (a, *others))
        found = shares(model, opened, base=None if base is None else open_weights(base))
        typer.echo(found.to_json() if as_json else str(found))
        return
    if len(others) != 1 or base is not None:
        raise ValueError(
            f"{len(others)} models beside the first, base={base}: wanted one and no base without --parents"
        )
    if quick and methods is not None:
        raise ValueError(f"methods={methods}: wanted none beside --quick, which has its own")
    methods = "quick" if quick else methods
    chosen = {} if methods is None else {"methods": methods if methods in ("all", "quick") else methods.split(",")}
    report = compare(a, others[0], background=background, ask_direction=direction, **chosen)
    typer.echo(report.to_json() if as_json else str(report))


@app.command("fingerprint")
@_plain(status=2)
def fingerprint_command(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The .npz file to write, below 5 MB.")],
) -> None:
    """Save what `minimoe compare` needs of a model, so that it can be compared again without its weights."""
    from minimoe import fingerprint

    if out.suffix != ".npz":
        raise ValueError(f"out={out}: wanted a name that ends in .npz")
    found = fingerprint(model)
    found.save(out)
    typer.echo(f"{out}: {out.stat().st_size:,} bytes")
    for name, reason in found.refused.items():
        typer.echo(f"  without {name}: {reason}")


@app.command("tree")
@_plain(status=2)
def tree_command(models: Annotated[list[str], typer.Argument(help=f"{_PLACES}; two or more.")]) -> None:
    """Draw models as a forest: relatives below each other, ancestors first, strangers apart."""
    from minimoe.fleet.forest import tree_of

    typer.echo(tree_of(models))


@app.command()
@_plain()
def families() -> None:
    """List the families of models that run here, and say which others can be read."""
    from minimoe.fingerprints.roles import known_architectures
    from minimoe.model.families import FAMILIES

    for name, family in FAMILIES.items():
        typer.echo(f"{name:<14} {family.architecture}")
    typer.echo(
        "\nThese run. Others are read, by the names of their tensors, for `compare` and `fingerprint`. What they\n"
        "compute from their weights is not written here: the methods that run a model refuse them, and say so.\n"
        "(They also refuse deepseek_v2, deepseek_v3 and gpt_oss, whose attention or experts they do not follow.)\n"
        "As llama.cpp calls them, these are:\n"
    )
    running = {name.replace("_", "") for name in FAMILIES} | {"deepseek2", "gpt-oss"}
    names = ", ".join(name for name in known_architectures() if name not in running)
    typer.echo(textwrap.fill(names, 100, break_on_hyphens=False))


@card.command("make")
@_plain(status=2)
def make_card_command(
    folder: Annotated[Path, typer.Argument(help="A model in the Hugging Face layout.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .json file to write; its fingerprint goes beside it.")],
    parent: Annotated[list[str] | None, typer.Option(help="A model that gave it weights.")] = None,
) -> None:
    """Begin a lineage card: hashes and fingerprint are filled in, words are left to you."""
    from minimoe.fingerprints.card import make_card

    make_card(folder, out, parents=parent or ())
    typer.echo(f"{out}: write recipe, data and licences into it, then")
    typer.echo(f"  minimoe card check {shlex.quote(str(out))} {shlex.quote(str(folder))}")


@card.command("check")
@_plain(status=2)
def check_card_command(
    card: Annotated[Path, typer.Argument(help="The .json file.")],
    folder: Annotated[Path, typer.Argument(help="The model it is about.")],
    parent: Annotated[list[str] | None, typer.Option(help="A parent that is at hand, to be compared.")] = None,
) -> None:
    """Check a lineage card against its model. Exit status 1 if something does not match, 2 if it cannot be read."""
    from minimoe.fingerprints.card import MISMATCH, check_card

    findings = check_card(card, folder, parents=parent or ())
    typer.echo("\n".join(map(str, findings)))
    if any(finding.status == MISMATCH for finding in findings):
        raise typer.Exit(1)


@fleet.command("add")
@_plain(status=2)
def add_command(
    names: Annotated[list[str], typer.Argument(help=f"{_PLACES}; those the store has are skipped.")],
    store: StoreFolder = FLEET,
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a Dask cluster; this machine when left out.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes on this machine.")] = None,
) -> None:
    """Read models into the store. Goes on where it was interrupted; exit status 1 if some cannot be read."""
    from minimoe.fleet.adding import add
    from minimoe.fleet.store import Failed, Store

    with Store(store) as opened:
        found = add(opened, names, scheduler=scheduler, workers=workers)
        failed = [one for one in found.values() if isinstance(one, Failed)]
        for one in failed:
            typer.secho(f"  without {one.name}: {one.reason}", fg="red", err=True)
        typer.echo(f"{len(found) - len(failed)} of {len(names)} read now; {len(opened)} models in {store}")
    if failed:
        raise typer.Exit(1)


@fleet.command("find")
@_plain(status=2)
def find_command(
    model: Annotated[str, typer.Argument(help=f"{_PLACES}.")],
    store: StoreFolder = FLEET,
    count: Annotated[int, typer.Option(min=1, help="How many of the nearest to list.")] = 20,
    compared: Annotated[int, typer.Option(min=0, help="How many of them to compare, if they are at hand.")] = 3,
) -> None:
    """List the models of the store that are nearest to one, the first of them with a verdict."""
    from minimoe.fleet.finding import find
    from minimoe.fleet.store import Store

    _require_store(store)
    with Store(store) as opened:
        typer.echo(f"{'similarity':<12}{'verdict':<32}name")
        for found in find(opened, model, count=count, compared=compared):
            typer.echo(f"{found.near.similarity:<12.3f}{found.verdict:<32}{', '.join(found.near.names)}")


@fleet.command("tree")
@_plain(status=2)
def fleet_tree_command(store: StoreFolder = FLEET) -> None:
    """Draw the models of the store as a forest."""
    from minimoe.fleet.forest import tree_of_store
    from minimoe.fleet.store import Store

    _require_store(store)
    with Store(store) as opened:
        typer.echo(tree_of_store(opened))


@fleet.command("stats")
@_plain(status=2)
def stats_command(store: StoreFolder = FLEET) -> None:
    """Count what the store holds, and name what could not be read."""
    from minimoe.fleet.store import Store

    _require_store(store)
    with Store(store) as opened:
        for what, number in opened.stats().items():
            typer.echo(f"{what:<24} {number:,}")
        for name, reason in opened.failures().items():
            typer.echo(f"  without {name}: {reason}")


def _require_store(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: found no store, wanted one that `minimoe fleet add` made")


@zoo.command("list")
def list_members(
    pattern: Annotated[str, typer.Argument(help="As for files: 'alder-*', '*drop*'.")] = "*", home: Home = HOME
) -> None:
    """Name the members, and where each one is."""
    from fnmatch import fnmatchcase

    from minimoe.lineage.zoo import MEMBERS, Zoo

    there = Zoo(home)
    found = [name for name in MEMBERS if fnmatchcase(name, pattern)]
    for name in found:
        folder = there.folder(name)
        typer.echo(f"{name:<40} {folder or ('made when asked for' if there.has(name) else 'not built')}")
    typer.echo(f"{len(found)} of {len(MEMBERS)} members")


@zoo.command()
@_plain()
def show(name: Annotated[str, typer.Argument(help="Of a member.")], home: Home = HOME) -> None:
    """Tell where a member comes from, step by step, and what came from it."""
    from minimoe.lineage.zoo import MEMBERS, Zoo, ancestors, derivation

    for step in (*ancestors(name), name):
        made = derivation(step)
        typer.secho(step, bold=step == name)
        typer.echo(f"  from      {', '.join(made.parents) or 'random weights'}")
        typer.echo(f"  by        {made.recipe}")
        typer.echo(f"  tokens    {made.tokens:,}")
        typer.echo(f"  function  {'unchanged' if made.function_unchanged else 'its own'}")
    children = [member.name for member in MEMBERS.values() if name in member.parents]
    typer.echo(f"  led to    {', '.join(children) or 'none'}")
    typer.echo(f"  lies in   {Zoo(home).folder(name) or 'no folder yet'}")


@zoo.command()
@_plain()
def build(
    names: Annotated[list[str] | None, typer.Argument(help="Which; all that take training when left out.")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="At once; as many as cores when left out.")] = None,
    home: Home = HOME,
) -> None:
    """Make members, and what they come from, in a clone of the repository. Goes on where it was interrupted."""
    _check_writable(home)
    at_once = ["--processes", str(processes)] if processes else []
    _run_in_workshop("workshop.build_zoo", *(names or ()), "--home", str(home), *at_once)


@zoo.command()
@_plain()
def verify(
    names: Annotated[list[str] | None, typer.Argument(help="Which; a root and a descendant when left out.")] = None,
    home: Home = HOME,
) -> None:
    """Train members once more, in a clone of the repository. Exit status 1 if one comes out as another model."""
    _run_in_workshop("workshop.build_zoo", *(names or ()), "--home", str(home), "--verify")


@zoo.command()
@_plain()
def path(name: Annotated[str, typer.Argument(help="Of a member.")], home: Home = HOME) -> None:
    """Print the folder of a member, for other tools to open. What needs no training is made on the spot."""
    from minimoe.lineage.zoo import Zoo

    there = Zoo(home)
    if there.folder(name) is None and there.has(name):
        there.build_one(name)
    if there.folder(name) is None:
        there.load(name)  # says what is missing
    typer.echo(there.folder(name))


def _run_in_workshop(module: str, *arguments: str) -> None:
    """Do what makes the course and is no part of the package."""
    from minimoe.data_files import workshop_command

    command, environment = workshop_command(module, *arguments)
    raise typer.Exit(subprocess.run(command, env=environment, check=False).returncode)


def _check_writable(folder: Path) -> None:
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise PermissionError(f"{folder}: cannot be made or written to, because of {nearest}; wanted a folder of yours")


def _show_samples(model, corpus, seed: int) -> None:
    """Continue the beginning of one held-out stretch of each domain."""
    from minimoe import generate

    for domain in corpus.domains:
        prompt = corpus.decode(corpus.tokens(domain, "held_out")[1:13].tolist()).rstrip("\ufffd")  # half a character
        text = generate(model, prompt, 60, temperature=0.7, seed=seed)
        typer.secho(f"\n--- {domain}", bold=True)
        typer.echo(prompt + typer.style(text.removeprefix(prompt), fg="green"))


if __name__ == "__main__":
    app()
