"""The setups of the paper: configuration files, train.py and evaluate.py."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from separable_hvae import HVAE
from separable_hvae.training.loop import Augment
from tests.helpers.images import write_cifar
from tests.helpers.scripts import EXAMPLES, call, script
from tests.suites.kills import MICRO, differences, records

setups, train, evaluation = script("setups"), script("train"), script("evaluate")
NAMES = ["paper", "vanilla", "best"]
CONFIGURATIONS = [EXAMPLES / dataset / f"{name}.toml" for dataset in ("cifar10", "fastmri") for name in NAMES]


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def write(path: Path, text: str = MICRO) -> Path:
    path.write_text(text)
    return path


@cache
def read(path: Path, tiny: bool) -> Any:
    return setups.read(path, tiny=tiny)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Configuration files.


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_configurations(path: Path, tiny: bool) -> None:
    setup = read(path, tiny)
    size, model = setup.data["size"], setup.model
    assert setup.dataset == path.parent.name
    assert model["scales"] == [2**i for i in range(int(math.log2(size)) + 1)]
    if not tiny:
        assert size == {"cifar10": 32, "fastmri": 128}[setup.dataset]
        assert len(model["scales"]) * model["layers"] == {"cifar10": 30, "fastmri": 40}[setup.dataset]
        paper = {"width": 128, "bottleneck": 64, "blocks": 3, "latent_channels": 1}
        assert {k: model[k] for k in paper} == paper
    bands = {"paper": {"cifar10": "FFT2Real", "fastmri": "FFT2Complex"}[setup.dataset]}
    assert model["decomposition"] == {**bands, "vanilla": "Identity", "best": "Wavelet2"}[path.stem]
    assert model["band_input"] == (path.stem == "best")
    # The three setups of a set differ in the model's bands alone.
    paper_setup = read(path.with_name("paper.toml"), tiny)
    changed = {k for k in model if model[k] != paper_setup.model.get(k)}
    assert changed <= {"decomposition", "wavelet", "head", "band_input"}
    assert (setup.data, setup.training) == (paper_setup.data, paper_setup.training)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[data]", "[data", "Expected"),
        ("[training]", "[optimizer]", "a setup has ['dataset', 'data', 'model', 'training'] and perhaps"),
        ("[training]", "[tiny.sampling]\n[training]", "tiny has unknown sections ['sampling']"),
        ('"cifar10"', '"cifar100"', "dataset must be one of ['cifar10', 'fastmri'], got 'cifar100'"),
        ("\nsize = 8", "\nsize = 8\ncrop = 4", "data has unknown keys ['crop']"),
        ("\nsize = 8", "", "['data.size'] are missing"),
        ('"flip"', '"rotate"', "augment has ['rotate'], allowed are ['flip', 'phase']"),
        ('"Wavelet2"', '"Curvelet"', "decomposition must be one of"),
        ('decomposition = "Wavelet2"', "", "['model.decomposition'] are missing"),
        ("width = 4", "width = 0", "width must be at least 1, got 0"),
        ("width = 4", "breadth = 4", "breadth"),
        ("scales = [2, 8]", "scales = [2, 4]", "scales must end in the signal's largest size, 8"),
        ("every = 1", "speed = 1", "training has unknown keys ['speed']"),
    ],
)
def test_bad_configurations(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = write(tmp_path / "a.toml", MICRO.replace(old, new))
    with pytest.raises(ValueError, match=re.escape(f"{path}: ") + ".*" + re.escape(message)):
        setups.read(path)


def test_a_missing_configuration(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'a.toml'}: ") + ".*No such file"):
        setups.read(tmp_path / "a.toml")


def test_augmentations() -> None:
    x = torch.randn(200, 1, 4, 4, dtype=torch.complex64)
    flipped = setups.flip(x, torch.Generator().manual_seed(0))
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(flipped, x, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(flipped, x, strict=True)]
    assert all(m != k for m, k in zip(mirrored, kept, strict=True))
    assert 70 < sum(mirrored) < 130
    turned = setups.phase(x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(turned.abs(), x.abs())
    angles = (turned / x).angle().flatten(1)
    torch.testing.assert_close((turned / x).flatten(1), (turned / x).flatten(1)[:, :1].expand(-1, 16))
    assert angles.min() < -2.5
    assert angles.max() > 2.5


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("9m", 540), ("1h30m", 5400), ("0.5h", 1800)])
def test_durations(text: str, seconds: float) -> None:
    assert train.duration(text) == seconds


@pytest.mark.parametrize("text", ["", "9", "m", "9 m", "9d", "-9m"])
def test_bad_durations(text: str) -> None:
    with pytest.raises(train.argparse.ArgumentTypeError, match="a duration is like 90s, 9m or 1h30m"):
        train.duration(text)


# train.py.


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cifar(tmp_path_factory.mktemp("cifar"), n=20)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    """A run that nobody disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        out = tmp_path_factory.mktemp("run")
        path = write(out / "micro.toml")
        call(patch, train, path, "--data", source, "--out", out / "whole")
    return out / "whole"


def test_a_run_leaves_its_files(finished: Path) -> None:
    assert {"setup.json", "log.jsonl", "checkpoint.safetensors", "model/model.safetensors"} <= set(files(finished))
    assert len(list((finished / "samples").iterdir())) == 15
    assert json.loads((finished / "setup.json").read_text())["model"]["width"] == 4
    found = records(finished)
    assert [r["step"] for r in found if "loss" in r] == list(range(1, 31))
    assert [r["step"] for r in found if "heldout_loss" in r] == list(range(2, 31, 2))
    assert HVAE.from_pretrained(finished / "model").depth == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")
def test_killed_and_resumed_runs_end_alike() -> None:
    # A small share of what the module does by itself: one kill at any moment, one in the writing of a file.
    root = str(EXAMPLES.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    command = [sys.executable, "-m", "tests.suites.kills", "--moments", "2"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kills, 0 resumed runs that ended otherwise" in done.stdout


def test_stopped_and_resumed_runs_end_alike(
    tmp_path: Path, source: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, arguments = tmp_path / "run", [write(tmp_path / "micro.toml"), "--data", source, "--out", tmp_path / "run"]
    count, flip = 0, cast(Augment, setups.AUGMENTATIONS["flip"])

    def interrupt(x: Tensor, generator: torch.Generator) -> Tensor:
        nonlocal count
        count += 1
        if count == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return flip(x, generator)

    monkeypatch.setitem(setups.AUGMENTATIONS, "flip", interrupt)
    with pytest.raises(SystemExit, match="stopped at step 3; --resume goes on"):
        call(monkeypatch, train, *arguments)
    call(monkeypatch, train, *arguments, "--resume")
    assert count == 30
    assert differences(out, finished) == []


@pytest.mark.parametrize(
    ("text", "other", "more", "message"),
    [
        (MICRO, False, [], "{run} holds a run already: add --resume, or take another folder"),
        (MICRO.replace("width = 4", "width = 6"), False, ["--resume"], "{checkpoint} belongs to another model"),
        (MICRO.replace("5e-3", "6e-3"), False, ["--resume"], "{checkpoint} belongs to a run with other settings"),
        (MICRO, False, ["--resume", "--seed", "1"], "{checkpoint} belongs to a run with other settings"),
        (MICRO, True, ["--resume"], "{checkpoint} belongs to a run with other settings or data"),
    ],
    ids=["no resume", "model", "training", "seed", "data"],
)
def test_runs_are_not_mixed_up(
    tmp_path: Path,
    source: Path,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    other: bool,
    more: list[str],
    message: str,
) -> None:
    before = files(finished)
    data = write_cifar(tmp_path, n=21) if other else source
    expected = message.format(run=finished, checkpoint=finished / "checkpoint.safetensors")
    with pytest.raises(SystemExit, match=re.escape(expected)):
        call(monkeypatch, train, write(tmp_path / "a.toml", text), "--data", data, "--out", finished, *more)
    assert files(finished) == before


def test_bad_data_are_named(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=re.escape(f"{tmp_path / 'nowhere'} does not exist")):
        call(monkeypatch, train, write(tmp_path / "a.toml"), "--data", tmp_path / "nowhere", "--out", tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_epochs_give_steps(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.toml", MICRO.replace("steps = 30", "epochs = 0.5"))
    call(monkeypatch, train, path, "--data", source, "--out", tmp_path / "run", "--batch-size", 16)
    # 100 images make 6 batches of 16, half an epoch is 3.
    assert [r["step"] for r in records(tmp_path / "run") if "loss" in r] == [1, 2, 3]


def test_training_without_a_console(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.toml", MICRO.replace("steps = 30", "steps = 2"))
    with monkeypatch.context() as patch:
        for name in ("stdout", "stderr"):
            patch.setattr(sys, name, None)
        call(patch, train, path, "--data", source, "--out", tmp_path / "run")
    assert [r["step"] for r in records(tmp_path / "run") if "loss" in r] == [1, 2]


# evaluate.py.


def test_table_1(tmp_path: Path, source: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vanilla = write(tmp_path / "vanilla.toml", MICRO.replace("Wavelet2", "Identity").replace("steps = 30", "steps = 2"))
    call(monkeypatch, train, vanilla, "--data", source, "--out", tmp_path / "vanilla")
    out = tmp_path / "table"
    options: list[object] = ["--vanilla", tmp_path / "vanilla", "--images", 12, "--batch", 8, "--batches", 4]
    options += ["--steps", 2, 1, "--samples", 3, "--budget", 0, "--device", "cpu"]
    call(monkeypatch, evaluation, finished, "--data", source, "--out", out, *options)
    assert set(files(out)) == {"results.json", "results.md", "quality.png", "scales.png"}
    report = json.loads((out / "results.json").read_text())
    rows = [(r["method"], r["steps"]) for r in report["rows"]]
    kinds = ["hybrid", "hybrid, Gauss–Newton", "iterative", "hybrid, paper's refiner", "iterative, paper's refiner"]
    assert rows == [
        ("amortized, sample", 0),
        ("amortized, mean", 0),
        *((kind, n) for n in (1, 2) for kind in kinds),
        ("vanilla, sample", 0),
        ("vanilla, mean", 0),
        *((kind, n) for n in (1, 2) for kind in ("vanilla, joint", "vanilla, Gauss–Newton")),
    ]
    table = (out / "results.md").read_text()
    assert "FID (random conv, 64)" in table
    assert table.count("\n| ") == 1 + len(rows) + 1 + 2
    # The amortized mean, computed without the scripts.
    model, x = HVAE.from_pretrained(finished / "model"), script("data").cifar10(source, train=False, side=8)[:12]
    with torch.no_grad():
        result = model.encode(x)
    errors = (127.5 * (result.reconstruction - x)).square().flatten(1).mean(1)
    row = report["rows"][1]
    assert row["mse"] == pytest.approx(float(errors.mean()), rel=1e-4)
    assert row["mse_standard_error"] == pytest.approx(float(errors.std()) / math.sqrt(12), rel=1e-4)
    assert row["nll"] == pytest.approx(float(result.nll.mean()) / sum(z[0].numel() for z in result.latents), rel=1e-4)
    assert row["psnr"] == pytest.approx(float((10 * torch.log10(255**2 / errors)).mean()), rel=1e-4)
    assert report["bounds"]["separable"]["bound"] >= report["bounds"]["separable"]["elbo"]


def test_what_cannot_be_evaluated(
    tmp_path: Path, source: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rest = ["--data", source, "--out", tmp_path / "table", "--device", "cpu"]
    with pytest.raises(SystemExit, match=re.escape(f"{tmp_path / 'setup.json'} is not what train.py leaves")):
        call(monkeypatch, evaluation, tmp_path, *rest)
    with pytest.raises(SystemExit, match="nowhere:Net is neither a file nor 'module:name' of a feature extractor"):
        call(monkeypatch, evaluation, finished, *rest, "--features", "nowhere:Net")
    assert not (tmp_path / "table").exists()
