"""The scripts of examples/speed: that they run and count right. What they time is asserted nowhere."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from separable_hvae import MAPRefiner
from tests.helpers.scripts import call, script

depth, inference, quality = (script(name, "speed") for name in ("depth", "inference", "quality"))


@pytest.fixture(autouse=True)
def _settings_come_back() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_methods_take_turns_until_their_time_is_spent() -> None:
    log: list[str] = []

    def watch(name: str, cost: float) -> Any:
        def measure() -> None:
            log.append(name)
            one.times.append(cost)
            one.spent += cost

        one = SimpleNamespace(times=[], spent=0.0, measure=measure)
        return one

    # A slow one is measured once, one of 2 s until 5 s are passed, a fast one as often as wanted.
    depth.measure_in_turns([watch("slow", 20), watch("fast", 0.1), watch("fair", 2)], 5.0, 4)
    assert log == ["slow", "fast", "fair", "fast", "fair", "fast", "fair", "fast"]


def test_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depth, "SIDE", 4)
    monkeypatch.setattr(depth, "SCALES", [4, 2, 1])
    options = ["--by", "scales", "--depths", 1, 3, "--width", 2, "--threads", 1, "--budget", 0, "--out", tmp_path]
    options += ["--methods", *(methods := ["eq. 4, latent by latent (vanilla)", "scale", "joint"])]
    call(monkeypatch, depth, *options)
    found = json.loads((tmp_path / "depth.json").read_text())["results"]
    assert [(r["method"], r["depth"]) for r in found] == [(name, n) for n in (5, 15) for name in methods]
    kept = {(r["method"], r["depth"]): r["bytes"] for r in found}
    # The law of memory: one subset for "scale", the sum of all for "joint". A model of one scale has one subset.
    assert kept["scale", 5] == kept["joint", 5]
    assert kept["scale", 15] < kept["joint", 15]
    assert (tmp_path / "depth.png").stat().st_size > 0


def test_what_a_backward_pass_keeps() -> None:
    """A refinement of twice as many samples keeps twice as much, beside a few numbers for all of them."""
    model = depth.HVAE(depth.FFT2Real(4), layers=1, width=4, bottleneck=4, blocks=1)
    x = torch.randn(1, 3, 4, 4)
    options = {"schedule": "joint"}
    one, two = (depth.kept_bytes(model, options, x.repeat(n, 1, 1, 1)) for n in (1, 2))
    assert 2 * one - 100 <= two <= 2 * one


def test_inference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--size", 4, "--layers", 1, "--width", 4, "--steps", 2, "--executions", "eager", "--batches", 1, 2]
    call(monkeypatch, inference, *options, "--repetitions", 1, "--out", tmp_path)
    found = json.loads((tmp_path / "inference.json").read_text())["results"]
    assert [(r["batch"], r["schedule"]) for r in found] == [
        (n, s) for n in (1, 2) for s in ("scale", "parallel", "joint")
    ]
    assert (tmp_path / "inference.md").read_text().count("1.00×") == len(found)


def test_quality(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = ["joint", "joint, Gauss–Newton"]
    monkeypatch.setattr(quality, "METHODS", {name: quality.METHODS[name] for name in methods})
    monkeypatch.setattr(quality, "MODELS", {name: quality.MODELS[name] for name in ("Haar", "vanilla")})
    monkeypatch.setattr(quality, "VANILLA", methods[:1])
    monkeypatch.setattr(quality, "STEPS", [0, 25])
    monkeypatch.setattr(quality, "SIZES", [0.03])
    monkeypatch.setattr(quality, "GUIDANCE", [1.0])
    for name, kind in quality.MODELS.items():
        small = quality.HVAE(kind(8, channels=1), layers=1, width=4, bottleneck=4, blocks=0)
        small.save_pretrained(tmp_path / "models" / name.lower())
    call(monkeypatch, quality, "--held-out", 8, "--repetitions", 1, "--threads", 1, "--out", tmp_path)
    curves = json.loads((tmp_path / "quality.json").read_text())["curves"]
    assert {name: list(curve) for name, curve in curves.items()} == {
        "Haar": ["reference", *methods],
        "vanilla": ["reference", *methods[:1]],
    }
    # What is reported is what a refiner of one's own reaches on the reporting half.
    model = quality.HVAE.from_pretrained(tmp_path / "models" / "haar")
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    x = script("data").digits()[order][1404:1408]
    error = (127.5 * (MAPRefiner(25, 0.06, schedule="joint")(model, x).reconstruction - x)).square().mean()
    (goal,) = curves["Haar"]["reference"]["points"]
    assert goal["mse"] == pytest.approx(float(error), rel=1e-3)
    assert goal["mse_difference"] == 0
    assert [p["steps"] for p in curves["Haar"]["joint"]["points"]] == [0, 25]
    assert {p.name for p in tmp_path.iterdir()} >= {"quality.md", "quality.png", "guidance.png"}


def test_first_time_at_a_goal() -> None:
    points = [{"mse": 3.0, "seconds": 0.1}, {"mse": 1.0, "seconds": 0.2}, {"mse": 0.5, "seconds": 0.3}]
    assert [quality.time_to(points, "mse", goal) for goal in (4, 1, 0.7, 0.1)] == [0.1, 0.2, 0.3, None]
