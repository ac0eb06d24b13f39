"""Losses, optimizers, schedules, conditions and streams of the caller's own."""

import functools
import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from typing_extensions import override

from separable_hvae import HVAE, Condition, Decomposition, FFT1Real, evaluate, fit
from separable_hvae.training.batches import StreamedBatches
from tests.helpers import training as helpers
from tests.helpers.models import few, seeded, units
from tests.helpers.training import fresh, train, waves
from tests.training.test_training import Interrupt, same, weights


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def squared_error(model: HVAE, batch: Tensor, generator: torch.Generator) -> Tensor:
    return (model.encode(batch).reconstruction - batch).square().mean()


def absolute_error(model: HVAE, batch: Tensor, generator: torch.Generator) -> Tensor:
    return (model.encode(batch).reconstruction - batch).abs().mean()


# Losses, optimizers, schedules.


def test_the_models_own_loss_is_the_default() -> None:
    models = fresh(), fresh()
    default = train(models[0])
    own = train(models[1], loss=lambda model, batch, generator: model.loss(batch, generator))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    losses = [[r["loss"] for r in report.records] for report in (default, own)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert set(default.records[0]) - set(own.records[0]) == {"data", "kl", "residual"}


def test_own_parts_make_the_loop_that_one_would_write() -> None:
    batches, model, reference = list[Tensor](), fresh(), fresh()

    def loss(model: HVAE, batch: Tensor, generator: torch.Generator) -> Tensor:
        batches.append(batch)
        return squared_error(model, batch, generator)

    sgd = functools.partial(SGD, lr=0.1, momentum=0.9)
    report = train(model, loss=loss, optimizer=sgd, schedule=lambda done: 1 - done, ema=0, clip=math.inf, skip=math.inf)
    reference.calibrate(waves())
    optimizer = SGD(reference.train().parameters(), lr=0.1, momentum=0.9)
    rates = [0.1 * (1 - step / 8) for step in range(8)]
    for rate, batch, record in zip(rates, batches, report.records, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        error = squared_error(reference, batch, seeded())
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        assert record["loss"] == pytest.approx(float(error.detach()), rel=1e-6)
        assert record["learning_rate"] == pytest.approx(rate)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-5, atol=1e-7)


class Counting(SGD):
    """An optimizer that keeps what it needs in its groups and in plain numbers, as some do."""

    @override
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            group["betas"] = (0.9, 1 / group["count"])
            for p in group["params"]:
                state = self.state[p]
                state["seen"] = state.get("seen", 0) + 1
                state["nested"] = [p.detach().abs().mean(), (state["seen"], None)]
                assert isinstance(group["betas"], tuple)
                if p.grad is not None:
                    rate = group["lr"] / (group["count"] + state["seen"]) * (1 + state["nested"][0])
                    p.data.sub_(p.grad * rate)


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.RAdam,
        torch.optim.NAdam,
        torch.optim.Rprop,
        torch.optim.ASGD,
        torch.optim.Adagrad,
        functools.partial(SGD, lr=0.05, momentum=0.9),
        functools.partial(Counting, lr=0.05),
        lambda parameters: SGD([{"params": parameters[:3]}, {"params": parameters[3:], "lr": 0.3}], lr=0.1),
    ],
    ids=["RAdam", "NAdam", "Rprop", "ASGD", "Adagrad", "SGD", "Counting", "groups"],
)
def test_resuming_with_any_optimizer_is_bit_identical(tmp_path: Path, optimizer: Callable[..., Optimizer]) -> None:
    whole, parts = fresh(), fresh()
    options: dict[str, Any] = {"optimizer": optimizer, "schedule": lambda done: 0.5 + done, "loss": squared_error}
    straight = train(whole, **options)
    train(parts, **options, checkpoint=tmp_path, augment=Interrupt(3))
    resumed = fresh(seed=5)
    report = train(resumed, **options, checkpoint=tmp_path)
    assert report.steps == 8
    assert same(weights(whole), weights(resumed))
    assert [r["loss"] for r in report.records] == [r["loss"] for r in straight.records[3:]]


def test_a_checkpoint_names_optimizer_loss_and_schedule(tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoint": tmp_path, "steps": 2}
    train(fresh(), **options, optimizer=SGD, loss=squared_error, schedule=math.cos)
    for other, message in (
        ({"optimizer": torch.optim.RAdam, "loss": squared_error}, r"{'optimizer': \('SGD', 'RAdam'\)}"),
        ({"loss": squared_error}, r"{'optimizer': \('SGD', None\)}"),
        ({"optimizer": SGD}, r"{'loss': \('squared_error', None\)}"),
        ({"optimizer": SGD, "loss": absolute_error}, r"{'loss': \('squared_error', 'absolute_error'\)}"),
    ):
        with pytest.raises(ValueError, match=r"other settings or data \(there, here\): " + message):
            train(fresh(), **options, schedule=math.cos, **cast(dict[str, Any], other))
    options["steps"] = 4
    with pytest.warns(UserWarning, match=r"new ones: {'schedule': \('cos', 'exp'\)}") as caught:
        train(fresh(), **options, optimizer=SGD, loss=squared_error, schedule=math.exp)
    assert caught[0].filename == helpers.__file__
    options["steps"] = 6
    faster = functools.partial(SGD, lr=0.5)
    with pytest.warns(UserWarning, match=r'"optimizer\'s group 0": {\'lr\': \(0\.001, 0\.5\)}'):
        report = train(fresh(), **options, optimizer=faster, loss=squared_error, schedule=math.exp)
    assert report.records[0]["learning_rate"] == pytest.approx(0.5 * math.exp(4 / 6))
    with pytest.raises(ValueError, match=r"optimizer has other groups: there of \[\d+\] parameters, here \[3, \d+\]"):
        train(
            fresh(),
            **options,
            optimizer=lambda parameters: SGD([{"params": parameters[:3]}, {"params": parameters[3:]}]),
            loss=squared_error,
            schedule=math.exp,
        )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss": "mse"}, TypeError, "loss must be a callable (model, batch, generator) -> scalar, got 'mse'"),
        ({"loss": lambda *_: 3.0}, TypeError, "loss must return a scalar tensor with a gradient, in nats per dim"),
        (
            {"loss": lambda m, x, g: m.encode(x).kl},
            TypeError,
            "with a gradient, in nats per dimension, got a Tensor of",
        ),
        ({"loss": lambda m, x, g: x.mean()}, TypeError, "got a Tensor of shape (), torch.float32 without a gradient"),
        ({"optimizer": 0.1}, TypeError, "optimizer must be a callable (parameters) -> Optimizer, got 0.1"),
        ({"optimizer": list}, TypeError, "optimizer must make a torch.optim.Optimizer of a list of parameters, got [P"),
        ({"optimizer": torch.optim.LBFGS}, TypeError, "optimizer must step without a closure, which LBFGS needs"),
        ({"schedule": 0.1}, TypeError, "schedule must be a callable (share of the run) -> factor, got 0.1"),
        ({"schedule": lambda done: "1"}, TypeError, "what schedule returns must be a number, got '1'"),
        ({"schedule": lambda done: -1.0}, ValueError, "what schedule returns must be at least 0 and finite, got -1.0"),
        (
            {"optimizer": SGD, "learning_rate": 0.1},
            ValueError,
            "learning_rate is for the built-in optimizer: with optimizer= leave it out",
        ),
        (
            {"schedule": math.cos, "warmup": 0.1},
            ValueError,
            "warmup is for the built-in schedule: with schedule= leave",
        ),
        ({"loss": squared_error, "kl_warmup": 0.1}, ValueError, "kl_warmup is for the built-in loss: with loss= leave"),
    ],
)
def test_bad_parts(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        train(fresh(), **options)


# Conditions.


class Noting(Condition):
    """Notes what it is given, and says nothing."""

    @override
    def build(self, decomp: Decomposition, *, width: int, bottleneck: int, blocks: int, gain: float) -> None:
        self.silence = [torch.zeros(1, width, *[1] * decomp.dims) for _ in decomp.scales]
        self.seen: list[Any] = []

    @override
    def check(self, condition: Any, batch: int) -> int:
        self.seen.append(condition)
        return batch

    @override
    def forward(self, condition: int) -> list[Tensor]:
        return [s.expand(condition, *s.shape[1:]) for s in self.silence]


class Conditioned(HVAE):
    """A model that shows the conditions that it gets."""

    @property
    def seen(self) -> list[Any]:
        assert isinstance(self.condition, Noting)
        return self.condition.seen


def conditioned(dropout: float = 0.0) -> Conditioned:
    torch.manual_seed(0)
    options: dict[str, Any] = {"layers": 1, "width": 6, "bottleneck": 4, "blocks": 1}
    return Conditioned(FFT1Real(4, scales=[1, 4]), condition=Noting(dropout=dropout), **options)


def label_of(x: Tensor) -> Tensor:
    """A label that can be computed from each signal, to see that pairs stay together."""
    return (x.reshape(len(x), -1)[:, 0] * 1e4).round().long()


class Pairs:
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        return self.x[i], {"label": int(label_of(self.x[i : i + 1])), "more": [self.x[i] * 2]}


@pytest.mark.parametrize("workers", [0, 1])
def test_pairs_stay_together(tmp_path: Path, workers: int) -> None:
    x = waves()
    nested = {"label": label_of(x), "more": [x * 2]}
    given = {
        "tensors": (x, nested),
        "data set": Pairs(x),
        "loader": DataLoader(cast(Any, Pairs(x)), batch_size=8, num_workers=workers),
        "batches": [(x[i : i + 8], {"label": label_of(x[i : i + 8]), "more": [x[i : i + 8] * 2]}) for i in (0, 8, 16)],
    }
    ends = {}
    for name, data in given.items():
        seen: list[Any] = []

        def note(batch: Any, generator: torch.Generator, seen: list[Any] = seen) -> Any:
            signals, condition = batch
            seen.append(condition)
            assert torch.equal(condition["label"], label_of(signals))
            assert torch.equal(condition["more"][0], signals * 2)
            return signals, condition["label"]

        model = conditioned()
        train(model, data, augment=note, workers=workers if name == "data set" else 0)
        assert len(seen) == 8
        # What augment makes of a condition goes to the model.
        assert all(torch.equal(a["label"], b) for a, b in zip(seen, model.seen[:8], strict=True))
        assert seen[0]["label"].dtype == torch.int64
        ends[name] = weights(model)
    plain = fresh()
    train(plain, x)
    assert same(ends["tensors"], ends["data set"])
    # Nothing is added to contexts, but to rounding they are other tensors.
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(ends["tensors"][name], tensor, rtol=1e-4, atol=1e-5)


def test_a_loss_gets_the_pair() -> None:
    seen: list[Any] = []

    def loss(model: HVAE, batch: Any, generator: torch.Generator) -> Tensor:
        signals, condition = batch
        seen.append(condition)
        return squared_error(model, signals, generator)

    train(fresh(), TensorDataset(waves(), label_of(waves())), loss=loss)
    assert len(seen) == 8
    assert seen[0].shape == (8,)


def test_heldout_pairs(tmp_path: Path) -> None:
    x = waves(10)
    pairs = TensorDataset(x, label_of(x))
    expected = evaluate(fresh(), x, batch_size=4)
    for data in ((x, label_of(x)), DataLoader(pairs, batch_size=4), [(x[:4], label_of(x[:4])), (x[4:], None)]):
        model = conditioned(dropout=0.5)
        found = evaluate(model, data, batch_size=4)
        assert found["mse_mean"] == pytest.approx(expected["mse_mean"])
        assert torch.equal(model.seen[0], label_of(x[:4]))
        report = train(model, x, heldout=data, steps=2)
        assert "heldout_loss" in report.records[-1]
        with pytest.raises(TypeError, match=r"data gives pairs .*, but the model takes no condition: keep the signals"):
            evaluate(fresh(), data)
        with pytest.raises(TypeError, match=r"heldout gives pairs .*, but the model takes no condition"):
            train(fresh(), heldout=data)


def test_pairs_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    x = waves()
    train(conditioned(), (x, label_of(x)), checkpoint=tmp_path, steps=2)
    train(conditioned(), (x, label_of(x)), checkpoint=tmp_path, steps=3)
    for other in ((x, label_of(x) + 1), x):
        with pytest.raises(ValueError, match=r"settings or data .*checksum"):
            train(conditioned(), other, checkpoint=tmp_path, steps=4)


def test_augment_must_give_what_it_gets() -> None:
    x = waves()
    with pytest.raises(TypeError, match="augment must return a pair of signals and a condition, as it gets"):
        train(conditioned(), (x, label_of(x)), augment=lambda batch, generator: batch[0])
    with pytest.raises(TypeError, match="augment must return signals, as it gets"):
        train(conditioned(), augment=lambda batch, generator: (batch, 0))


def test_data_that_require_grad_get_none() -> None:
    x, scale = waves().requires_grad_(), torch.ones(1, requires_grad=True)
    made = waves() * scale
    for data in (x, list(made), DataLoader(cast(Any, made), batch_size=8), (x, made)):
        train(conditioned(dropout=0.5), data, heldout=made, steps=2)
    assert x.grad is None
    assert scale.grad is None


class Special(Tensor):
    """A tensor of another library."""


def test_buffers_are_plain_tensors() -> None:
    model = fresh()
    model.calibrate(waves().as_subclass(Special))
    assert {type(buffer) for buffer in model.buffers()} == {Tensor}


# Streams.


def stream(n: int | None = None) -> Iterator[Tensor]:
    """Batches of eight signals, without end or so many."""
    for i in itertools.count() if n is None else range(n):
        yield waves(8, seed=2 * i)


class Endless(IterableDataset[Tensor]):
    @override
    def __iter__(self) -> Iterator[Tensor]:
        return iter(x for batch in stream() for x in batch)


def trained_on(data: Any, **options: Any) -> tuple[list[Tensor], HVAE]:
    seen: list[Tensor] = []

    def note(x: Tensor, generator: torch.Generator) -> Tensor:
        seen.append(x)
        return x

    model = fresh()
    train(model, data, augment=note, **options)
    return seen, model


@pytest.mark.parametrize(
    "make", [stream, lambda: DataLoader(Endless(), batch_size=8), lambda: DataLoader(Endless(), 8, num_workers=1)]
)
def test_streams_are_calibrated_on_and_trained_on(make: Callable[[], Any]) -> None:
    seen, model = trained_on(make(), steps=20)
    expected = list(itertools.islice(stream(), 20))
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    # The bands' units are those of the first sixteen batches.
    reference = fresh()
    reference.calibrate(torch.cat(expected[:16]))
    assert units(model) == pytest.approx(units(reference))


def test_a_run_takes_no_more_of_a_stream_than_it_needs() -> None:
    asked = 0

    def noted() -> Iterator[Tensor]:
        nonlocal asked
        for batch in stream():
            asked += 1
            yield batch

    batches = noted()
    trained_on(batches, steps=20)
    assert asked == 20
    next(batches)


def test_what_can_be_iterated_again_begins_a_new_pass() -> None:
    x = waves(24)
    for data in (DataLoader(cast(Any, x), batch_size=8), [x[:8], x[8:16], x[16:]], (x[:8], x[8:16], x[16:])):
        seen, _ = trained_on(data, steps=7)
        assert torch.equal(torch.cat(seen), torch.cat([x, x, x[:8]]))


def test_a_generator_that_ends_ends_the_run(tmp_path: Path) -> None:
    model = fresh()
    with pytest.warns(UserWarning, match="data ended after step 5, before the run did: give what can be") as caught:
        report = train(model, stream(5), checkpoint=tmp_path)
    assert caught[0].filename == helpers.__file__
    assert (report.steps, report.interrupted) == (5, False)
    assert not model.training
    # With more of them the run goes on.
    assert train(model, stream(3), checkpoint=tmp_path).steps == 8


def test_a_resumed_stream_begins_anew_with_the_noise_that_is_due(tmp_path: Path) -> None:
    x = waves(24)
    loader = [x[:8], x[8:16], x[16:]]
    noise: list[Tensor] = []

    def loss(model: HVAE, batch: Tensor, generator: torch.Generator) -> Tensor:
        noise.append(torch.randn(2, generator=generator))
        return squared_error(model, batch, generator)

    train(fresh(), loader, loss=loss)
    train(fresh(), loader, loss=loss, checkpoint=tmp_path, augment=Interrupt(5))
    seen: list[Tensor] = []

    def note(batch: Tensor, generator: torch.Generator) -> Tensor:
        seen.append(batch)
        return batch

    train(fresh(), loader, loss=loss, checkpoint=tmp_path, augment=note)
    assert torch.equal(torch.cat(noise[:8]), torch.cat(noise[8:]))
    assert torch.equal(torch.cat(seen), x)
    with pytest.raises(ValueError, match=r"settings or data .*'count': \(None, 24\)"):
        train(fresh(), x, loss=loss, checkpoint=tmp_path)


def test_processes_take_turns_at_a_stream() -> None:
    model, expected = fresh(), list(itertools.islice(stream(), 6))
    for rank in (0, 1):
        batches = StreamedBatches(model, stream(7), rank, 2)
        first = cast(list[Tensor], list(batches.first(17)))
        assert torch.equal(torch.cat(first), torch.cat(expected[:3]))
        mine = cast(list[Tensor], list(batches.start_at(0)))
        assert torch.equal(torch.cat(mine), torch.cat(expected[rank::2]))


def test_signals_without_a_batch_axis_are_refused() -> None:
    for data in (iter(waves()), DataLoader(Endless(), batch_size=None), waves()[0]):
        with pytest.raises(
            ValueError, match=r"must have shape \(B, 1, 4\), got \(1, 4\): signals without a batch axis"
        ):
            train(fresh(), data)
        with pytest.raises(ValueError, match="signals without a batch axis"):
            fresh().calibrate(cast(Any, data))


def test_calibration_reads_so_many_signals_and_no_more() -> None:
    asked = 0

    def noted() -> Iterator[Tensor]:
        nonlocal asked
        for batch in stream():
            asked += 1
            yield batch

    model, reference = fresh(), fresh()
    model.calibrate(noted(), at_most=20)
    assert asked == 3
    reference.calibrate(torch.cat(list(stream(3))))
    assert units(model) == pytest.approx(units(reference))
    # By default, too, it comes to an end; what has an end is read to it.
    model.calibrate(itertools.repeat(waves(512)))
    model.calibrate(waves(40), at_most=1)
    reference.calibrate(waves(40))
    assert units(model) == units(reference)
    with pytest.raises(ValueError, match="at_most must be at least 1, got 0"):
        model.calibrate(waves(), at_most=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_a_batch_once(reentrant: bool) -> None:
    model, plain = few().train(), few().train()
    batches = [waves(6, seed=i).double() for i in range(3)]

    def run(model: HVAE, x: Tensor) -> Tensor:
        return model.loss(x, seeded())

    for x in batches:
        x = x.clone().requires_grad_()
        cast(Tensor, checkpoint(run, model, x, use_reentrant=reentrant)).backward()
        run(plain, x).backward()
    assert int(model.standardization.calibrated) == int(plain.standardization.calibrated) == 3
    assert units(model) == units(plain)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(a.grad, b.grad)


def test_every_option_is_in_the_help() -> None:
    parameters = inspect.signature(fit).parameters
    assert list(parameters)[:3] == ["model", "data", "steps"]
    assert parameters["batch_size"].default == 64
    assert parameters["batch_size"].kind is inspect.Parameter.KEYWORD_ONLY
    for name in parameters:
        assert f"\n    {name}: " in inspect.getdoc(fit), name  # type: ignore[operator]
    assert "TrainingOptions" not in inspect.getdoc(fit)  # type: ignore[operator]
