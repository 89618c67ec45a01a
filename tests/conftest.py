"""What all tests share: threads, seeds, rounding, bounded property tests, every kind of router, a browser, the site."""

import os
import random
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.chromium import CHROMIUM, PATIENCE
from tests.rounding import perturbed, seed_from_environment

ROUNDING = seed_from_environment()
THREADS = int(os.environ.get("OMP_NUM_THREADS", 1))
torch.set_num_threads(THREADS)
settings.register_profile(
    "minimoe", derandomize=True, deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("minimoe")

# One configuration of every kind of router, for 6 experts. Experts per group differ from experts per token.
ROUTERS = {
    "softmax": {"router": "topk", "norm_topk_prob": False},
    "softmax, normalised": {"router": "topk", "norm_topk_prob": True},
    "softmax in groups": {"router": "topk", "n_group": 3, "topk_group": 2},
    "sigmoid and bias in groups": {
        "router": "topk",
        "score_func": "sigmoid",
        "e_score_correction_bias": True,
        "n_group": 3,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
    },
    "top-k then softmax": {"router": "topk_softmax"},
    "noisy": {"router": "noisy_topk"},
    "switch": {"router": "switch", "num_experts_per_tok": 1},
    "switch with capacity": {"router": "switch", "num_experts_per_tok": 1, "capacity_factor": 1.0},
    "expert choice": {"router": "expert_choice", "capacity_factor": 1.0},
    "grouped": {"router": "grouped", "n_group": 2, "router_scale": True, "shared_expert_intermediate_size": 6},
    "hash": {"router": "hash", "shared_expert_intermediate_size": 6, "shared_expert_gate": True},
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave tests marked `exact` out where MINIMOE_ROUNDING is set; refuse the mark without a reason."""
    exact = []
    for item in items:
        for mark in item.iter_markers("exact"):
            if len(mark.args) != 1:
                raise pytest.UsageError(f'{item.nodeid}: wanted a reason in @pytest.mark.exact("...")')
            exact.append(item)
    if ROUNDING is not None:
        config.hook.pytest_deselected(items=exact)
        items[:] = [item for item in items if item not in exact]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Run every test, with its fixtures, under the rounding that MINIMOE_ROUNDING asks for."""
    with perturbed(ROUNDING) if ROUNDING is not None else nullcontext():
        return (yield)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Start every test from the same state (a hook, since hypothesis objects to such a fixture)."""
    torch.set_num_threads(THREADS)  # the command line sets its own
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(params=ROUTERS, scope="session")
def router_settings(request: pytest.FixtureRequest) -> dict:
    """The settings of each kind of router in turn, to pass to `MoEConfig(**router_settings)`."""
    return {"num_experts": 6, "num_experts_per_tok": 2} | ROUTERS[request.param]


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """A headless Chromium; no longer than a file, since its event loop would be in the way of others."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE * 1000)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def page(browser) -> Iterator:
    """An empty page."""
    opened = browser.new_page(viewport={"width": 1200, "height": 900})
    opened.set_default_timeout(PATIENCE * 1000)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The folder of the built site."""
    from workshop.website import build_site

    folder = tmp_path_factory.mktemp("site")
    build_site(folder)
    return folder
