import contextlib
import gc
import json
import math
import os
import re
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from typing_extensions import override

from separable_hvae import (
    HVAE,
    FFT1Complex,
    FFT1Real,
    Identity,
    MAPRefiner,
    Result,
    Wavelet1,
    evaluate,
)
from separable_hvae._version import __version__
from separable_hvae.functional import pack
from separable_hvae.model import standardization
from separable_hvae.refine import history
from separable_hvae.training import evaluation
from separable_hvae.training.batches import IndexedBatches, checksum
from separable_hvae.training.metrics_log import JsonlLog
from tests.helpers import training as helpers
from tests.helpers import zoo
from tests.helpers.models import layer_passes, seeded, tiny
from tests.helpers.training import fresh, train, waves


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def weights(model: HVAE) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Interrupt:
    """An augmentation that asks the run to stop at some batch, which is trained on still."""

    def __init__(self, at: int, number: signal.Signals = signal.SIGINT) -> None:
        self.at, self.number, self.count = at, number, 0

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), self.number)
        return x


class Waves(Dataset[Tensor]):
    def __init__(self, signals: Tensor) -> None:
        self.signals = signals

    @override
    def __getitem__(self, index: int) -> Tensor:
        return self.signals[index]

    def __len__(self) -> int:
        return len(self.signals)


# Learning.


@pytest.mark.parametrize("as_dataset", [False, True])
def test_the_loss_falls(as_dataset: bool) -> None:
    model = fresh()
    before = evaluate(model, waves())["loss"]
    report = train(model, Waves(waves()) if as_dataset else waves(), steps=30, learning_rate=1e-2)
    losses = [r["loss"] for r in report.records]
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.2
    assert evaluate(model, waves())["loss"] < before - 0.2
    assert not model.training
    assert not report.interrupted
    assert report.steps == 30
    assert report.seconds > 0


def test_complex_data() -> None:
    model = tiny(FFT1Complex(4), perturbed=False, layers=1)
    data = torch.complex(waves(), 0.5 * waves())
    report = train(model, data, steps=30, learning_rate=1e-2)
    assert np.mean([r["loss"] for r in report.records[-10:]]) < np.mean([r["loss"] for r in report.records[:10]])
    assert model.encode(data).reconstruction.is_complex()


def test_a_dataset_gives_the_same_run_as_its_tensor() -> None:
    models = fresh(), fresh()
    train(models[0], waves())
    train(models[1], Waves(waves()))
    assert same(weights(models[0]), weights(models[1]))


def test_records() -> None:
    report = train(fresh(), steps=6, every=2, learning_rate=0.1, warmup=0.5)
    assert [r["step"] for r in report.records] == [2, 4, 6]
    for r in report.records:
        assert set(r) == {
            *("step", "loss", "data", "kl", "residual"),
            *("grad_norm", "learning_rate", "signals_per_second", "skipped"),
        }
        assert len(r["kl"]) == 2
        assert r["loss"] == pytest.approx(r["data"] + sum(r["kl"]) / 4, rel=1e-5)
        assert r["signals_per_second"] > 0
        assert r["skipped"] == 0
    # Step k is done at progress (k − 1) / 6: risen to the half, fallen along the cosine.
    expected = [0.1 * min(1, p / 0.5) * 0.5 * (1 + math.cos(math.pi * p)) for p in (1 / 6, 3 / 6, 5 / 6)]
    assert [r["learning_rate"] for r in report.records] == pytest.approx(expected)


def test_the_first_record_is_the_models_own_loss() -> None:
    model = fresh()
    model.calibrate(waves())
    expected = model.train()(waves(), seeded())
    seen: list[Tensor] = []

    def augment(x: Tensor, generator: torch.Generator) -> Tensor:
        seen.append(x)
        generator.manual_seed(0)
        return waves()

    report = train(model, steps=1, augment=augment)
    assert report.records[0]["loss"] == pytest.approx(float(-expected.elbo.detach().mean()) / 4, rel=1e-5)
    assert report.records[0]["kl"] == pytest.approx(expected.kl.detach().mean(0).tolist(), rel=1e-4)
    assert seen[0].shape == (8, 1, 4)
    assert all(any(torch.equal(row, signal) for signal in waves()) for row in seen[0])


def test_each_epoch_sees_each_signal_once() -> None:
    seen: list[Tensor] = []

    def augment(x: Tensor, generator: torch.Generator) -> Tensor:
        seen.append(x)
        return x

    train(fresh(), steps=10, augment=augment)
    epochs = torch.cat(seen[:5]), torch.cat(seen[5:])
    for epoch in epochs:
        assert sorted(epoch.flatten().tolist()) == sorted(waves().flatten().tolist())
    assert not torch.equal(*epochs)


def test_bands_are_calibrated_on_the_data() -> None:
    model, reference = fresh(), fresh()
    reference.calibrate(waves())
    train(model, steps=1)
    assert [float(s.unit) for s in model.subsets] == pytest.approx([float(s.unit) for s in reference.subsets])
    assert float(model.subsets[0].unit) != 1.0


@pytest.mark.parametrize("factor", [0.05, 0.2, 5.0, 20.0])
def test_data_in_other_units_than_those_calibrated_with_are_named(factor: float) -> None:
    model = fresh()
    model.calibrate(waves())
    if 0.1 < factor < 10:
        train(model, factor * waves(), steps=1)
        return
    size = float(waves().square().mean().sqrt())
    with pytest.warns(UserWarning, match=f"is {factor * size:.2g}, that .* calibrated with {size:.2g}: ") as caught:
        train(model, factor * waves(), steps=1)
    assert caught[0].filename == helpers.__file__


def test_warm_up_of_the_kl() -> None:
    full, none = fresh(), fresh()
    # At the very first step the weight is zero, so the priors get no gradient.
    reports = train(full, steps=1), train(none, steps=1, kl_warmup=0.5)
    assert reports[0].records[0]["loss"] == reports[1].records[0]["loss"]
    assert reports[0].records[0]["grad_norm"] != reports[1].records[0]["grad_norm"]
    for k in [k for k in weights(none) if k.endswith("prior.leave.bias")]:
        # The last convolution feeds the context too: only its first two rows are the prior's.
        assert not weights(none)[k][:2].any()
        assert weights(full)[k][:2].any()
        assert weights(none)[k][2:].any()


# Averaged weights, determinism, resuming.


def test_the_averaged_weights_end_up_in_the_model(tmp_path: Path) -> None:
    model, plain = fresh(), fresh()
    train(model, checkpoint=tmp_path, learning_rate=0.05)
    train(plain, ema=0, learning_rate=0.05)
    stored = load_file(tmp_path / "checkpoint.safetensors")
    parts = {
        name: {k.removeprefix(name): v for k, v in stored.items() if k.startswith(name)}
        for name in ("model.", "average.module.")
    }
    assert same(parts["average.module."], weights(model))
    assert same(parts["model."], weights(plain))
    assert not same(weights(model), weights(plain))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_runs_repeat_by_their_seed() -> None:
    state = torch.get_rng_state()
    runs = []
    for seed, data in ((0, waves()), (0, Waves(waves())), (1, waves())):
        runs.append(model := fresh())
        torch.manual_seed(len(runs))
        before = torch.get_rng_state()
        train(model, data, seed=seed)
        assert torch.equal(before, torch.get_rng_state())
    torch.set_rng_state(state)
    assert same(weights(runs[0]), weights(runs[1]))
    assert not same(weights(runs[0]), weights(runs[2]))


@pytest.mark.parametrize("stops", [[1], [4], [3, 3]])
@pytest.mark.parametrize("as_dataset", [False, True])
def test_resuming_is_bit_identical(tmp_path: Path, as_dataset: bool, stops: list[int]) -> None:
    data = Waves(waves()) if as_dataset else waves()
    whole, parts = fresh(), fresh()
    straight = train(whole, data, steps=9, log=tmp_path / "whole.jsonl")
    records = []
    for stop in stops:
        report = train(parts, data, steps=9, checkpoint=tmp_path / "run", augment=Interrupt(stop))
        assert report.interrupted
        records += report.records
        # What lies around in the model or its gradients must not matter.
        parts = fresh(seed=7)
        parts.loss(waves()).backward()
    report = train(parts, data, steps=9, checkpoint=tmp_path / "run")
    records += report.records
    assert same(weights(whole), weights(parts))
    assert report.steps == 9
    assert [r["loss"] for r in records] == [r["loss"] for r in straight.records]
    again = train(parts, data, steps=9, checkpoint=tmp_path / "run")
    assert again.records == []
    assert same(weights(whole), weights(parts))


class Flipping(Waves):
    """A data set that flips signals at random, and notes which ones are asked for."""

    def __init__(self, signals: Tensor) -> None:
        super().__init__(signals)
        self.asked: list[int] = []

    @override
    def __getitem__(self, index: int) -> Tensor:
        self.asked.append(index)
        return self.signals[index].flip(-1) if torch.rand(()) < 0.5 else self.signals[index]


def test_resuming_with_random_transforms(tmp_path: Path) -> None:
    whole, parts = Flipping(waves()), Flipping(waves())
    train(fresh(), whole, steps=9)
    train(fresh(), parts, steps=9, checkpoint=tmp_path, augment=Interrupt(4))
    stopped, resumed = len(parts.asked), fresh()
    assert train(resumed, parts, steps=9, checkpoint=tmp_path).steps == 9
    # After two looks, and in a new run the calibration, the order of signals is that of one run.
    looks, new = 2 * 40, 3 * 40
    trained = parts.asked[new : new + 4 * 8] + parts.asked[stopped + looks :][: 5 * 8]
    assert trained == whole.asked[new : new + 9 * 8]
    with pytest.raises(ValueError, match=r"settings or data .*: {'count': \(40, 39\)}"):
        train(fresh(), Flipping(waves(39)), steps=9, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"settings or data .*: {'checksum': \(None, \d+\)}"):
        train(fresh(), Waves(waves()), steps=9, checkpoint=tmp_path)


@pytest.mark.parametrize("as_dataset", [False, True])
@pytest.mark.parametrize("size", [8, 64])
def test_the_first_signals_come_in_batches(as_dataset: bool, size: int) -> None:
    data = waves(40)
    batches = IndexedBatches(fresh(), Waves(data) if as_dataset else data, size, 0, 0, 0, 1)
    for n in (1, 20, 40, 4096):
        first = cast(list[Tensor], list(batches.first(n)))
        assert torch.equal(torch.cat(first), data[:n])
        assert max(map(len, first)) <= size
    assert batches.fingerprint == {"batch_size": size, "count": 40, "checksum": checksum(data)}


@pytest.mark.parametrize("as_dataset", [False, True])
def test_calibration_holds_one_batch_at_a_time(monkeypatch: pytest.MonkeyPatch, as_dataset: bool) -> None:
    model, sizes = fresh(), list[int]()
    analysis = model.decomp.analysis

    def spy(x: Tensor) -> list[Tensor]:
        sizes.append(len(x))
        return analysis(x)

    monkeypatch.setattr(model.decomp, "analysis", spy)
    train(model, Waves(waves()) if as_dataset else waves(), steps=1, batch_size=8)
    assert sizes[:5] == [8] * 5
    assert max(sizes) == 8


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_leaves_a_usable_model_and_checkpoint(tmp_path: Path, number: signal.Signals) -> None:
    model, handlers = fresh(), (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    report = train(model, checkpoint=tmp_path, augment=Interrupt(4, number))
    assert report.interrupted
    assert report.steps == 4
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert not model.training
    assert math.isfinite(evaluate(model, waves())["loss"])
    four = fresh()
    # The learning rate follows progress, so the same four steps belong to a run of eight.
    train(four, augment=Interrupt(4))
    assert same(weights(model), weights(four))
    assert (tmp_path / "checkpoint.safetensors").exists()


def test_an_interruption_at_the_last_step_changes_nothing() -> None:
    assert not train(fresh(), steps=3, augment=Interrupt(3)).interrupted


def test_a_second_ctrl_c_ends_the_run_at_once() -> None:
    def augment(x: Tensor, generator: torch.Generator) -> Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return x

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(fresh(), augment=augment)
    assert signal.getsignal(signal.SIGINT) is before


class Fail:
    """An augmentation that raises at some batch."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.at, self.error, self.count = at, error, 0

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        self.count += 1
        if self.count == self.at:
            raise self.error
        return x


@pytest.mark.parametrize(
    ("error", "ema"),
    [(RuntimeError("no such file"), 0.999), (RuntimeError("no such file"), 0.0), (KeyboardInterrupt(), 0.999)],
    ids=["error", "no average", "ctrl-c"],
)
def test_a_run_that_fails_leaves_what_was_learnt(tmp_path: Path, error: BaseException, ema: float) -> None:
    failed, stopped, whole = fresh(), fresh(), fresh()
    with pytest.raises(type(error)) as caught:
        train(failed, augment=Fail(4, error), ema=ema, checkpoint=tmp_path, checkpoint_every=1e-9)
    assert caught.value is error
    train(stopped, augment=Interrupt(3), ema=ema)
    assert same(weights(failed), weights(stopped))
    assert not failed.training
    assert all(p.grad is None and p.requires_grad for p in failed.parameters())
    # From its last checkpoint the run goes on as if nothing had happened.
    train(failed, ema=ema, checkpoint=tmp_path)
    train(whole, ema=ema)
    assert same(weights(failed), weights(whole))


def test_a_run_that_fails_before_its_first_step_leaves_the_weights() -> None:
    model = fresh()
    before = {k: v.clone() for k, v in model.named_parameters()}
    with pytest.raises(RuntimeError):
        train(model, augment=Fail(1, RuntimeError()))
    assert same(before, dict(model.named_parameters()))
    assert not model.training


@pytest.mark.parametrize("training", [False, True])
def test_a_refused_run_leaves_the_mode(tmp_path: Path, training: bool) -> None:
    train(fresh(), checkpoint=tmp_path, steps=2)
    model = fresh(width=8).train(training)
    before = weights(model)
    with pytest.raises(ValueError, match="belongs to another model"):
        train(model, checkpoint=tmp_path, steps=2)
    assert model.training == training
    assert same(weights(model), before)


def test_training_in_a_thread() -> None:
    with ThreadPoolExecutor() as pool:
        assert pool.submit(train, fresh(), steps=2).result().steps == 2


def test_checkpoints_are_written_along_the_way(tmp_path: Path) -> None:
    path, seen = tmp_path / "deep" / "run", []

    def augment(x: Tensor, generator: torch.Generator) -> Tensor:
        seen.append((path / "checkpoint.safetensors").exists())
        return x

    train(fresh(), checkpoint=path, checkpoint_every=1e-9, augment=augment, steps=3)
    # The first one, before any step, says early that it cannot be written, and what a log had been before.
    assert seen == [True, True, True]


def edited() -> HVAE:
    """A model whose code has changed since, but not what it was built with."""
    model = fresh()
    model.decoder.start = torch.nn.Parameter(torch.zeros(2))
    return model


def wavelet_model(wavelet: str) -> HVAE:
    return tiny(Wavelet1(4, wavelet, channels=1, scales=[2, 4]), layers=1)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"model": lambda: fresh(width=8)}, r"another model .*: {'options': {'width': \(6, 8\)}}"),
        ({"model": lambda: tiny(FFT1Real(4, scales=[1, 2, 4]), layers=1)}, r"another model .*'scales': \(\[1, 4\], \["),
        ({"model": lambda: fresh(sigma=0.2)}, r"another model .*: {'options': {'sigma': \(0\.1, 0\.2\)}}"),
        ({"model": lambda: wavelet_model("db2")}, r"another model .*'class': \('FFT1Real', 'Wavelet1'\)"),
        ({"model": edited}, r"another model: .* decoder.start with shape \(1, 6, 1\) there and \(2,\) here"),
        ({"data": lambda: waves(seed=5)}, "belongs to a run with other settings or data .*checksum"),
        ({"data": lambda: waves().index_fill(0, torch.tensor([39]), 0.0)}, r"settings or data .*checksum"),
        ({"data": lambda: waves(39)}, r"settings or data .*'count': \(40, 39\)"),
        ({"batch_size": 4}, r"settings or data .*'batch_size': \(8, 4\)"),
        ({"seed": 3}, r"settings or data .*'seed': \(0, 3\)"),
        (
            {"settings": {"flip": True, "model": {"a": 1, "b": 3}}},
            r"settings or data .*: {'model': {'b': \(2, 3\)}, 'flip': \(None, True\)}",
        ),
    ],
    ids=[
        "width",
        "scales",
        "sigma",
        "decomposition",
        "shape",
        "data",
        "one signal",
        "count",
        "batch size",
        "seed",
        "settings",
    ],
)
def test_a_foreign_checkpoint_is_refused(tmp_path: Path, other: dict[str, Any], message: str) -> None:
    train(fresh(), checkpoint=tmp_path, steps=2, settings={"model": {"a": 1, "b": 2}} if "settings" in other else None)
    made = {k: v() if callable(v) else v for k, v in other.items()}
    model = made.pop("model", None) or fresh(seed=3)
    model.calibrate(waves())
    before = weights(model)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "checkpoint.safetensors")) + ".*" + message):
        train(model, made.pop("data", None), checkpoint=tmp_path, steps=2, **made)
    assert same(weights(model), before)


def test_a_checkpoint_of_another_wavelet_is_refused(tmp_path: Path) -> None:
    train(wavelet_model("haar"), checkpoint=tmp_path, steps=2)
    with pytest.raises(
        ValueError, match=r"another model .*: {'decomposition': {'arguments': {'wavelet': \('haar', 'db2"
    ):
        train(wavelet_model("db2"), checkpoint=tmp_path, steps=4)


def test_a_run_may_go_on_with_other_options(tmp_path: Path) -> None:
    train(fresh(), checkpoint=tmp_path, steps=4, clip=math.inf)
    changed = r"{'learning_rate': \(0\.002, 0\.01\), 'clip': \(inf, 3\.0\)}"
    with pytest.warns(UserWarning, match=f"other options .*, and goes on with the new ones: {changed}") as caught:
        longer = train(fresh(), checkpoint=tmp_path, steps=8, learning_rate=0.01)
    assert caught[0].filename == helpers.__file__
    # From the middle of the cosine.
    rates = [0.01 * 0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(4, 8)]
    assert [record["learning_rate"] for record in longer.records] == pytest.approx(rates)
    train(fresh(), checkpoint=tmp_path, steps=9, learning_rate=0.01)


class Taciturn(FFT1Real):
    """A decomposition that cannot tell what it was built with, so that no model of it can be saved."""

    @override
    def config(self) -> dict[str, Any]:
        raise TypeError("override config()")


def test_a_model_that_cannot_be_saved_resumes(tmp_path: Path) -> None:
    def made(**options: Any) -> HVAE:
        return tiny(Taciturn(4, scales=[1, 4]), layers=1, **options)

    train(made(), checkpoint=tmp_path, steps=2)
    assert train(made(), checkpoint=tmp_path, steps=4).steps == 4
    with pytest.raises(ValueError, match=r"another model .*: {'options': {'sigma': \(0\.1, 0\.2\)}}"):
        train(made(sigma=0.2), checkpoint=tmp_path, steps=6)
    with pytest.raises(
        ValueError, match=r"another model .*'class': \('tests\.training\.test_training:Taciturn', 'FFT1Real'\)"
    ):
        train(fresh(), checkpoint=tmp_path, steps=6)


def frozen(*names: str) -> HVAE:
    """A model of which what begins with these names is not trained."""
    model = fresh()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(names))
    return model


@pytest.mark.parametrize("done", [0, 2])
@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (("encoder.", "decoder.start"), r"True for decoder.start"),
        (("encoder.scales.",), r"False for encoder\.stem\.weight, encoder\.stem\.bias"),
        (
            ("encoder.stem.", "decoder.start"),
            r"True for decoder.start and False for (encoder\.scales\.\S+, ){2}encoder\.scales\.\S+ and \d+ more",
        ),
    ],
    ids=["frozen", "thawed", "both"],
)
def test_a_checkpoint_of_other_trained_parameters_is_refused(
    tmp_path: Path, names: tuple[str, ...], wanted: str, done: int
) -> None:
    with pytest.raises(InterruptedError):
        train(frozen("encoder."), checkpoint=tmp_path, checkpoint_every=0, augment=Fail(done + 1, InterruptedError()))
    model = frozen(*names)
    model.calibrate(waves())
    before = weights(model)
    path = re.escape(str(tmp_path / "checkpoint.safetensors"))
    with pytest.raises(ValueError, match=f"{path} belongs to .* other parameters: requires_grad must be {wanted}$"):
        train(model, checkpoint=tmp_path)
    assert same(weights(model), before)


def test_a_run_with_frozen_parameters_resumes(tmp_path: Path) -> None:
    model, whole = frozen("encoder.", "decoder.start"), frozen("encoder.", "decoder.start")
    train(model, checkpoint=tmp_path, augment=Interrupt(3))
    model = frozen("encoder.", "decoder.start")
    train(model, checkpoint=tmp_path)
    train(whole)
    assert same(weights(model), weights(whole))
    assert all(
        torch.equal(model.get_parameter(k), v) for k, v in fresh().named_parameters() if k.startswith("encoder.")
    )


@pytest.mark.parametrize("kept", [0, 4, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "checkpoint.safetensors"
    train(fresh(), checkpoint=tmp_path, steps=2)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept < 1 else int(kept)])
    with pytest.raises(ValueError, match=re.escape(str(path)) + " is no checkpoint of a training run"):
        train(fresh(), checkpoint=tmp_path, steps=2)


def test_other_safetensors_files_are_refused(tmp_path: Path) -> None:
    save_file(fresh().state_dict(), tmp_path / "checkpoint.safetensors")
    with pytest.raises(ValueError, match="is no checkpoint of a training run"):
        train(fresh(), checkpoint=tmp_path, steps=2)


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    path, log = tmp_path / "checkpoint.safetensors", tmp_path / "log.jsonl"
    train(fresh(), steps=8, checkpoint=tmp_path, log=log, augment=Interrupt(3))
    before, lines = path.read_bytes(), log.read_text()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(x: Tensor, generator: torch.Generator) -> Tensor:
        # No file may grow beyond what the log has by now.
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(lines) + 100, limits[1]))
        return x

    try:
        with pytest.raises(OSError, match="File too large"):
            train(fresh(), checkpoint=tmp_path, log=log, augment=fill)
        with pytest.raises(
            OSError, match=re.escape(f"{path} was not written, an earlier checkpoint is kept: [Errno 27]")
        ):
            train(fresh(), checkpoint=tmp_path, augment=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert log.read_text().startswith(lines)
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, log.name]
    # With room again the run goes on, and what the log lost is written anew.
    model, whole = fresh(), fresh()
    train(model, checkpoint=tmp_path, log=log)
    train(whole)
    assert same(weights(model), weights(whole))
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, 9))


def test_the_log_of_a_resumed_run(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "log.jsonl"
    for step in (1, 2, 3, 4):
        JsonlLog(path, None).write({"step": step})
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    records = JsonlLog(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    records.write({"step": 3})
    assert path.read_text().endswith('{"step": 2}\n{"step": 3}\n')
    assert [p.name for p in path.parent.iterdir()] == ["log.jsonl"]
    JsonlLog(path, 0)
    assert path.read_text() == ""
    path.write_text("notes\n")
    with pytest.raises(ValueError, match=re.escape(f"{path} is no log of a training run")):
        JsonlLog(path, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_the_checksum_sees_every_bit(dtype: torch.dtype) -> None:
    x = torch.randn(5, 7, generator=seeded()).to(dtype)
    bits = np.ascontiguousarray(x.numpy()).view({2: np.int16, 4: np.int32, 8: np.int64}[x.real.itemsize]).ravel()
    places = [2 * (i * 0x1E3779B97F4A7C15) + 1 for i in range(len(bits))]
    assert checksum(x) == sum(p * int(b) for p, b in zip(places, bits, strict=True)) % 2**64
    assert checksum(x.flip(0)) != checksum(x)
    for i in range(5):
        changed = x.clone()
        changed[i, 2] = torch.nextafter(x.real[i, 2].float(), torch.tensor(9.0)) if dtype == torch.float32 else 0
        assert checksum(changed) != checksum(x)


class Clock:
    """A clock that each batch moves by one second."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now

    def augment(self, x: Tensor, generator: torch.Generator) -> Tensor:
        self.now += 1.0
        return x


def test_time_budget(tmp_path: Path) -> None:
    clock = Clock()
    report = train(fresh(), steps=None, time_budget=4.5, augment=clock.augment, clock=clock, warmup=0.5)
    assert report.steps == 5
    assert report.seconds == pytest.approx(5.0, abs=0.01)
    rates = [r["learning_rate"] / 2e-3 for r in report.records]
    done = [i / 4.5 for i in range(5)]
    assert rates == pytest.approx([min(1, d / 0.5) * 0.5 * (1 + math.cos(math.pi * d)) for d in done], abs=1e-3)
    assert train(fresh(), steps=3, time_budget=4.5, augment=clock.augment, clock=clock).steps == 3

    # Time before an interruption counts, time between runs does not.
    model, clock, interrupt = fresh(), Clock(), Interrupt(3)

    def both(x: Tensor, generator: torch.Generator) -> Tensor:
        return interrupt(clock.augment(x, generator), generator)

    options: dict[str, Any] = {"steps": None, "time_budget": 4.5, "clock": clock, "checkpoint": tmp_path}
    assert train(model, augment=both, **options).steps == 3
    clock.now += 1e6
    report = train(model, augment=clock.augment, **options)
    assert report.steps == 5
    assert report.seconds == pytest.approx(5.0, abs=0.01)


# Wild gradients.


def test_spikes_are_skipped_but_never_for_long() -> None:
    model, states, count = fresh(), list[dict[str, Tensor]](), 0

    def augment(x: Tensor, generator: torch.Generator) -> Tensor:
        nonlocal count
        count += 1
        if count in (105, 106):
            states.append(weights(model))
        return x * (1e3 if count == 105 or count >= 110 else 1.0)

    report = train(model, steps=122, augment=augment)
    total = [0, *(r["skipped"] for r in report.records)]
    skipped = [b - a for a, b in pairwise(total)]
    assert not any(skipped[:104])
    assert skipped[104:109] == [1, 0, 0, 0, 0]
    assert same(*states)
    assert skipped[109:113] == [1, 1, 1, 0]
    assert "1111" not in "".join(map(str, skipped))
    assert report.steps == 122


def test_a_gradient_that_stays_infinite_ends_the_run() -> None:
    model = fresh()
    with pytest.raises(FloatingPointError, match="not finite 4 times in a row, at step 5"):
        train(model, augment=Blow(after=2))
    assert not model.training
    assert math.isfinite(evaluate(model, waves())["loss"])
    # A few of them pass.
    report = train(fresh(), augment=Blow(after=2, until=5))
    assert report.records[-1]["skipped"] == 3
    assert math.isfinite(report.records[-1]["loss"])


class Blow:
    """Make signals whose loss overflows."""

    def __init__(self, after: int, until: float = math.inf) -> None:
        self.after, self.until, self.count = after, until, 0

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        self.count += 1
        return x * 1e30 if self.after < self.count <= self.until else x


# Measuring and logging.


def test_heldout_evaluation_and_log(tmp_path: Path) -> None:
    log, heldout = tmp_path / "log.jsonl", waves(6, seed=9)
    model = fresh()
    report = train(model, steps=20, heldout=heldout, heldout_every=7, every=2, log=log, seed=2)
    assert [json.loads(line) for line in log.read_text().splitlines()] == report.records
    # One record has all there is at its step.
    assert [r["step"] for r in report.records] == [2, 4, 6, 7, 8, 10, 12, 14, 16, 18, 20]
    assert all("loss" in r for r in report.records)
    held = [r for r in report.records if "heldout_loss" in r]
    assert [r["step"] for r in held] == [7, 14, 20]
    measured = evaluate(model, heldout, seed=2)
    assert {k.removeprefix("heldout_"): v for k, v in held[-1].items() if k.startswith("heldout_")} == measured
    train(model, steps=2, log=log)
    assert len(log.read_text().splitlines()) == len(report.records) + 2


def test_heldout_batches_of_a_loader() -> None:
    heldout = waves(6, seed=9)
    expected = train(fresh(), steps=10, heldout=heldout, batch_size=4)
    loader = DataLoader(cast(Any, Waves(heldout)), batch_size=4)
    report = train(fresh(), steps=10, heldout=loader, batch_size=4)
    losses = [[r["heldout_loss"] for r in found.records] for found in (report, expected)]
    assert losses[0] == losses[1]


def test_the_callback_sees_the_records_and_the_average(tmp_path: Path) -> None:
    seen: list[tuple[dict[str, Any], bool, dict[str, Tensor]]] = []

    def callback(record: dict[str, Any], average: HVAE) -> None:
        seen.append((record, average.training, weights(average)))
        average.sample(2)

    model, alone = fresh(), fresh()
    report = train(model, steps=10, heldout=waves(6), callback=callback)
    train(alone, steps=10)
    assert [record for record, _, _ in seen] == report.records
    assert not any(training for _, training, _ in seen)
    assert same(seen[-1][2], weights(model))
    assert same(weights(alone), weights(model))


def test_a_callback_ends_the_run(tmp_path: Path) -> None:
    model, whole = fresh(), fresh()
    report = train(model, callback=lambda record, average: record["step"] >= 3, checkpoint=tmp_path)
    assert (report.steps, report.interrupted) == (3, False)
    assert [record["step"] for record in report.records] == [1, 2, 3]
    # What it leaves is a run cut after three of eight steps, which may still go on.
    train(model, checkpoint=tmp_path)
    train(whole)
    assert same(weights(model), weights(whole))


def test_residuals_of_the_bands() -> None:
    model, seen = fresh(), list[Tensor]()

    def augment(x: Tensor, generator: torch.Generator) -> Tensor:
        seen.append(x)
        generator.manual_seed(0)
        return x

    model.calibrate(waves())
    before = fresh()
    before.calibrate(waves())
    report = train(model, steps=1, augment=augment)
    bands = before.decomp.analysis(before(seen[0], seeded()).reconstruction.detach() - seen[0])
    assert report.records[0]["residual"] == pytest.approx([float(b.square().mean().sqrt()) for b in bands], rel=1e-5)


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    train(fresh(), steps=3, progress=True)
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert "loss=" in shown
    train(fresh(), steps=3)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("is_complex", [False, True])
def test_evaluate_against_direct_computation(is_complex: bool) -> None:
    make = FFT1Complex if is_complex else FFT1Real
    model = tiny(make(4, scales=[1, 4]), sigma=0.3).double().train()
    data, sigma, numel = zoo.signal(model.decomp, 7), 0.3, model.decomp.numel
    found = evaluate(model, data, batch_size=3, seed=4)
    assert model.training
    generator, kls, errors, losses = seeded(4), list[list[Tensor]](), list[Tensor](), list[Tensor]()
    reconstructions: list[Tensor] = []
    model.eval()
    with torch.no_grad():
        for x in data.split(3):
            results: list[Result] = []
            steps = layer_passes(model, partial(lambda x, found: found.append(model(x, generator)), x, results))
            pairs = [(s.posterior, s.prior) for s in steps]
            kls.append([kl_divergence(Normal(q.mean, q.sigma), Normal(p.mean, p.sigma)) for q, p in pairs if q])
            reconstructions.append(results[0].reconstruction)
            decoded = pack(results[0].reconstruction)
            errors.append((decoded - pack(x)).square().flatten(1).sum(1))
            likelihood = Normal(decoded, sigma).log_prob(pack(x)).flatten(1).sum(1)
            losses.append(torch.stack([k.flatten(1).sum(1) for k in kls[-1]]).sum(0) - likelihood)
        mean_error = pack(model.encode(data).reconstruction) - pack(data)
    error, units = torch.cat(errors), [torch.cat(parts) for parts in zip(*kls, strict=True)]
    per_layer = [u.flatten(1).sum(1).mean() for u in units]
    objective = (0.5 * error.mean() / sigma**2 + sum(per_layer)) / numel
    active = sum(int((u.mean(0) > 0.01).sum()) for u in units)
    assert found.pop("kl") == pytest.approx([float(k) for k in per_layer])
    bands = model.decomp.analysis(torch.cat(reconstructions) - data)
    assert found.pop("residual") == pytest.approx([float(b.square().mean().sqrt()) for b in bands])
    assert found == pytest.approx(
        {
            "objective": float(objective),
            "loss": float(torch.cat(losses).mean()) / numel,
            "mse": float(error.mean()) / numel,
            "mse_mean": float(mean_error.square().mean()),
            "active_units": active,
            "units": sum(u[0].numel() for u in units),
        },
        rel=1e-6,
    )


def test_evaluate_leaves_each_module_its_mode() -> None:
    model = fresh().train()
    model.encoder.eval()
    modes = [module.training for module in model.modules()]
    evaluate(model, waves())
    assert [module.training for module in model.modules()] == modes


def test_a_look_before_training_does_not_stand_for_the_calibration() -> None:
    looked, calm = fresh().train(), fresh()
    for _ in range(3):
        looked.encode(30 + 10 * waves())
    for model in (looked, calm):
        train(model, steps=3)
    assert same(weights(looked), weights(calm))


def test_nothing_needs_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple's GPUs have none."""

    class Coarse(TorchDispatchMode):
        @override
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            dtypes = [{t.dtype for t in pytree.tree_leaves(x) if isinstance(t, Tensor)} for x in (args, result)]
            # Sums that are kept on the CPU begin as zeros there.
            assert dtypes[0] >= dtypes[1] & {torch.float64} or func is torch.ops.aten.zeros.default, func
            return result

    for module in (standardization, evaluation, history):
        monkeypatch.setattr(module, "finest", lambda x: x.float())
    model = fresh()
    with Coarse():  # type: ignore[no-untyped-call]
        train(model, steps=3, heldout=waves(6), every=1)
        MAPRefiner(2)(model, waves(3))
        evaluate(model, waves(3))


def test_evaluate_takes_batches() -> None:
    model = tiny(FFT1Real(4, scales=[1, 4]))
    expected = evaluate(model, waves(), batch_size=16)
    assert evaluate(model, iter(waves().split(16))) == expected
    assert evaluate(model, DataLoader(cast(Any, Waves(waves())), batch_size=16)) == expected


def test_bits_per_dimension_are_those_of_the_bins() -> None:
    model, width = fresh(sigma=0.8).double().requires_grad_(False), 0.01
    for parameter in model.parameters():
        parameter.zero_()
    # What is left is N(0, σ²), of which each bin has its mass.
    data = (torch.randn(20, 1, 4, dtype=torch.float64, generator=seeded()) / width).round() * width
    density = Normal(torch.zeros((), dtype=torch.float64), 0.8)
    mass = density.cdf(data + width / 2) - density.cdf(data - width / 2)
    found = evaluate(model, data, bin_width=width)
    assert found["bits"] == pytest.approx(float(-mass.log2().mean()), rel=1e-5)
    assert "bits" not in evaluate(model, data)


# Mixed precision and several processes.


@contextmanager
def bfloat16() -> Iterator[Any]:
    """An accelerator for bf16, whose setting is forgotten afterwards."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield Accelerator(cpu=True, mixed_precision="bf16")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_bfloat16() -> None:
    model, plain = fresh(), fresh()
    with bfloat16() as accelerator:
        half = train(model, steps=15, accelerator=accelerator)
    full = train(plain, steps=15)
    losses, expected = ([r["loss"] for r in report.records] for report in (half, full))
    assert losses[0] != expected[0]
    assert losses == pytest.approx(expected, rel=0.2, abs=0.5)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_full_precision(model)


def assert_full_precision(model: HVAE) -> None:
    """The model's own forward is back: no cast of accelerate's is left around it."""
    before = model.encode(waves()).reconstruction
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(model.encode(waves()).reconstruction, before)
    assert torch.equal(
        model(waves(), seeded()).reconstruction,
        model.encode(waves(), temperature=1.0, generator=seeded()).reconstruction,
    )


@pytest.mark.parametrize("at", [1, 4])
def test_a_run_that_fails_in_bfloat16_gives_full_precision_back(at: int) -> None:
    model = fresh()
    with bfloat16() as accelerator, pytest.raises(RuntimeError, match="no such file"):
        train(model, accelerator=accelerator, augment=Fail(at, RuntimeError("no such file")))
    assert_full_precision(model)


TWO_PROCESSES = """
import os, signal, sys
from pathlib import Path
import torch
from accelerate import Accelerator, debug_launcher
from tests.helpers.training import fresh, train

out = Path(sys.argv[1])

def work():
    accelerator, count = Accelerator(cpu=True), 0

    def augment(x, generator):
        nonlocal count
        count += 1
        if count == 3 and accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return x

    for part in ("first", "second"):
        model = fresh()
        report = train(model, steps=6, batch_size=4, accelerator=accelerator, augment=augment, checkpoint=out)
        result = {"steps": report.steps, "interrupted": report.interrupted, "weights": model.state_dict()}
        torch.save(result, out / f"{part}-{accelerator.process_index}.pt")
        accelerator.wait_for_everyone()

torch.set_num_threads(1)
debug_launcher(work, num_processes=2)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks processes")
def test_two_processes_stay_together(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", TWO_PROCESSES, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = {p.stem: torch.load(p, weights_only=True) for p in tmp_path.glob("*.pt")}
    # A signal to one of them stops both at the same step, and both go on from there.
    ends = {name: (run["steps"], run["interrupted"]) for name, run in found.items()}
    assert ends == {"first-0": (3, True), "first-1": (3, True), "second-0": (6, False), "second-1": (6, False)}
    for part in ("first", "second"):
        assert same(found[f"{part}-0"]["weights"], found[f"{part}-1"]["weights"])
    # Two processes with half the batch each see other noise than one, but learn alike.
    single = fresh()
    train(single, steps=6, batch_size=8)
    assert not same(weights(single), found["second-0"]["weights"])
    for k, v in weights(single).items():
        torch.testing.assert_close(found["second-0"]["weights"][k], v, rtol=0.5, atol=0.05)


# Bad input.


@pytest.mark.parametrize("module", ["accelerate", "tqdm.auto"])
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=re.escape('needs the extra "train": pip install "separable-hvae[train]"')):
        train(fresh())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": None}, ValueError, "fit needs steps or time_budget"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 2.5}, TypeError, "steps must be an integer, got 2.5"),
        ({"time_budget": -1.0}, ValueError, "time_budget must be positive and finite, got -1.0"),
        ({"time_budget": math.nan}, ValueError, "time_budget must be positive and finite, got nan"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": 4.0}, TypeError, "batch_size must be an integer, got 4.0"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate must be positive and finite, got 0.0"),
        ({"clip": 0.0}, ValueError, "clip must be positive, got 0.0"),
        ({"skip": -1.0}, ValueError, "skip must be positive, got -1.0"),
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"warmup": 1.0}, ValueError, "warmup must be in [0, 1), got 1.0"),
        ({"kl_warmup": -0.1}, ValueError, "kl_warmup must be in [0, 1), got -0.1"),
        ({"ema": 1.0}, ValueError, "ema must be in [0, 1), got 1.0"),
        ({"speed": 1}, TypeError, "speed"),
        ({"heldout": torch.zeros(2, 3, 4)}, ValueError, "heldout must have shape (B, 1, 4), got (2, 3, 4)"),
        ({"heldout": torch.full((2, 1, 4), math.inf)}, ValueError, "heldout must be finite, got NaN or infinity"),
        ({"heldout": torch.zeros(0, 1, 4)}, ValueError, "heldout must hold at least one signal, got shape (0, 1, 4)"),
        ({"heldout": 3}, TypeError, "heldout must be a tensor (N, C, *size) or an iterable of such batches, got int"),
        ({"heldout": [waves(), None]}, TypeError, "heldout must be a torch.Tensor, got None"),
        ({"heldout": []}, ValueError, "heldout must hold at least one signal"),
        (
            {"heldout": iter([waves()])},
            TypeError,
            "heldout must be a tensor or batches that can be read time and again, such as a DataLoader, got list_",
        ),
        ({"steps": np.True_}, TypeError, f"steps must be an integer, got {np.True_!r}"),
        ({"batch_size": np.float32(8)}, TypeError, f"batch_size must be an integer, got {np.float32(8)!r}"),
        ({"seed": torch.tensor(1)}, TypeError, "seed must be an integer, got a Tensor of shape (), torch.int64"),
        ({"steps": "10"}, TypeError, "steps must be an integer, got '10'"),
        ({"time_budget": "9m"}, TypeError, "time_budget must be a number, got '9m'"),
        ({"time_budget": math.inf}, ValueError, "time_budget must be positive and finite, got inf"),
        ({"batch_size": True}, TypeError, "batch_size must be an integer, got True"),
        ({"learning_rate": "1e-3"}, TypeError, "learning_rate must be a number, got '1e-3'"),
        (
            {"learning_rate": torch.tensor(1e-3)},
            TypeError,
            "learning_rate must be a number, got a Tensor of shape (), torch.float32",
        ),
        ({"weight_decay": -1}, ValueError, "weight_decay must be at least 0 and finite, got -1"),
        ({"weight_decay": math.nan}, ValueError, "weight_decay must be at least 0 and finite, got nan"),
        ({"warmup": 1000}, ValueError, "warmup must be in [0, 1), got 1000"),
        ({"ema": None}, TypeError, "ema must be a number, got None"),
        ({"clip": None}, TypeError, "clip must be a number, got None"),
        ({"checkpoint_every": -1}, ValueError, "checkpoint_every must be at least 0 and finite, got -1"),
        ({"checkpoint": 3}, TypeError, "checkpoint must be a path, got 3"),
        ({"checkpoint": __file__}, ValueError, f"checkpoint must be a folder, got the file {__file__}"),
        ({"log": 3}, TypeError, "log must be a path, got 3"),
        ({"log": "."}, ValueError, "log must be a file, got the folder ."),
        ({"augment": "flip"}, TypeError, "augment must be a callable (batch, generator) -> batch, got 'flip'"),
        ({"callback": "print"}, TypeError, "callback must be a callable (record, model) -> stop, got 'print'"),
        ({"clock": 0}, TypeError, "clock must be a callable () -> seconds, got 0"),
        ({"settings": "flip"}, TypeError, "settings must be a Mapping, got str"),
        ({"settings": {"a": waves()}}, TypeError, "settings holds Tensor, which JSON cannot hold"),
        ({"settings": {"seed": 1}}, ValueError, "settings must not hold ['seed'], which a checkpoint holds anyway"),
        ({"seed": 1.0}, TypeError, "seed must be an integer, got 1.0"),
        ({"seed": 2**64}, ValueError, "seed must be below 2^64, got 18446744073709551616"),
        ({"workers": -1}, ValueError, "workers must be at least 0, got -1"),
        ({"progress": "no"}, TypeError, "progress must be True or False, got 'no'"),
        ({"accelerator": "cpu"}, TypeError, "accelerator must be an Accelerator, got str"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = fresh()
    before = weights(model)
    with pytest.raises(error, match=re.escape(message)):
        train(model, **options)
    assert same(weights(model), before)


KINDS = "data must be a tensor (N, C, *size), a map-style dataset of tensors, or an iterable of batches, got "


class Stream(IterableDataset[Tensor]):
    @override
    def __iter__(self) -> Iterator[Tensor]:
        return iter(waves())

    def __len__(self) -> int:
        return len(waves())


class Labelled(Waves):
    @override
    def __getitem__(self, index: int) -> Any:
        return self.signals[index], 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda x: x.index_fill(0, torch.tensor([39]), math.nan), ValueError, "data must be finite, got NaN"),
        (lambda x: Waves(x * math.inf), ValueError, "data must be finite, got NaN"),
        (lambda x: x[:0], ValueError, "data must hold at least one signal"),
        (lambda x: Waves(x[:0]), ValueError, "data must hold at least one signal"),
        (lambda x: x[..., :3], ValueError, "data must have shape (B, 1, 4), got (40, 1, 3)"),
        (lambda x: x[0, 0, 0], ValueError, "data must have shape (B, 1, 4), got ()"),
        (lambda x: Waves(x[:, 0]), ValueError, "data must hold signals of shape (1, 4), got an item of shape (4,)"),
        (lambda x: [*x[:3], x[3, :, :2]], ValueError, "data must hold signals of shape (1, 4), got an item of shape"),
        (lambda x: [x[0], x[1].double()], TypeError, "data must hold signals of one dtype, got torch.float32 and"),
        (lambda x: 3, TypeError, f"{KINDS}int"),
        (lambda x: "waves", TypeError, f"{KINDS}str"),
        (lambda x: set(), ValueError, "data must hold at least one signal, got no batch of them"),
        (lambda x: iter([]), ValueError, "data must hold at least one signal, got no batch of them"),
        (iter, ValueError, "data must have shape (B, 1, 4), got (1, 4): signals without a batch axis"),
        (lambda x: x[0], ValueError, "data must have shape (B, 1, 4), got (1, 4): signals without a batch axis"),
        (lambda x: iter([{"x": x}]), TypeError, "data must be a torch.Tensor, got dict"),
        (lambda x: iter([(x, x, x)]), TypeError, "data must give batches (B, C, *size) or pairs of one and its cond"),
        (lambda x: iter([x, x * math.nan]), ValueError, "data must be finite, got NaN"),
        (lambda x: x.to_sparse(), TypeError, "data must be a dense tensor that holds numbers, got one of torch.sparse"),
        (lambda x: x.to("meta"), TypeError, "data must be a dense tensor that holds numbers, got one of torch.strided"),
        (lambda x: (x, torch.zeros(39)), ValueError, "the condition in data must have an entry for each of the 40"),
        (lambda x: (x, {"label": [0] * 40}), TypeError, "the condition in data must be a tensor, or nested tensors, g"),
        (lambda x: (x, torch.zeros(40)), TypeError, "data gives pairs (signals, condition), but the model takes no c"),
        (lambda x: [(x[0], object()), (x[1], object())], TypeError, "the conditions in data cannot be put into one b"),
        (lambda x: {0: x[0]}, TypeError, f"{KINDS}dict"),
        (lambda x: Stream(), ValueError, "data must have shape (B, 1, 4), got (1, 4): signals without a batch axis"),
        (lambda x: x + 0j, TypeError, "data must be real floating-point for FFT1Real, got torch.complex64"),
        (lambda x: x.byte(), TypeError, "data must be real floating-point for FFT1Real, got torch.uint8"),
        (
            lambda x: x.numpy(),
            TypeError,
            f"{KINDS}ndarray: make it a tensor with torch.from_numpy",
        ),
        (
            lambda x: Waves(x.numpy()),
            TypeError,
            "or of pairs of one and its condition, got an item of ndarray: make it a tensor with torch.from_numpy",
        ),
        (
            Labelled,
            TypeError,
            "data gives pairs (signals, condition), but the model takes no condition: keep the signals",
        ),
        (lambda x: [x[0], (x[1], 0)], TypeError, "one of pairs with a condition, got both kinds of items"),
        (TensorDataset, TypeError, "or of pairs of one and its condition, got an item of tuple: keep the signal alone"),
    ],
)
def test_bad_data(make: Callable[[Tensor], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        train(fresh(), make(waves()))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("late", "error", "message"),
    [
        (torch.full((1, 4), math.nan), ValueError, "data must be finite, got NaN or infinity"),
        (torch.zeros(1, 3), ValueError, r"data must hold signals of shape \(1, 4\), got an item of shape \(1, 3\)"),
        ((torch.zeros(1, 4), 0), TypeError, r"data gives pairs .*, but the model takes no condition"),
    ],
    ids=["finite", "shape", "kind"],
)
def test_bad_signals_that_show_up_late(late: Any, error: type[Exception], message: str, workers: int) -> None:
    with pytest.raises(error, match=message):
        train(fresh(), [torch.zeros(1, 4)] * 64 + [late], steps=20, workers=workers)


def test_too_few_signals_for_so_many_processes() -> None:
    with pytest.raises(ValueError, match=r"data must hold more than 80 signals, so that each of 3 processes .* got 40"):
        IndexedBatches(fresh(), waves(), 40, 0, 0, 0, 3)


def test_the_model_must_be_one_that_can_be_trained() -> None:
    with pytest.raises(TypeError, match="model must be an HVAE, got Linear"):
        train(torch.nn.Linear(4, 4))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model must be an HVAE, got the class HVAE"):
        train(HVAE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model must have parameters to train, got none that requires a gradient"):
        train(fresh().requires_grad_(False))
    with pytest.raises(
        ValueError, match=r"model must be float32 or float64 .* got torch\.bfloat16: .*mixed_precision="
    ):
        train(fresh().bfloat16())
    with torch.inference_mode():
        model = fresh()
    with pytest.raises(ValueError, match=r"model must be built outside torch\.inference_mode to be trained"):
        train(model)


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    plain, numpy = fresh(), fresh()
    options: dict[str, Any] = {"steps": 5, "batch_size": 8, "seed": 2**40, "every": 2, "learning_rate": 2.0**-8}
    train(plain, checkpoint=tmp_path, settings={"crops": 3}, **options)
    kinds = (np.int64, np.uint8, np.int64, np.int32, np.float32)
    given = {name: kind(value) for kind, (name, value) in zip(kinds, options.items(), strict=True)}
    train(numpy, settings={"crops": np.int64(3)}, **given)
    assert same(weights(plain), weights(numpy))
    train(numpy, checkpoint=tmp_path, settings={"crops": np.int64(3)}, **given)
    seven, three = cast(Any, np.array([7, 3]))
    assert evaluate(plain, waves(), batch_size=seven, seed=three) == evaluate(plain, waves(), batch_size=7, seed=3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_needs_no_mode(mode: Callable[[], Any]) -> None:
    models = fresh(), fresh()
    train(models[0], steps=2)
    with mode():
        train(models[1], waves(), steps=2)
    assert same(weights(models[0]), weights(models[1]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": torch.nn.Linear(4, 4)}, TypeError, "model must be an HVAE, got Linear"),
        ({"model": HVAE}, TypeError, "model must be an HVAE, got the class HVAE"),
        ({"data": waves()[:0]}, ValueError, "data must hold at least one signal, got shape (0, 1, 4)"),
        (
            {"data": waves().numpy()},
            TypeError,
            "data must be a torch.Tensor, got ndarray: make it a tensor with torch.from_numpy",
        ),
        ({"data": waves()[..., :3]}, ValueError, "data must have shape (B, 1, 4), got (40, 1, 3)"),
        ({"data": waves() + 0j}, TypeError, "data must be real floating-point for FFT1Real, got torch.complex64"),
        ({"data": waves() / 0}, ValueError, "data must be finite, got NaN or infinity"),
        ({"data": []}, ValueError, "data must hold at least one signal"),
        ({"data": 3}, TypeError, "data must be a tensor (N, C, *size) or an iterable of such batches, got int"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": -1}, ValueError, "batch_size must be at least 1, got -1"),
        ({"batch_size": "3"}, TypeError, "batch_size must be an integer, got '3'"),
        ({"batch_size": 2.0}, TypeError, "batch_size must be an integer, got 2.0"),
        ({"seed": None}, TypeError, "seed must be an integer, got None"),
        ({"bin_width": 0}, ValueError, "bin_width must be positive and finite, got 0"),
        ({"seed": 2**64}, ValueError, "seed must be below 2^64, got 18446744073709551616"),
    ],
)
def test_bad_input_to_evaluate(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = fresh().train()
    with pytest.raises(error, match=re.escape(message)):
        evaluate(**{"model": model, "data": waves(), **arguments})
    assert model.training


def test_evaluate_restores_the_mode_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh().train()
    monkeypatch.setattr(model, "observe", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(model, waves())
    assert model.training


def test_vanilla_models_train_too() -> None:
    model = tiny(Identity((4,), channels=1), perturbed=False, layers=1, sigma="learned")
    report = train(model, steps=20, learning_rate=1e-2)
    assert report.records[-1]["loss"] < report.records[0]["loss"]
    assert float(model.sigma.detach()) != pytest.approx(0.1)


# What outlasts faults around a run.


@pytest.mark.parametrize("answer", [0, 1, [1], "yes", torch.tensor(True), object()], ids=lambda a: type(a).__name__)
def test_a_callback_that_returns_anything_else_is_an_error(answer: object) -> None:
    with pytest.raises(TypeError, match="callback must return True to end the run, False or None, got "):
        train(fresh(), callback=lambda record, model: cast(Any, answer))


@pytest.mark.parametrize("answer", [None, False, np.False_])
def test_only_true_ends_a_run(answer: Any) -> None:
    assert train(fresh(), callback=lambda record, model: answer).steps == 8
    assert train(fresh(), callback=lambda record, model: cast(Any, np.True_)).steps == 1


def test_the_heldout_interval() -> None:
    def at(**options: Any) -> list[int]:
        records = train(fresh(), heldout=waves(2), **options).records
        return [record["step"] for record in records if "heldout_loss" in record]

    assert at(steps=100, every=1) == list(range(5, 101, 5))
    assert at(steps=100, every=4) == [*range(8, 101, 8), 100]
    assert at(steps=7, every=100) == [7]
    assert at(steps=20, every=100, heldout_every=9) == [9, 18, 20]
    clock = Clock()
    assert at(steps=None, time_budget=22.5, every=1, clock=clock, augment=clock.augment) == [10, 20]


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    report = train(fresh(), augment=Blow(after=2, until=5), log=tmp_path / "log.jsonl")
    assert not all(math.isfinite(record["loss"]) for record in report.records)
    for line, record in zip((tmp_path / "log.jsonl").read_text().splitlines(), report.records, strict=True):
        read = json.loads(line, parse_constant=refuse)
        assert read["loss"] == (record["loss"] if math.isfinite(record["loss"]) else None)
        assert read["residual"] == [r if math.isfinite(r) else None for r in record["residual"]]


def test_no_bar_without_a_terminal_to_show_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert train(fresh(), steps=2, progress=True).steps == 2


def test_paths_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    train(fresh(), checkpoint="~/run", log="~/log.jsonl")
    train(fresh(), checkpoint="~/run", log="~/log.jsonl")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == [
        "log.jsonl",
        "run",
        "run/checkpoint.safetensors",
    ]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 8


def altered(path: Path, **metadata: str) -> None:
    with safe_open(path, framework="pt") as file:
        tensors, before = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors, path, before | metadata)


def test_checkpoints_tell_their_format_and_version(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    train(fresh(), checkpoint=tmp_path, steps=2)
    with safe_open(path, framework="pt") as file:
        assert (file.metadata()["format"], file.metadata()["version"]) == ("1", __version__)
    altered(path, format="2", version="9.0")
    with pytest.raises(
        ValueError, match=rf"has format 2, of version 9\.0 of the library; this one, {__version__}, reads up to 1: upgr"
    ):
        train(fresh(), checkpoint=tmp_path, steps=4)


def test_more_data_in_a_resumed_run_are_told_where_to_go(tmp_path: Path) -> None:
    train(fresh(), checkpoint=tmp_path, steps=2)
    message = r"count': \(40, 50\).*to train on with more of them, give the model .* to a fit with another checkpoint f"
    with pytest.raises(ValueError, match=message):
        train(fresh(), waves(50), checkpoint=tmp_path, steps=4)
    model = fresh(seed=5)
    assert train(model, checkpoint=tmp_path, steps=2).records == []
    assert train(model, waves(50), checkpoint=tmp_path / "more", steps=4).steps == 4


@pytest.mark.parametrize(
    ("wrap", "kind", "attribute"),
    [
        (torch.nn.DataParallel, "DataParallel", "module"),
        (partial(torch.compile, backend="eager"), "OptimizedModule", "_orig_mod"),
    ],
)
def test_wrapped_models_are_told_apart(wrap: Callable[..., Any], kind: str, attribute: str) -> None:
    model = wrap(fresh())
    with pytest.raises(TypeError, match=rf"around one: pass its \.{attribute}\. .* DistributedDataParallel"):
        train(model)
    with pytest.raises(TypeError, match=rf"model must be an HVAE, got {kind} around one"):
        evaluate(model, waves())


def test_an_accelerator_keeps_no_models_alive() -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    other = accelerator.prepare(torch.nn.Linear(2, 2))
    references: list[weakref.ref[torch.nn.Module]] = []
    for fails in (False, True):
        model = fresh()
        references += [weakref.ref(model), weakref.ref(model.encoder)]
        with contextlib.suppress(RuntimeError):
            train(model, accelerator=accelerator, augment=Fail(3, RuntimeError()) if fails else None)
        del model
    gc.collect()
    assert [reference() for reference in references] == [None] * 4
    assert accelerator._models == [other]
    assert accelerator._optimizers == []


def test_a_report_is_a_few_lines() -> None:
    report = train(fresh(), heldout=waves(2), steps=30)
    lines = repr(report).splitlines()
    assert lines == str(report).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"FitReport: 30 steps in {report.seconds:.1f} s, 30 records")
    last = report.records[-1]
    assert lines[2] == f"  step 30: loss {last['loss']:.3f} nats/dim, held out {last['heldout_loss']:.3f}"
    assert repr(train(fresh(), augment=Interrupt(2))).splitlines()[0].endswith("2 records, interrupted")
