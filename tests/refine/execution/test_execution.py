"""However the pieces run, the result is the same."""

import copy
import itertools
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils import _pytree as pytree
from typing_extensions import override

from separable_hvae import HVAE, DataTerm, FFT1Real, Identity, KnownBands, MAPRefiner, Measurement, Result, Signal
from separable_hvae.data_terms.base import BoundTerm, Misfit
from separable_hvae.nn.decoder import Observation
from separable_hvae.refine import Compiled, CudaGraphs, Eager, Execution
from separable_hvae.refine.execution import cuda_graphs
from separable_hvae.refine.execution.base import Function
from separable_hvae.refine.execution.cache import LRUCache
from separable_hvae.refine.problem import Problem
from separable_hvae.refine.rules import Rule
from tests.helpers.models import assert_equal, few, tiny
from tests.helpers.terms import terms
from tests.helpers.zoo import Pyramid, signal


def least(seed: int = 0) -> HVAE:
    """One layer, in float64."""
    return tiny(Identity((4,), channels=1), seed=seed, layers=1, blocks=0).double()


def assert_same(result: Result, expected: Result, tolerance: float = 0.0) -> None:
    for a, b in zip(result.latents, expected.latents, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(result.objective, expected.objective)


def test_threads_change_nothing() -> None:
    model, shared = few(), torch.get_num_threads()
    x = signal(model.decomp, 3)
    expected = MAPRefiner(6, schedule="parallel", execution=Eager(threads=1))(model, x)
    assert_same(MAPRefiner(6, schedule="parallel", execution=Eager(threads=2))(model, x), expected)
    assert torch.get_num_threads() == shared

    def fails(h_hat: Tensor, h: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        MAPRefiner(6, loss=fails, schedule="parallel", execution=Eager(threads=2))(model, x)


@pytest.mark.parametrize(
    ("threads", "error", "message"),
    [
        (0, ValueError, "threads must be at least 1, got 0"),
        (1.5, TypeError, "threads must be an integer, got 1.5"),
    ],
)
def test_bad_threads(threads: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Eager(threads)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_pieces_give_the_same_and_follow_the_weights() -> None:
    torch.manual_seed(0)
    model = HVAE(FFT1Real(4), scales=[4], layers=2, width=4, bottleneck=4, blocks=0)
    x = signal(model.decomp, 3, dtype=torch.float32)
    execution = Compiled()
    compiled = MAPRefiner(3, execution=execution)
    for _ in range(2):
        assert_same(compiled(model, x), MAPRefiner(3)(model, x), 1e-4)
        assert len(execution._compiled) == 1
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1)


@pytest.mark.parametrize(
    ("name", "schedule", "rule"),
    [
        ("known bands", "scale", "gauss-newton"),
        ("gaussian", "joint", "gauss-newton"),
        ("k-space", "parallel", "adam"),
    ],
)
def test_traced_data_terms_give_the_same_and_serve_later_batches(
    name: str, schedule: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What was traced runs as it is: the compiler itself takes tens of seconds.
    monkeypatch.setattr("torch._inductor.compile", lambda graph, *_: graph)
    model, term = terms()[name]
    execution = Compiled()
    traced = MAPRefiner(2, 0.05, schedule=schedule, rule=rule, execution=execution)
    plain = MAPRefiner(2, 0.05, schedule=schedule, rule=rule)
    assert_same(traced(model, term), plain(model, term), 1e-5)
    count, turned = len(execution._compiled), term.rows(torch.tensor([2, 0, 1]))
    assert_same(traced(model, turned), plain(model, turned), 1e-5)
    assert len(execution._compiled) == count > 0


def test_compiled_pieces_share_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def compiled(graph: Any, _: list[Tensor], options: dict[str, Any]) -> Any:
        asked.append(options["cpp.threads"])
        return graph

    monkeypatch.setattr("torch._inductor.compile", compiled)
    model = few()
    x = signal(model.decomp, 3)
    expected = MAPRefiner(6, schedule="parallel", execution=Eager(threads=1))(model, x)
    assert_same(MAPRefiner(6, schedule="parallel", execution=Compiled(threads=2))(model, x), expected, 1e-9)
    # Pieces that run at the same time have one core each.
    assert asked == [1, 1]


class Masked(nn.Module):
    """A physics with a mask of its own, which may be exchanged or written."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask: Tensor
        self.register_buffer("mask", mask)

    def A(self, x: Tensor) -> Tensor:  # noqa: N802
        return x * self.mask


def test_a_physics_that_has_changed_is_traced_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.compile", lambda graph, *_: graph)
    model, execution = tiny(FFT1Real(4, scales=[1, 4]), sigma=0.3), Compiled()
    x, physics = signal(model.decomp, 3, dtype=torch.float32), Masked(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    traced, plain = (MAPRefiner(3, 0.05, schedule="joint", execution=e) for e in (execution, "eager"))
    changes: list[Callable[[], object]] = [
        lambda: None,
        lambda: setattr(physics, "mask", torch.tensor([0.0, 1.0, 1.0, 0.0])),
        lambda: physics.mask.fill_(1.0),
        lambda: None,
    ]
    for change, count in zip(changes, (1, 2, 3, 3), strict=True):
        change()
        term = Measurement(physics.A(x), physics, 0.1)
        assert_same(traced(model, term), plain(model, term), 1e-5)
        assert len(execution._compiled) == count


def test_a_loss_whose_tensors_have_changed_is_traced_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.compile", lambda graph, *_: graph)
    model, execution = tiny(FFT1Real(4, scales=[1, 4]), sigma=0.3), Compiled()
    x, weights = signal(model.decomp, 3, dtype=torch.float32), {"all": [torch.tensor(3.0)]}

    def loss(power: int, h_hat: Tensor, h: Tensor) -> Tensor:
        return weights["all"][0] * (h_hat - h).abs().pow(power).flatten(1).sum(1)

    traced, plain = (MAPRefiner(3, 0.05, loss=partial(loss, 2), execution=e) for e in (execution, "eager"))
    changes: list[Callable[[], object]] = [
        lambda: None,
        lambda: weights["all"][0].fill_(9.0),
        lambda: weights["all"].insert(0, torch.tensor(1.0)),
        lambda: None,
    ]
    for change, count in zip(changes, (2, 4, 6, 6), strict=True):
        change()
        assert_same(traced(model, x), plain(model, x), 1e-5)
        assert len(execution._compiled) == count


def test_signals_have_a_likelihood_as_a_data_term_too() -> None:
    model = few()
    x = signal(model.decomp, 3, dtype=torch.float32)
    expected, result = (MAPRefiner(1)(model, known) for known in (x, Signal(x)))
    torch.testing.assert_close(result.data, expected.data)
    assert result.reconstruction.dtype == torch.float32


def test_a_learned_sigma_needs_no_other_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.compile", lambda graph, *_: graph)
    torch.manual_seed(0)
    model = HVAE(FFT1Real(4), scales=[4], layers=1, width=4, bottleneck=4, blocks=0, sigma="learned")
    x, execution = signal(model.decomp, 3, dtype=torch.float32), Compiled()
    for term in (x, KnownBands.of(x, model.decomp, until=4)):
        for sigma in (0.5, 0.2):
            with torch.no_grad():
                model.log_sigma.fill_(sigma).log_()
            assert_same(MAPRefiner(2, execution=execution)(model, term), MAPRefiner(2)(model, term), 1e-5)
    assert len(execution._compiled) == 2


class Huber:
    """A loss with settings of its own."""

    def __init__(self) -> None:
        self.weight = 1.0

    def loss(self, h_hat: Tensor, h: Tensor) -> Tensor:
        return self.weight * nn.functional.huber_loss(h_hat, h, reduction="none").flatten(1).sum(1)


def test_a_loss_whose_settings_have_changed_is_traced_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.compile", lambda graph, *_: graph)
    model, execution, own = tiny(FFT1Real(4, scales=[1, 4]), sigma=0.3), Compiled(), Huber()
    x = signal(model.decomp, 3, dtype=torch.float32)
    traced, plain = (MAPRefiner(3, 0.05, loss=own.loss, execution=e) for e in (execution, "eager"))
    for weight, count in ((1.0, 2), (50.0, 4), (1.0, 4)):
        own.weight = weight
        assert_same(traced(model, x), plain(model, x), 1e-5)
        assert len(execution._compiled) == count


def test_what_looks_at_values_cannot_be_compiled() -> None:
    def two_faced(h_hat: Tensor, h: Tensor) -> Tensor:
        error = (h_hat - h).square().flatten(1).sum(1)
        return error if float(error.sum()) > 1 else 2 * error

    model = tiny(Identity((4,), channels=1))
    x = signal(model.decomp, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"SubsetObjective cannot be traced.*execution='eager' runs it"):
        MAPRefiner(1, loss=two_faced, execution="compiled")(model, x)


class Recording:
    """Stands in for a CUDA graph: what is recorded runs again on the same memory."""

    def __init__(self) -> None:
        self.replays = 0
        self.shares: Recording | None = None
        self.again: Callable[[], Any]

    def replay(self) -> None:
        self.replays += 1
        self.again()

    def pool(self) -> "Recording":
        return self


class Stream:
    """Stands in for a CUDA stream: knows which work comes before what it does next."""

    def __init__(self, priority: int = 0) -> None:
        self.before: set[int] = set()

    def wait_stream(self, other: "Stream") -> None:
        self.before |= other.before


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """Let CUDA graphs record on the CPU."""
    made: list[Recording] = []

    def record() -> Recording:
        made.append(Recording())
        return made[-1]

    @contextmanager
    def nothing(*_: Any) -> Iterator[None]:
        yield

    @contextmanager
    def capture(graph: Recording, pool: Any, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        graph.shares = pool
        yield

    class Again(cuda_graphs.Recording):
        def __init__(self, function: Function, *rest: Any) -> None:
            super().__init__(function, *rest)

            def again() -> None:
                leaves, _ = pytree.tree_flatten(function(self.inputs))
                pairs = zip(self.outputs, leaves, strict=True)
                written = [(out, new) for out, new in pairs if isinstance(out, Tensor)]
                torch._foreach_copy_([out for out, _ in written], [new for _, new in written])

            self.graph.again = again  # type: ignore[attr-defined]

    main, count = Stream(), itertools.count()
    main.entered = []  # type: ignore[attr-defined]

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        main.entered.append((work := next(count), set(stream.before)))  # type: ignore[attr-defined]
        stream.before.add(work)
        yield

    monkeypatch.setattr(cuda_graphs, "Recording", Again)
    monkeypatch.setattr(cuda_graphs, "_is_cuda", lambda _: True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", record)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "device", nothing)
    modes: list[Any] = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    return made


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "steps"])
@pytest.mark.parametrize(("schedule", "steps"), [("scale", 2), ("parallel", 1), ("joint", 1)])
def test_recorded_inferences_give_the_same(schedule: str, steps: int, whole: bool, recordings: list[Recording]) -> None:
    model = few()
    x = signal(model.decomp, 3)
    refiner = MAPRefiner(6, schedule=schedule, execution=CudaGraphs(whole=whole))
    for y in (x, 2 * x):
        assert_same(refiner(model, y), MAPRefiner(6, schedule=schedule)(model, y))
    graphs = 1 if whole else steps
    assert len(recordings) == graphs
    assert sum(r.replays for r in recordings) == (2 if whole else 12 * steps)
    # Weights that are trained in place are seen, weights elsewhere are recorded anew.
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    assert_same(refiner(model, x), MAPRefiner(6, schedule=schedule)(model, x))
    assert len(recordings) == graphs
    for p in model.parameters():
        p.data = p.data.clone()
    assert_same(refiner(model, x), MAPRefiner(6, schedule=schedule)(model, x))
    assert len(recordings) == 2 * graphs


def test_pieces_of_a_step_wait_for_the_step_before_and_not_for_one_another(recordings: list[Recording]) -> None:
    model, steps = few(), 3
    MAPRefiner(steps, schedule="parallel", execution=CudaGraphs())(model, signal(model.decomp, 3))
    # The last of the runs: two pieces a step, each on a stream of its own.
    entered = torch.cuda.current_stream().entered[-2 * steps :]  # type: ignore[attr-defined]
    works = [work for work, _ in entered]
    for i, (_, before) in enumerate(entered):
        assert before & set(works) == set(works[: i - i % 2])


def test_what_looks_at_values_is_refused_before_it_is_recorded(
    recordings: list[Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    def looks(h_hat: Tensor, h: Tensor) -> Tensor:
        if torch.cuda.get_sync_debug_mode():
            raise RuntimeError("called a synchronizing CUDA operation")
        return (h_hat - h).square().flatten(1).sum(1)

    monkeypatch.setattr(torch.cuda, "graph", None)
    model = least()
    with pytest.raises(RuntimeError, match=r"looks at tensors' values.*execution='eager' runs it"):
        MAPRefiner(1, loss=looks, execution=CudaGraphs())(model, signal(model.decomp))
    assert not torch.cuda.get_sync_debug_mode()


def test_the_recordings_used_last_are_kept(recordings: list[Recording], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "_MOST", 2)
    model = least()
    x, refiner = signal(model.decomp, 3), MAPRefiner(1, execution=CudaGraphs())
    for batch, count in ((1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4)):
        refiner(model, x[:batch])
        assert len(recordings) == count
    # Each shares the memory of one that was kept.
    assert [recording.shares for recording in recordings] == [None, *recordings[:3]]


def test_what_fits_and_was_used_last_is_kept() -> None:
    kept, made, fitting = LRUCache[int](2), itertools.count(), True
    take = [kept.take(key, lambda _: fitting, lambda: next(made)) for key in "ababcacb"]
    assert take == [0, 1, 0, 1, 2, 3, 2, 4]
    assert list(kept) == ["c", "b"]
    fitting = False
    assert kept.take("b", lambda _: fitting, lambda: next(made)) == 5
    with pytest.raises(ZeroDivisionError):
        kept.take("c", lambda _: fitting, lambda: 1 // 0)
    assert list(kept) == ["b"]


@dataclass(slots=True)
class Slide(Rule):
    """A user's rule without a dictionary."""

    speed: float

    @override
    def step(
        self, problem: Problem, latents: list[Tensor], sizes: Sequence[float], state: Any
    ) -> tuple[list[Tensor], Any]:
        gradients = problem.gradient(latents)
        return [z - 1e-3 * self.speed * g for z, g in zip(latents, gradients, strict=True)], None


def test_other_settings_are_recorded_anew(recordings: list[Recording]) -> None:
    model, execution = least(), CudaGraphs()
    x, rule = signal(model.decomp), Slide(1.0)
    for speed, count in ((1.0, 1), (30.0, 2), (1.0, 2)):
        rule.speed = speed
        refiner = MAPRefiner(2, 1.0, rule=rule, execution=execution)
        assert_same(refiner(model, x), MAPRefiner(2, 1.0, rule=rule)(model, x))
        assert len(recordings) == count


def test_threads_take_turns_with_recordings(recordings: list[Recording]) -> None:
    busy = Lock()

    def loss(h_hat: Tensor, h: Tensor) -> Tensor:
        assert busy.acquire(blocking=False)
        try:
            return (h_hat - h).square().flatten(1).sum(1)
        finally:
            time.sleep(1e-3)
            busy.release()

    model = least()
    xs = [signal(model.decomp, batch) for batch in (2, 3)]
    refiner = MAPRefiner(2, loss=loss, execution=CudaGraphs())
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(partial(refiner, model), xs))
    for x, result in zip(xs, results, strict=True):
        assert_same(result, MAPRefiner(2, loss=loss)(model, x))
    assert len(recordings) == 2


@pytest.mark.parametrize("execution", [Compiled(threads=1), CudaGraphs(whole=False)], ids=["compiled", "graphs"])
def test_weights_may_be_parametrized_and_modules_replaced(
    execution: Execution, recordings: list[Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch._inductor.compile", lambda graph, *_: graph)
    model = least()
    x = signal(model.decomp, 3)
    changes: list[Callable[[], object]] = [
        lambda: None,
        lambda: weight_norm(model.subsets[0].layers[0].inject),
        lambda: setattr(model.subsets[0], "head", least(seed=1).subsets[0].head),
    ]
    for change in changes:
        change()
        assert_same(MAPRefiner(2, execution=execution)(model, x), MAPRefiner(2)(model, x), 1e-9)


@pytest.mark.parametrize(
    "execution", [Eager(), Compiled(threads=1), CudaGraphs(whole=False)], ids=lambda e: type(e).__name__
)
def test_refiners_travel_without_what_was_compiled_or_recorded(
    execution: Execution, recordings: list[Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch._inductor.compile", lambda graph, *_: graph)
    model, refiner = least(), MAPRefiner(1, execution=execution)
    x = signal(model.decomp)
    expected = refiner(model, x)
    for other in (
        copy.copy(execution),
        copy.deepcopy(refiner).execution,
        pickle.loads(pickle.dumps(refiner)).execution,
    ):
        assert type(other) is type(execution)
        assert not any(isinstance(value, dict) and value for value in vars(other).values())
        settings = ("threads", "whole", "compiled")
        assert [getattr(other, s, None) for s in settings] == [getattr(execution, s, None) for s in settings]
        assert_same(MAPRefiner(1, execution=other)(model, x), expected)


@dataclass(frozen=True)
class Squares(Misfit):
    """Squared error of bands where there is a target; of all of them together, nothing."""

    @override
    def local(self, index: int, band: Tensor, targets: Sequence[Tensor]) -> Tensor:
        return (band - targets[0]).square().flatten(1).sum(1)

    @override
    def total(self, bands: Sequence[Tensor], data: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
        return [(4, bands[0].new_zeros(len(bands[0])))]


class Nearby(DataTerm):
    """A user's data term, which brings a tensor of the batch along in its targets, and has no other data."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    @override
    def __len__(self) -> int:
        return len(self.x)

    @override
    def rows(self, rows: slice | Tensor) -> "Nearby":
        return Nearby(self.x[rows])

    @override
    def guess(self, model: HVAE) -> Tensor:
        return self.x

    @override
    def bind(self, model: HVAE, seen: Observation) -> BoundTerm:
        return BoundTerm(Squares(), [], lambda index, *_: [model.decomp.analysis(self.x)[index]])


@pytest.mark.parametrize("schedule", ["scale", "joint"])
def test_targets_with_tensors_of_their_own_are_not_recorded(schedule: str, recordings: list[Recording]) -> None:
    model = few()
    refiner = MAPRefiner(2, schedule=schedule, execution=CudaGraphs())
    for x in (signal(model.decomp, 3), 2 * signal(model.decomp, 3)):
        assert_same(refiner(model, Nearby(x)), MAPRefiner(2, schedule=schedule)(model, Nearby(x)))


@pytest.mark.parametrize("schedule", ["scale", "joint"])
def test_overlapping_bands_are_recorded(schedule: str, recordings: list[Recording]) -> None:
    model = tiny(Pyramid((4,), 1), sigma=0.3)
    x = signal(model.decomp, 3, dtype=torch.float32)
    refiner = MAPRefiner(2, schedule=schedule, execution=CudaGraphs())
    for y in (x, 2 * x):
        assert_same(refiner(model, y), MAPRefiner(2, schedule=schedule)(model, y))
    assert len(recordings) == 1


def test_compiled_pieces_are_recorded(recordings: list[Recording], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.compile", lambda graph, *_: graph)
    model = few()
    x = signal(model.decomp, 3)
    refiner = MAPRefiner(6, schedule="parallel", execution=CudaGraphs(compiled=True))
    for y in (x, 2 * x):
        assert_same(refiner(model, y), MAPRefiner(6, schedule="parallel")(model, y), 1e-9)
    assert len(recordings) == 1


def test_graphs_need_a_gpu() -> None:
    model = few()
    with pytest.raises(ValueError, match="CUDA graphs need a model on a CUDA device, got cpu"):
        MAPRefiner(1, execution="cuda-graphs")(model, signal(model.decomp))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"whole": False}, {"compiled": True}], ids=["whole", "steps", "compiled"])
@pytest.mark.parametrize(
    ("schedule", "rule"), [("scale", "adam"), ("parallel", "adam"), ("joint", "adam"), ("joint", "gauss-newton")]
)
def test_cuda_graphs_give_the_same(schedule: str, rule: str, options: dict[str, bool]) -> None:
    model = few().cuda()
    x = signal(model.decomp, 3).cuda()
    refiner = MAPRefiner(6, schedule=schedule, rule=rule, execution=CudaGraphs(**options))
    for y in (x, 2 * x):
        assert_same(refiner(model, y), MAPRefiner(6, schedule=schedule, rule=rule)(model, y), 1e-7)


@pytest.mark.parametrize("execution", [Eager(threads=1), Eager(threads=2)], ids=["serial", "threads"])
def test_bfloat16_states_its_error(execution: Eager) -> None:
    model = tiny(FFT1Real(4, scales=[1, 4]), sigma=0.3)
    x = signal(model.decomp, 3, dtype=torch.float32)
    full = MAPRefiner(6, schedule="parallel", execution=execution)(model, x)
    low = MAPRefiner(6, schedule="parallel", execution=execution, precision="bfloat16")(model, x)
    assert full.history.rounding is None
    assert 1e-5 < low.history.rounding < 0.05
    assert not torch.equal(low.latents[0], full.latents[0])
    for name in ("reconstruction", "nll", "objective"):
        assert getattr(low, name).dtype == torch.float32
    # The result is decoded in full: its objective is that of its latents.
    decoded = model.decode(low.latents)
    assert_equal([decoded.reconstruction], [low.reconstruction], exactly=False)
    assert low.objective is not None
    assert full.objective is not None
    start = MAPRefiner(0)(model, x).objective
    assert start is not None
    assert bool((low.objective < start).all())


def test_tf32_needs_a_gpu() -> None:
    model = few()
    with pytest.raises(ValueError, match="precision 'tf32' needs a CUDA device, got cpu"):
        MAPRefiner(1, precision="tf32")(model, signal(model.decomp))


def test_pointwise_weights_of_channels_last_models_are_given_plain_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(graph: Any, inputs: list[Tensor], _: Any) -> Any:
        assert all(t.stride() == torch.empty(t.shape).stride() for t in inputs if t.is_contiguous())
        return graph

    monkeypatch.setattr("torch._inductor.compile", compiled)
    model = tiny(Identity(4, 1, [2, 4]))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x, execution = torch.randn(2, 1, 4, 4), Compiled()
    assert_same(MAPRefiner(2, execution=execution)(model, x), MAPRefiner(2)(model, x), 1e-5)
    count = len(execution._compiled)
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    assert_same(MAPRefiner(2, execution=execution)(model, x), MAPRefiner(2)(model, x), 1e-5)
    assert len(execution._compiled) >= count > 0
