from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

from separable_hvae import (
    HVAE,
    ClassCondition,
    Condition,
    Decomposition,
    FFT1Real,
    FFT2Complex,
    FFT3Real,
    Identity,
    SignalCondition,
    VectorCondition,
    Wavelet2,
)
from separable_hvae.functional import pack
from tests.helpers.models import reach_every_parameter, seeded, tiny
from tests.helpers.zoo import signal


class Temperature(Condition):
    """A number of each sample, the same at every scale: a user's own condition."""

    def __init__(self, gain: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__(dropout=dropout)
        self.gain = gain

    @override
    def build(self, decomp: Decomposition, *, width: int, bottleneck: int, blocks: int, gain: float) -> None:
        self.scales, self.dims = len(decomp.scales), decomp.dims
        self.weight = nn.Parameter(self.gain * torch.ones(width))

    @override
    def check(self, condition: Any, batch: int) -> Tensor:
        if not isinstance(condition, Tensor) or condition.shape != (batch,):
            raise ValueError("condition must be one number for each sample")
        return condition.to(self.weight)

    @override
    def forward(self, condition: Tensor) -> list[Tensor]:
        activation = (condition[:, None] * self.weight)[(...,) + (None,) * self.dims]
        return [activation] * self.scales


def labels(n: int, *_: int) -> Tensor:
    return torch.arange(n) % 4


def vectors(n: int, *_: int) -> Tensor:
    return torch.randn(n, 5, generator=seeded(7))


def frames(n: int, *size: int) -> Tensor:
    return torch.randn(n, 2, *size, generator=seeded(8))


KINDS: dict[str, tuple[Callable[[float], Condition], Callable[..., Any]]] = {
    "class": (lambda dropout: ClassCondition(4, dropout=dropout), labels),
    "vector": (lambda dropout: VectorCondition(5, dropout=dropout), vectors),
    "signal": (lambda dropout: SignalCondition(2, dropout=dropout), frames),
    "own": (lambda dropout: Temperature(0.5, dropout=dropout), lambda n, *_: torch.linspace(-1, 1, n)),
}
DECOMPOSITIONS: dict[str, Callable[[], Decomposition]] = {
    "fft1": lambda: FFT1Real(8),
    "complex": lambda: FFT2Complex(4),
    "haar": lambda: Wavelet2((4, 8), channels=2),
    "identity": lambda: Identity(4, channels=1),
    "volumes": lambda: FFT3Real(4),
}


def conditional(make: Callable[[], Decomposition], kind: str, dropout: float = 0.0, **options: Any) -> HVAE:
    return tiny(make(), condition=KINDS[kind][0](dropout), **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", DECOMPOSITIONS.values(), ids=DECOMPOSITIONS)
def test_every_part_is_learned_and_every_pass_takes_it(make: Callable[[], Decomposition], kind: str) -> None:
    model = conditional(make, kind, dropout=0.5).train()
    x = signal(model.decomp, 16, torch.float32)
    c = KINDS[kind][1](16, *model.decomp.size)
    assert model.condition is not None
    result = model(x, seeded(), condition=c)
    reach_every_parameter(model.condition, [result.elbo])
    model.eval()
    with torch.no_grad():
        assert model.encode(x, condition=c).kl is not None
        assert model.decode(result.latents, condition=c).reconstruction.shape == x.shape
        assert model.sample(16, generator=seeded(), condition=c).shape == x.shape
        assert model.sample(16, generator=seeded(), condition=None).shape == x.shape
        assert model.loss(x, seeded(), condition=c).ndim == 0
        # What it says is heard by priors and posteriors.
        other = c.flip(0)
        here, there = (model.encode(x, condition=t) for t in (c, other))
        assert not torch.allclose(here.nll, there.nll)
        assert not torch.allclose(here.latents[0], there.latents[0])


def test_the_activation_is_added_where_a_scale_begins() -> None:
    model = tiny(FFT1Real(8, scales=[1, 3, 8]), layers=[2, 1, 2], condition=ClassCondition(4))
    assert isinstance(model.condition, ClassCondition)
    tables = [nn.init.normal_(e.weight, generator=seeded(i)) for i, e in enumerate(model.condition.embeddings)]  # type: ignore[arg-type]
    c, plain = labels(3), tiny(FFT1Real(8, scales=[1, 3, 8]), layers=[2, 1, 2])
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("condition.")})
    with torch.no_grad():
        passes = model.decoder([None] * 5, 3, None, model.conditions(c, 3), temperature=0.0)
        context = plain.start.expand(3, *plain.start.shape[1:])
        for place, (subset, step) in enumerate(zip(plain.subsets, passes, strict=True)):
            context = torch.nn.functional.interpolate(context, size=subset.layers[0].grid, mode="linear")
            wanted = subset(context + tables[place][c][..., None], [None] * len(subset.scales), temperature=0.0)
            torch.testing.assert_close(step.band, wanted.band)
            torch.testing.assert_close(step.latents, wanted.latents)
            context = step.context


def test_a_model_begins_as_without_its_classes() -> None:
    x = signal(FFT1Real(8), 3, torch.float32)
    torch.manual_seed(0)
    plain = HVAE(FFT1Real(8), layers=2, width=6, bottleneck=4, blocks=1)
    torch.manual_seed(0)
    model = HVAE(FFT1Real(8), layers=2, width=6, bottleneck=4, blocks=1, condition=ClassCondition(3))
    with torch.no_grad():
        torch.testing.assert_close(model.encode(x, condition=1).latents, plain.encode(x).latents, rtol=0, atol=0)


@pytest.mark.parametrize("make", DECOMPOSITIONS.values(), ids=DECOMPOSITIONS)
def test_bands_are_predicted_around_a_signal(make: Callable[[], Decomposition]) -> None:
    decomp = make()
    channels, is_complex = decomp.channels, decomp.is_complex
    condition = SignalCondition(channels, is_complex=is_complex, around=True, dropout=0.5)
    model = tiny(decomp, condition=condition).double()
    x = signal(decomp, 6)
    model.calibrate(x + 3)
    with torch.no_grad():
        for subset in model.subsets:
            for parameter in subset.head.parameters():
                parameter.zero_()
        # With heads that say nothing, signals are the condition, or the mean of the data where it is not known.
        torch.testing.assert_close(model.encode(x, condition=2 * x).reconstruction, 2 * x)
        mean = (x + 3).mean(0, keepdim=True).expand_as(x)
        torch.testing.assert_close(model.encode(x, condition=None).reconstruction, mean)
        found = model.train().encode(x, condition=2 * x, generator=seeded(1)).reconstruction
        ends = [pack(found - y).flatten(1).abs().amax(1) < 1e-9 for y in (2 * x, mean)]
        assert bool((ends[0] ^ ends[1]).all())
        assert 0 < int(ends[0].sum()) < 6


def test_posteriors_see_what_the_condition_leaves() -> None:
    model = tiny(FFT1Real(8), condition=SignalCondition(1, around=True))
    x = signal(model.decomp, 3, torch.float32)
    model.calibrate(torch.cat([x, 5 * x + 1]))
    conditions = model.conditions(0.3 * x, 3)
    assert conditions is not None
    seen = model.observe(x)
    for i, (subset, own) in enumerate(zip(model.subsets, conditions, strict=True)):
        target = model.decoder.evidence(i, seen, [], own).target
        torch.testing.assert_close(target, 0.7 * model.decomp.analysis(x)[i] / subset.unit)


def test_signals_of_another_size_are_resampled() -> None:
    model = tiny(Wavelet2(8, channels=1), condition=SignalCondition(1, around=True))
    small = torch.full((2, 1, 4, 4), 0.7)
    features = model.condition.embed(small, 2)  # type: ignore[union-attr]
    torch.testing.assert_close(features.mean, torch.full((2, 1, 8, 8), 0.7))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout(kind: str) -> None:
    model = conditional(lambda: FFT1Real(8), kind, dropout=0.3).train()
    assert model.condition is not None
    c = KINDS[kind][1](4000, 8)
    features = model.condition.embed(c, 4000, seeded())
    assert features.known is not None
    assert abs(float(features.known.float().mean()) - 0.7) < 0.03
    unknown = model.condition.embed(None, 4000).activations
    known = model.eval().condition.embed(c, 4000, seeded())  # type: ignore[union-attr]
    assert known.known is None
    rows = features.known[:, None, None]
    for drawn, all_known, none in zip(features.activations, known.activations, unknown, strict=True):
        torch.testing.assert_close(drawn, torch.where(rows, all_known, none).expand_as(drawn))


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind: str, tmp_path: Path) -> None:
    model = conditional(lambda: FFT1Real(8), kind, dropout=0.25).eval()
    x = signal(model.decomp, 3, torch.float32)
    c = KINDS[kind][1](3, 8)
    model.save_pretrained(tmp_path)
    again = HVAE.from_pretrained(tmp_path, classes=[Temperature])
    assert type(again.condition) is type(model.condition)
    assert again.condition.config() == model.condition.config()  # type: ignore[union-attr]
    for given in (c, None):
        here, there = (m.encode(x, condition=given).reconstruction for m in (model, again))
        assert torch.equal(here, there)
    if kind == "own":
        with pytest.raises(ValueError, match=r"pass it as classes=\[Temperature\]"):
            HVAE.from_pretrained(tmp_path)


BAD: list[tuple[str, Any, type[Exception], str]] = [
    ("class", None, ValueError, "condition must be given, got None"),
    ("class", torch.tensor([0, 4, 1]), ValueError, "classes from 0 to 3, got 0 to 4"),
    ("class", torch.tensor([0, -1, 1]), ValueError, "classes from 0 to 3, got -1 to 1"),
    ("class", torch.tensor([0, 1]), ValueError, r"shape \(3,\), one for each sample, got \(2,\)"),
    ("class", torch.zeros(3), TypeError, "tensor of integers, the classes, got torch.float32"),
    ("class", [0, 1, 2], TypeError, "tensor of integers, the classes, got list"),
    ("vector", torch.zeros(3, 4), ValueError, r"shape \(3, 5\), one for each sample, got \(3, 4\)"),
    ("vector", torch.zeros(3, 5).long(), TypeError, "real floating-point tensor, the vectors, got torch.int64"),
    ("vector", torch.full((3, 5), torch.nan), ValueError, "condition must be finite"),
    ("signal", torch.zeros(3, 1, 8), ValueError, r"shape \(3, 2, \*\), got \(3, 1, 8\)"),
    ("signal", torch.zeros(2, 2, 8), ValueError, r"shape \(3, 2, 8\), one for each sample, got \(2, 2, 8\)"),
    ("signal", torch.zeros(3, 2, 8, dtype=torch.complex64), TypeError, "real floating-point tensor, the signals"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "given", "error", "message"), BAD)
def test_bad_conditions(kind: str, given: Any, error: type[Exception], message: str) -> None:
    model = conditional(lambda: FFT1Real(8), kind)
    x = signal(model.decomp, 3, torch.float32)
    for call in (
        lambda: model(x, condition=given),
        lambda: model.encode(x, condition=given),
        lambda: model.loss(x, condition=given),
        lambda: model.decode([torch.zeros(3, *model.latent_shapes[0])], condition=given),
        lambda: model.sample(3, condition=given),
    ):
        with pytest.raises(error, match=message):
            call()


def test_other_mistakes() -> None:
    model = tiny(FFT1Real(8))
    x: Any = signal(model.decomp, 3, torch.float32)
    with pytest.raises(ValueError, match="condition must be None for a model without one, got a Tensor of shape"):
        model.encode(x, condition=labels(3))
    bad: Any
    for bad in (ClassCondition, 10, "class"):
        with pytest.raises(TypeError, match="condition must be a Condition, such as ClassCondition"):
            HVAE(FFT1Real(8), condition=bad)
    with pytest.raises(ValueError, match=r"must have the 1 real channels .* got 2 real"):
        HVAE(FFT1Real(8), condition=SignalCondition(2, around=True))
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1"):
        ClassCondition(3, dropout=1.0)


def test_classes_are_learned() -> None:
    # Two classes that are two waves: given its class alone, the mean of the model is the class's wave.
    waves = torch.stack([torch.ones(8), torch.tensor([1.0, -1.0]).repeat(4)])[:, None]
    torch.manual_seed(0)
    model = HVAE(
        FFT1Real(8), layers=1, width=8, bottleneck=4, blocks=1, sigma=0.1, condition=ClassCondition(2, dropout=0.2)
    )
    classes = torch.arange(64) % 2
    x = waves[classes] + 0.02 * torch.randn(64, 1, 8, generator=seeded())
    model.calibrate(x)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(300):
        optimizer.zero_grad()
        model.loss(x, seeded(step), condition=classes).backward()
        optimizer.step()
    model.eval()
    for label in (0, 1):
        drawn = model.sample(32, generator=seeded(), condition=label)
        assert float((drawn.mean(0) - waves[label]).abs().max()) < 0.15
    unknown = model.sample(200, generator=seeded())
    nearest = ((unknown[:, None] - waves).square().mean((2, 3))).argmin(1)
    assert 40 < int(nearest.sum()) < 160
