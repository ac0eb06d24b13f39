"""Bad input of kinds that belong to no single module's tests: what came and what is allowed is said every time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from separable_hvae import (
    HVAE,
    Decomposition,
    FFT2Complex,
    FFT2Real,
    Identity,
    KnownBands,
    MAPRefiner,
    ScaleHead,
    Wavelet2,
    evaluate,
    fit,
    posterior_draws,
)
from separable_hvae.plots import comparison, convergence, progressive
from separable_hvae.refine import Rule

X = torch.zeros(2, 1, 4, 4)
NO: Any = None


@pytest.fixture(scope="module")
def model() -> HVAE:
    torch.manual_seed(0)
    return HVAE(FFT2Real(4, 1, [2, 4]), layers=2, width=2, bottleneck=2, blocks=0)


class Sizeless(Rule):
    """A rule as someone writes it who has read only half of the page."""

    @override
    def step(self, problem: Any, latents: list[Tensor], sizes: Any, state: Any) -> Any:
        return latents


class Flat(Sizeless):
    """A rule that loses the latents' shape."""

    @override
    def step(self, problem: Any, latents: list[Tensor], sizes: Any, state: Any) -> Any:
        return [z.flatten(1) for z in latents], state


class WrongHead(ScaleHead):
    """A head that returns its context."""

    @override
    def forward(self, context: Tensor) -> Tensor:
        return context


KINDS: dict[str, tuple[Callable[[HVAE], object], type[Exception], str]] = {
    # Built wrongly.
    "an abstract decomposition": (lambda m: Decomposition((8,), 1), TypeError, "abstract"),  # type: ignore[abstract]
    "an abstract head": (lambda m: ScaleHead(NO, 1, width=1, bottleneck=1, blocks=1, gain=1.0), TypeError, "abstract"),  # type: ignore[abstract]
    "size of no kind": (lambda m: FFT2Real(NO), TypeError, r"size must be an int or a sequence of ints, got None"),
    "size as a tensor": (
        lambda m: FFT2Real(torch.tensor([8, 8])),  # type: ignore[arg-type]
        TypeError,
        r"size must be an int or a sequence of ints, got tensor\(\[8, 8\]\)",
    ),
    "four axes": (lambda m: Identity((2, 2, 2, 2)), ValueError, r"size must have one to three axes, got \(2, 2"),
    "channels as a fraction": (lambda m: FFT2Real(8, 1.5), TypeError, r"channels must be integers, got 1\.5"),  # type: ignore[arg-type]
    "scales as a number": (
        lambda m: FFT2Real(8, 1, 8),  # type: ignore[arg-type]
        TypeError,
        r"scales must be a sequence of integers, got 8",
    ),
    "scales as text": (lambda m: FFT2Real(8, 1, "248"), TypeError, r"scales must be .* integers, got '248'"),  # type: ignore[arg-type]
    "no scales": (lambda m: FFT2Real(8, 1, []), ValueError, r"scales must increase, coarse to fine, got \[\]"),
    "a scale twice": (lambda m: FFT2Real(8, 1, [2, 2, 8]), ValueError, r"scales must increase, .*, got \[2, 2, 8\]"),
    "a wavelet's name in capitals": (lambda m: Wavelet2(8, "HAAR"), ValueError, r"wavelet must be a name .*'HAAR'"),
    "a class for a decomposition": (lambda m: HVAE(FFT2Real), TypeError, r"decomp must be a Decomposition, got"),  # type: ignore[arg-type]
    "layers as text": (
        lambda m: HVAE(FFT2Real(8), layers="5"),  # type: ignore[arg-type]
        TypeError,
        r"layers must be an integer or one for each scale, got '5'",
    ),
    "no head": (lambda m: HVAE(FFT2Real(8), head=NO), TypeError, r"head must be a name or .* subclass, got None"),
    # Called wrongly.
    "no signals": (lambda m: m(NO), TypeError, r"x must be a torch\.Tensor, got NoneType"),
    "half of a complex signal": (
        lambda m: FFT2Complex(4).analysis(X),
        TypeError,
        r"x must be complex for FFT2Complex, got torch\.float32",
    ),
    "latents of no kind": (lambda m: m.decode(NO), TypeError, r"latents must be a list .*, got NoneType"),
    "latents as text": (lambda m: m.decode("zz"), TypeError, r"latents\[0\] must be a real tensor or None, got str"),  # type: ignore[arg-type]
    "a scale as text": (
        lambda m: m.decode([torch.zeros(1, 1, 2, 2)], until="4"),  # type: ignore[arg-type]
        ValueError,
        r"scale '4' emits no band; the scales that do are \[2, 4\]",
    ),
    "numbers to calibrate on": (lambda m: m.calibrate([1, 2]), TypeError, r"data must be a torch\.Tensor, got int"),  # type: ignore[list-item]
    "laws in integers": (
        lambda m: m.decomp.check(dtype=torch.int32),
        TypeError,
        r"x must be real floating-point for FFT2Real, got torch\.int32",
    ),
    "laws in too low a precision": (
        lambda m: m.decomp.check(dtype=torch.bfloat16),
        ValueError,
        r"the decomposition breaks \d law\(s\) at tolerance 0\.0001: .*linearity of analysis \(error 0\.00\d",
    ),
    # Refined wrongly.
    "nothing to refine": (lambda m: MAPRefiner(1)(m, NO), TypeError, r"x must be a torch\.Tensor, got NoneType"),
    "no schedule": (lambda m: MAPRefiner(schedule=NO), TypeError, r"schedule must be a name or a Schedule, got None"),
    "no rule": (lambda m: MAPRefiner(rule=NO), TypeError, r"rule must be a name or a Rule, got None"),
    "no loss": (lambda m: MAPRefiner(loss=NO), TypeError, r"loss must be 'l1', 'l2' or a callable, got None"),
    "negative steps of the paper": (lambda m: MAPRefiner.paper(-1), ValueError, r"steps must be at least 0 .*, got -1"),
    "a rule without step sizes": (
        lambda m: MAPRefiner(rule=Sizeless()),
        ValueError,
        r"Sizeless has no default_step and default_joint_step: set them, or pass step_size",
    ),
    "a step that returns its latents alone": (
        lambda m: MAPRefiner(1, 1.0, rule=Sizeless())(m, X),
        TypeError,
        r"MAPRefiner\.step must return \(latents, state\), got list",
    ),
    "a step that reshapes": (
        lambda m: MAPRefiner(1, 1.0, rule=Flat())(m, X),
        ValueError,
        r"MAPRefiner\.step must return latents of shapes \[\(2, 1, 2, 2\), .*\], got \[\(2, 4\)",
    ),
    "a head of the wrong shape": (
        lambda m: HVAE(FFT2Real(4, 1, [2, 4]), width=2, bottleneck=2, head=WrongHead).sample(1),
        ValueError,
        r"WrongHead must give \(B, 1, 9\) at scale 2, got \(1, 2, 2, 2\)",
    ),
    "signals of other channels": (
        lambda m: m.encode(torch.zeros(2, 3, 4, 4)),
        ValueError,
        r"x must have shape \(B, 1, 4, 4\), got \(2, 3, 4, 4\): these need a decomposition with channels=3",
    ),
    "draws of whole signals": (
        lambda m: posterior_draws(m, X, MAPRefiner(1, sample=True), 2),  # type: ignore[arg-type]
        TypeError,
        r"known must be KnownBands or a Measurement, got Tensor",
    ),
    "draws from given latents": (
        lambda m: posterior_draws(
            m, KnownBands.of(X, m.decomp, until=2), MAPRefiner(1, init=m.encode(X).latents, sample=True), 2
        ),
        ValueError,
        r"refiner must start from draws",
    ),
    # Trained and measured wrongly.
    "text to train on": (
        lambda m: fit(m, "x", steps=1, progress=False),  # type: ignore[arg-type]
        TypeError,
        r"data must be a dataset of tensors \(C, \*size\), got an item of str",
    ),
    "an augmentation that crops": (
        lambda m: fit(m, X, steps=1, augment=lambda x, generator: x[..., 1:], progress=False),
        ValueError,
        r"the batch that augment returns must have shape \(B, 1, 4, 4\), got \(2, 1, 4, 3\)",
    ),
    "an augmentation of nothing": (
        lambda m: fit(m, X, steps=1, augment=lambda x, generator: NO, progress=False),
        TypeError,
        r"the batch that augment returns must be a torch\.Tensor, got NoneType",
    ),
    "an augmentation that overflows": (
        lambda m: fit(m, X, steps=1, augment=lambda x, generator: x / 0, progress=False),
        ValueError,
        r"the batch that augment returns must be finite, got NaN or infinity",
    ),
    "steps as a flag": (lambda m: fit(m, X, steps=True), TypeError, r"steps must be an integer, got True"),
    "epochs": (lambda m: fit(m, X, epochs=1), TypeError, r"unexpected keyword argument 'epochs'"),  # type: ignore[call-arg]
    "NaN to evaluate": (lambda m: evaluate(m, X / 0), ValueError, r"must be finite, got NaN or infinity"),
    # Shown wrongly.
    "signals of one axis as pictures": (
        lambda m: comparison(X[:, :, 0], {"a": X[:, :, 0]}),
        ValueError,
        r"originals must hold signals \(B, C, H, W\), got shape \(2, 1, 4\)",
    ),
    "no pictures": (lambda m: comparison(X[:0], {"a": X}), ValueError, r"originals must hold .* shape \(0, 1, 4, 4\)"),
    "pictures of integers": (
        lambda m: comparison(X.byte(), {"a": X}),
        TypeError,
        r"originals must be real floating-point or complex, got torch\.uint8",
    ),
    "arrays as pictures": (lambda m: comparison(X.numpy(), {"a": X}), TypeError, r"originals must be a Tensor, got nd"),  # type: ignore[arg-type]
    "NaN as pictures": (lambda m: comparison(X / 0, {"a": X}), ValueError, r"originals must be finite, got NaN or inf"),
    "fewer reconstructions": (
        lambda m: comparison(X, {"a": X[:1]}),
        ValueError,
        r"reconstructions\['a'\] must have the originals' shape \(2, 1, 4, 4\), got \(1, 1, 4, 4\)",
    ),
    "complex reconstructions": (
        lambda m: comparison(X, {"a": X + 0j}),
        TypeError,
        r"reconstructions\['a'\] must be real or complex as the originals are, torch\.float32, got torch\.complex64",
    ),
    "a result as a reconstruction": (
        lambda m: comparison(X, {"a": m(X)}),
        TypeError,
        r"reconstructions\['a'\] must be a Tensor, got Result",
    ),
    "reconstructions without names": (
        lambda m: comparison(X, X),  # type: ignore[arg-type]
        TypeError,
        r"reconstructions must be a Mapping, got Tensor",
    ),
    "no reconstructions": (lambda m: comparison(X, {}), ValueError, r"reconstructions must hold at least one batch"),
    "a model for a decomposition": (
        lambda m: progressive(m, [], X),  # type: ignore[arg-type]
        TypeError,
        r"decomp must be a Decomposition, got HVAE",
    ),
    "too few bands": (
        lambda m: progressive(m.decomp, m.decomp.analysis(X)[:1], X),
        ValueError,
        r"bands must hold one tensor for each of the scales \(2, 4\), got 1",
    ),
    "bands of more signals": (
        lambda m: progressive(m.decomp, m.decomp.analysis(X), X[:1]),
        ValueError,
        r"the sum of bands must have the originals' shape \(1, 1, 4, 4\), got \(2, 1, 4, 4\)",
    ),
    "a history without a name": (lambda m: convergence(NO), TypeError, r"histories must be a Mapping, got NoneType"),
    "no histories": (lambda m: convergence({}), ValueError, r"histories must hold at least one history, got none"),
    "the history of an amortized result": (
        lambda m: convergence({"a": m.encode(X).history}),
        TypeError,
        r"histories\['a'\] must be a History, got NoneType",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), KINDS.values(), ids=KINDS)
def test_bad_input(model: HVAE, call: Callable[[HVAE], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call(model)
