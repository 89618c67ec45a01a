"""The tables behind notebook 08: made by one function, and still true of the models they tell of."""

import numpy as np
import pytest

from minimoe.course.runs import read_run, where
from minimoe.data_files import data_path
from minimoe.lineage.recipes import SHAPES
from minimoe.model import MoEForCausalLM
from workshop import profiles


def stds(model):
    """By torch and by name, [4, L]."""
    blocks = model.model.layers
    return np.array(
        [
            [block.self_attn.get_parameter(f"{role}_proj.weight").double().std(correction=0).item() for block in blocks]
            for role in "qkvo"
        ]
    )


def stacked(table, **values):
    rows = where(table, **values)
    return np.stack([rows[role] for role in "qkvo"])


@pytest.mark.exact("two trainings from one seed are compared to the bit")
def test_a_run_leaves_the_profiles_of_its_snapshots(tmp_path, monkeypatch):
    monkeypatch.setattr(profiles, "SEEDS", (5, 6))
    monkeypatch.setattr(profiles, "data_path", lambda name: tmp_path / name)
    fast = {"learning_rate": 0.1, "warmup_steps": 0, "batch_size": 1, "seq_len": 8}
    settings = {"corpus": "planted", "steps": 2, "snapshots": (0, 1), **fast}
    profiles.run("profiles/4-layers", runs=tmp_path, **settings)
    path = tmp_path / "runs" / "profiles" / "4-layers" / "std.csv"
    first = path.read_bytes()

    monkeypatch.setattr("minimoe.course.runs.data_path", lambda name: tmp_path / name)
    table = read_run("profiles/4-layers", "std")
    assert sorted(set(zip(table["seed"], table["step"], strict=True))) == [(s, t) for s in (5, 6) for t in (0, 1, 2)]
    for seed in (5, 6):
        fresh = MoEForCausalLM(SHAPES["dense"], seed=seed)
        trained = MoEForCausalLM.from_pretrained(tmp_path / f"profiles/4-layers-{seed}")
        np.testing.assert_allclose(stacked(table, seed=seed, step=0), stds(fresh), rtol=1e-5)
        np.testing.assert_allclose(stacked(table, seed=seed, step=2), stds(trained), rtol=1e-5)
        assert abs(stds(trained) / stds(fresh) - 1).min() > 0.01

    path.unlink()  # nothing is trained again
    profiles.run("profiles/4-layers", runs=tmp_path, **settings)
    assert path.read_bytes() == first


def test_an_unknown_name_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(ValueError, match="no profiles '5-layers'; choose one of profiles/4-layers, profiles/8-layers"):
        profiles.run("5-layers", runs=tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_shipped_belongs_to_a_recipe():
    shipped = {path.parent.name for path in data_path("runs/profiles").glob("*/*")}
    assert {f"profiles/{name}" for name in shipped} == set(profiles.PROFILES)


@pytest.mark.parametrize("name", profiles.PROFILES)
def test_shipped_profiles_begin_where_the_seeds_begin(name):
    """The first snapshot is the random model, made here once more; after all steps it is another."""
    table, recipe = read_run(name, "std"), profiles.PROFILES[name]
    config = SHAPES[recipe["shape"]]
    every = {(seed, step) for seed in profiles.SEEDS for step in (*profiles.SNAPSHOTS, profiles.STEPS)}
    assert set(zip(table["seed"].tolist(), table["step"].tolist(), strict=True)) == every
    assert len(table["q"]) == len(every) * config.num_hidden_layers
    for seed in profiles.SEEDS:
        wanted = stds(MoEForCausalLM(config, seed=seed))
        if "initialisation" in recipe:
            depth = np.sqrt(2 * config.hidden_size * np.arange(1, config.num_hidden_layers + 1))
            wanted /= config.initializer_range * depth
        np.testing.assert_allclose(stacked(table, seed=seed, step=0), wanted, rtol=2e-5)
        assert (stacked(table, seed=seed, step=profiles.STEPS).mean(1) > 1.1 * wanted.mean(1)).all()


def test_the_curves_of_a_model_are_in_the_order_of_its_layers():
    table = read_run("profiles/8-layers", "std")
    rows = where(table, seed=profiles.SEEDS[1], step=profiles.STEPS)
    assert rows["layer"].tolist() == list(range(8))
