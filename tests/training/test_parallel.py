"""Experts over processes: that several compute what one does, what they send, and that all end when one is gone."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import ProcessExitedException

from minimoe.model import MoEForCausalLM
from minimoe.training import train
from minimoe.training.loop import LOG_FILE, RECIPE_FILE, STATE_FILE, STATE_FOLDER
from minimoe.training.processes import BEAT, ENDS_WITHIN, PATIENCE, joined, run_processes
from tests.training import workers
from tests.training.workers import FEW, RULES, Drawn, build

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
THE_ISSUE = ("topk", "grouped", "capacity")


@cache
def alone(rule, **settings):
    """Log and weights of one process that sees the whole batch."""
    model = build(rule)
    return train(model, Drawn(), **FEW | settings), model.state_dict()


def assert_equal(found, expected, tolerance):
    """Logs and weights agree; with a tolerance of 0 to the bit."""
    (log, weights), (expected_log, expected_weights) = found, expected
    for name in ("step", "loss", "cross_entropy", "learning_rate", "grad_norm"):
        assert [r[name] for r in log] == pytest.approx([r[name] for r in expected_log], rel=0, abs=tolerance), name
    for name in ("load", "max_violation"):
        assert [record[name] for record in log] == [record[name] for record in expected_log]
    assert weights.keys() == expected_weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected_weights[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_processes_train_what_one_process_does(size):
    for results in run_processes(size, workers.trained, THE_ISSUE, None, {}):
        for rule, found in results.items():
            assert_equal(found, alone(rule), tolerance=1e-6)


def test_what_else_is_counted_over_the_whole_batch():
    """Balance in sequences, the selection bias, one expert a token; and the balance loss that the log shows."""
    few = {"steps": 4, "max_grad_norm": 0.05}
    rules = (*(RULES.keys() - set(THE_ISSUE)), "topk")
    for results in run_processes(2, workers.trained, rules, None, few):
        for rule, found in results.items():
            assert_equal(found, alone(rule, **few), tolerance=1e-6)
        aux_losses = [[record["aux_loss"] for record in log] for log in (results["topk"][0], alone("topk", **few)[0])]
        assert aux_losses[0] == pytest.approx(aux_losses[1], abs=1e-6)


def test_a_part_of_the_batch_by_itself_would_train_another_model():
    """The test above can fail: half of the batch has another balance loss and drops other slots."""
    for rule in ("topk", "capacity"):
        half = train(build(rule), Drawn(), **FEW | {"batch_size": 2, "steps": 1})
        assert half[0]["aux_loss"] != pytest.approx(alone(rule)[0][0]["aux_loss"], abs=1e-3)


def test_folder_is_that_of_a_single_process(tmp_path):
    """config.json and tokenizer.json to the byte; weights, log and recipe; and transformers can open it."""
    few = {"steps": 3}
    train(build("topk"), Drawn(), out=tmp_path / "one", **FEW | few)
    run_processes(2, workers.trained, ("topk",), tmp_path / "two", few)
    one, two = tmp_path / "one", tmp_path / "two" / "topk"
    assert {path.name for path in two.iterdir()} - {STATE_FOLDER} == {path.name for path in one.iterdir()} - {
        STATE_FILE
    }
    for name in ("config.json", "tokenizer.json", RECIPE_FILE):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    first, second = MoEForCausalLM.from_pretrained(one), MoEForCausalLM.from_pretrained(two)
    torch.testing.assert_close(second.state_dict(), first.state_dict(), rtol=0, atol=1e-6)
    lines = [(folder / LOG_FILE).read_text(encoding="utf-8").splitlines() for folder in (one, two)]
    assert len(lines[0]) == len(lines[1]) == 3


@pytest.mark.exact("a resumed run is compared to the bit with one that nothing stopped")
def test_resuming_is_exact_and_takes_any_number_of_processes(tmp_path):
    few = {"steps": 6, "save_every": 2}
    folders = tmp_path / "two", tmp_path / "four"
    for whole, resumed in run_processes(2, workers.undisturbed_and_resumed, "capacity", *folders, few):
        assert_equal(resumed, whole, tolerance=0)
    out = folders[1]
    assert [path.name for path in (out / STATE_FOLDER).iterdir()] == ["step-4"]
    assert len((out / LOG_FILE).read_text(encoding="utf-8").splitlines()) == 5
    for resumed in run_processes(4, workers.stopped_then_resumed, "capacity", out, None, few):
        assert_equal(resumed, whole, tolerance=1e-6)
    for folder in folders:
        steps = [json.loads(line)["step"] for line in (folder / LOG_FILE).read_text(encoding="utf-8").splitlines()]
        assert steps == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match=f"holds {STATE_FOLDER}.* but no {re.escape(STATE_FILE)}"):
        train(build("capacity"), Drawn(), out=out, **FEW | few)


# --- what is sent ----------------------------------------------------------------------------------------------------


def test_bytes_are_those_that_the_system_says_were_written():
    if not Path("/proc/self/io").exists():
        pytest.skip("only Linux says what a process has written")
    for counted, written, calls in run_processes(2, workers.sent_and_written):
        assert counted <= written <= counted + 1000 * calls + 20_000  # what gloo adds to each


def test_dispatch_is_counted_by_hand():
    """Rows to the other rank are the slots that its experts were given; back come as many; MoGE sends half of all."""
    for rank, by_rule in enumerate(run_processes(2, workers.sent_in_a_forward, ("topk", "grouped"))):
        for rule, (sent, received, indices, row) in by_rule.items():
            given = sum(int((chosen // 4 == 1 - rank).sum()) for chosen in indices)
            assert sent["dispatch"].bytes == given * row
            assert sent["dispatch"].calls == sent["combine"].calls == len(indices) == len(received)
            if rule == "grouped":
                assert set(received) == {indices[0].numel()}, "half of the slots of either rank"


# --- what can go wrong -----------------------------------------------------------------------------------------------


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def launch(*command):
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT)


def wait_for(path, processes):
    """Until something that all of `processes` work at is there."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert all(process.poll() is None for process in processes), processes[0].communicate()[0].decode()
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.02)


def end(processes):
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
        process.wait()


def test_a_killed_process_ends_torchrun_which_names_it_and_the_run_can_be_resumed(tmp_path):
    out = tmp_path / "run"
    run = launch(*TORCHRUN, workers.__file__, str(out))
    try:
        wait_for(out / STATE_FOLDER / "step-5", [run])
        os.kill(int((out / "1.pid").read_text(encoding="utf-8")), signal.SIGKILL)
        said = run.communicate(timeout=ENDS_WITHIN)[0].decode()
    finally:
        end([run])
    assert run.returncode == 1
    assert re.search(r"rank\s*: 1 ", said) and "SIGKILL" in said
    with pytest.raises(ProcessLookupError):
        os.kill(int((out / "0.pid").read_text(encoding="utf-8")), 0)
    (step,) = (int(path.name[5:]) for path in (out / STATE_FOLDER).glob("step-*"))
    settings = {"steps": 10**6}  # what the killed run was asked for; stopped again two steps later
    assert run_processes(1, workers.stopped_then_resumed, "topk", out, step + 2, settings) == [None]
    losses = [json.loads(line)["loss"] for line in (out / LOG_FILE).read_text(encoding="utf-8").splitlines()]
    expected = [record["loss"] for record in workers.first_steps("topk", step + 2, settings)]
    assert losses == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("rank", "how", "message"),
    [
        (1, signal.SIGSTOP, rf"rank 1 \(pid PID on .*\) has given no sign of life for {BEAT * PATIENCE:.0f} s"),
        (0, signal.SIGKILL, "rank 0 or the launcher, which holds what the processes tell each other, is gone"),
    ],
)
def test_a_process_that_is_gone_or_stuck_ends_the_others_which_name_it(tmp_path, rank, how, message):
    """Without torchrun, which would notice by itself: as on another machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    about = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for number in "01":
        environment = {**ENVIRONMENT, **about, "RANK": number, "LOCAL_RANK": number}
        command = [sys.executable, workers.__file__, str(tmp_path / "run")]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    try:
        wait_for(tmp_path / "run" / LOG_FILE, processes)
        gone, other = processes[rank], processes[1 - rank]
        gone.send_signal(how)
        said = other.communicate(timeout=ENDS_WITHIN)[0].decode()
    finally:
        end(processes)
    assert other.returncode == 1
    assert re.search(message.replace("PID", str(gone.pid)), said), said


def test_what_a_process_wrote_before_it_ended_is_a_note_of_the_exception():
    with pytest.raises(ProcessExitedException, match="SIGABRT") as raised:
        run_processes(2, workers.abort)
    (said,) = raised.value.__notes__
    assert "about to give up" in said and "in abort" in said  # and where it was


THREADS_AFTERWARDS = """
from tests.training.workers import FEW, Drawn, build, threads
from minimoe.training.parallel import train_parallel
from minimoe.training.processes import joined
with joined() as ranks:
    train_parallel(build("topk"), Drawn(), ranks, **FEW)
    print(*threads())
print(*threads())
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="this system does not list the threads of a process")
def test_no_thread_of_the_group_outlives_it():
    """One that does may abort a process that has done its work, while Python shuts down."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    environment = {**ENVIRONMENT, **about, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    run = subprocess.run([sys.executable, "-c", THREADS_AFTERWARDS], env=environment, cwd=ROOT, capture_output=True,
                         encoding="utf-8", check=True)  # fmt: skip
    within, after = run.stdout.splitlines()[-2:]
    assert "gloo" in within and "gloo" not in after


def test_the_command_of_the_readme(tmp_path):
    """Two processes on a folder of texts: one of them speaks, and leaves a model that can be opened."""
    for name in ("even", "odd"):
        (tmp_path / "texts" / name).mkdir(parents=True)
        for number in range(12):
            text = " ".join(str(2 * n + (name == "odd")) for n in range(number, number + 60))
            (tmp_path / "texts" / name / f"{number}.txt").write_text(text, encoding="utf-8")
    out = tmp_path / "run"
    run = launch(*TORCHRUN, "-m", "minimoe", "train", "--expert-parallel", "--corpus", str(tmp_path / "texts"),
                 "--steps", "2", "--out", str(out))  # fmt: skip
    try:
        said = run.communicate(timeout=120)[0].decode()
    finally:
        end([run])
    assert run.returncode == 0, said
    assert said.count("parameters,") == said.count("Held-out loss") == 1
    assert MoEForCausalLM.from_pretrained(out).config.num_experts == 8
    assert len((out / LOG_FILE).read_text(encoding="utf-8").splitlines()) == 2


def test_a_bad_launch_says_what_was_found_and_wanted(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(ValueError, match=r"RANK, WORLD_SIZE.*: not in the environment, wanted a start by `torchrun"),
        joined(),
    ):
        pass
    for refused in run_processes(3, workers.refusals):
        assert refused == [
            "num_experts=8: wanted a multiple of the 3 processes, which hold as many each",
            "batch_size=4: wanted a multiple of the 3 processes, which see as many sequences each",
            "num_experts=0: wanted at least one for each process",
            "router='expert_choice': wanted one that looks at a token alone and draws nothing, to run over processes",
            "gradient_accumulation_steps=3: wanted 1 over processes",
            "rank 1 has settings={'seed': 1}, torch='other': wanted settings={'seed': 0}, torch='here', as rank 0 has",
        ]
