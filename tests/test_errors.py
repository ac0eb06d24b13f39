"""Bad input of kinds that belong to no single module's tests: what came and what is allowed is said every time."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset
from typing_extensions import override

from separable_hvae import (
    HVAE,
    Decomposition,
    FFT2Complex,
    FFT2Real,
    Identity,
    KnownBands,
    MAPRefiner,
    Measurement,
    ScaleHead,
    Signal,
    Wavelet2,
    evaluate,
    fit,
    masks_of,
    posterior_draws,
)
from separable_hvae.plots import comparison, convergence, progressive
from separable_hvae.refine import Adam, Chain, GaussNewton, Latent, Rule

X = torch.zeros(2, 1, 4, 4)
MANY = torch.ones(3, 1, 4, 4)
NO: Any = None
TEXT: Any = "text"
LIST: Any = [2]
ONE: Any = 1
ARRAY: Any = X.numpy()


@pytest.fixture(scope="module")
def model() -> HVAE:
    torch.manual_seed(0)
    return HVAE(FFT2Real(4, 1, [2, 4]), layers=2, width=2, bottleneck=2, blocks=0)


def half(x: torch.Tensor) -> torch.Tensor:
    return x[..., :2]


def known(m: HVAE) -> KnownBands:
    return KnownBands(m.decomp.analysis(X)[:1])


def measured(**options: Any) -> Measurement:
    return Measurement(half(X), half, **{"noise": 0.1, **options})


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


class NoBands(Identity):
    """A decomposition that gives a band too few."""

    @override
    def analysis(self, x: Tensor) -> list[Tensor]:
        return []


class Arrays(Identity):
    """A decomposition that computes with numpy."""

    @override
    def analysis(self, x: Tensor) -> Any:
        return [x.numpy()]


def tiny(decomp: Decomposition) -> HVAE:
    return HVAE(decomp, layers=1, width=2, bottleneck=2, blocks=0)


KINDS: dict[str, tuple[Callable[[HVAE], object], type[Exception], str]] = {
    # Built wrongly.
    "an abstract decomposition": (lambda m: Decomposition((8,), 1), TypeError, "abstract"),  # type: ignore[abstract]
    "an abstract head": (lambda m: ScaleHead(NO, 1, width=1, bottleneck=1, blocks=1, gain=1.0), TypeError, "abstract"),  # type: ignore[abstract]
    "size of no kind": (lambda m: FFT2Real(NO), TypeError, r"size must be an int or a sequence of ints, got None"),
    "size as a tensor": (
        lambda m: FFT2Real(torch.tensor([8, 8])),  # type: ignore[arg-type]
        TypeError,
        r"size must be an int or a sequence of ints, got a Tensor of shape \(2,\), torch.int64$",
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
    "a flag as text": (lambda m: Identity(4, is_complex=TEXT), TypeError, r"is_complex must be True or False, got 'te"),
    "band_input as text": (
        lambda m: HVAE(FFT2Real(8), band_input=TEXT),
        TypeError,
        r"band_input must be True or False, got 'text'",
    ),
    "a sigma out of range": (
        lambda m: HVAE(FFT2Real(8), sigma=1e-5),
        ValueError,
        r"sigma must be between 0\.0001 and 100, got 1e-05: rescale the data",
    ),
    "a flag for a number": (
        lambda m: HVAE(FFT2Real(8), width=np.True_),  # type: ignore[arg-type]
        TypeError,
        r"width must be an integer, got (np\.)?True",
    ),
    "scales as fractions in an array": (
        lambda m: FFT2Real(8, 1, np.array([2.0, 8.0])),  # type: ignore[arg-type]
        TypeError,
        r"scales must be integers, got 2\.0",
    ),
    "layers as an array of the wrong length": (
        lambda m: HVAE(FFT2Real(8), layers=np.array([1, 2])),  # type: ignore[arg-type]
        ValueError,
        r"layers must be one number or one for each of the 4 scales, got 2",
    ),
    # Called wrongly.
    "a band too few": (
        lambda m: tiny(NoBands(4, 1))(X),
        ValueError,
        r"NoBands breaks its contract: analysis gives \[\], band_shape says \[\(1, 4, 4\)\]",
    ),
    "bands of numpy": (
        lambda m: tiny(Arrays(4, 1)).calibrate(X),
        ValueError,
        r"Arrays breaks .* analysis gives \['ndarray: make it a tensor with torch.from_numpy'\], band_shape says",
    ),
    "bands of numpy, checked": (lambda m: Arrays(4, 1).check(), ValueError, r"band shapes: analysis gives \['ndarray"),
    "a seed for a generator": (lambda m: m(X, 3), TypeError, r"generator must be a torch\.Generator or None, got 3"),
    "a seed to sample with": (lambda m: m.sample(2, generator=ONE), TypeError, r"generator must be .* or None, got 1"),
    "a device for a generator": (
        lambda m: m.encode(X, generator=TEXT),
        TypeError,
        r"generator must be a torch\.Generator or None, got 'text'",
    ),
    "a temperature as text": (lambda m: m.sample(2, temperature=TEXT), TypeError, r"temperature must be a number, got"),
    "a temperature for each layer": (lambda m: m.encode(X, temperature=LIST), TypeError, r"temperature must be a num"),
    "a weight that is none": (lambda m: m.loss(X, kl_weight=NO), TypeError, r"kl_weight must be a number, got None"),
    "a weight below zero": (
        lambda m: m.loss(X, kl_weight=-1.0),
        ValueError,
        r"kl_weight must be at least 0 and finite, got -1",
    ),
    "latents of no sample": (
        lambda m: m.decode([torch.zeros(0, 1, 2, 2)]),
        ValueError,
        r"latents\[0\] must hold at least one sample, got shape \(0, 1, 2, 2\)",
    ),
    "latents elsewhere": (
        lambda m: m.decode([torch.zeros(1, 1, 2, 2, device="meta")]),
        ValueError,
        r"latents\[0\] is on meta, the model on cpu",
    ),
    "scales for a scale": (
        lambda m: m.decode([torch.zeros(1, 1, 2, 2)], until=LIST),
        ValueError,
        r"scale \[2\] emits no band; the scales that do are \[2, 4\]",
    ),
    "bands here and there": (
        lambda m: m.decomp.synthesis([h.to(d) for h, d in zip(m.decomp.analysis(X), ("cpu", "meta"), strict=True)]),
        ValueError,
        r"bands must be on one device, got cpu and meta",
    ),
    "nothing to calibrate on": (
        lambda m: m.calibrate(NO),
        TypeError,
        r"data must be a tensor \(N, C, \*size\) or an iterable of such batches, got NoneType",
    ),
    "a number to calibrate on": (
        lambda m: m.calibrate(torch.tensor(1.0)),
        ValueError,
        r"data must have shape \(B, 1, 4, 4\), got \(\)",
    ),
    "a law's tolerance as text": (lambda m: m.decomp.check(tolerance=TEXT), TypeError, r"tolerance must be a number"),
    "a law's dtype as text": (lambda m: m.decomp.check(dtype=TEXT), TypeError, r"dtype must be a dtype, got str"),
    # Saved and loaded wrongly.
    "no folder to save to": (lambda m: m.save_pretrained(NO), TypeError, r"folder must be a path, got None"),
    "a file to save to": (
        lambda m: m.save_pretrained(__file__),
        ValueError,
        rf"folder must be a folder, got the file {re.escape(__file__)}",
    ),
    "nothing to load": (lambda m: HVAE.from_pretrained(NO), TypeError, r"source must be a path, got None"),
    "one class, not a sequence": (
        lambda m: HVAE.from_pretrained(".", classes=WrongHead),  # type: ignore[arg-type]
        TypeError,
        r"classes must be a sequence of classes, got <class '.*WrongHead'>",
    ),
    "a device that is none": (
        lambda m: HVAE.from_pretrained(".", device="gpu"),
        ValueError,
        r"device must be one that torch has on this machine, got 'gpu': Expected one of cpu",
    ),
    "trust as text": (
        lambda m: HVAE.from_pretrained(".", trust_import_paths=TEXT),
        TypeError,
        r"trust_import_paths must be True or False, got 'text'",
    ),
    "no signals": (lambda m: m(NO), TypeError, r"x must be a torch\.Tensor, got NoneType"),
    "an array of signals": (
        lambda m: m.encode(ARRAY),
        TypeError,
        r"x must be a torch\.Tensor, got ndarray: make it a tensor with torch\.from_numpy$",
    ),
    "an array of latents": (
        lambda m: m.decode([ARRAY]),
        TypeError,
        r"latents\[0\] must be a real tensor or None, got ndarray: make it a tensor with torch\.from_numpy$",
    ),
    "an array for a band": (
        lambda m: m.decomp.synthesis([ARRAY]),
        TypeError,
        r"the band at scale 2 must be a real tensor, got ndarray: make it a tensor with torch\.from_numpy$",
    ),
    "arrays to calibrate on": (
        lambda m: m.calibrate(ARRAY),
        TypeError,
        r"data must be a torch\.Tensor, got ndarray: make it a tensor with torch\.from_numpy$",
    ),
    "an array to refine": (
        lambda m: MAPRefiner(1)(m, ARRAY),
        TypeError,
        r"x must be a .*, got ndarray",
    ),
    "an array as a signal": (
        lambda m: Signal(ARRAY),
        TypeError,
        r"x must be a Tensor, got ndarray: make it a tensor with torch\.from_numpy$",
    ),
    "an array of measurements": (
        lambda m: Measurement(ARRAY, half, 0.1),
        TypeError,
        r"y must be a real or complex tensor, got ndarray: make it a tensor with torch\.from_numpy$",
    ),
    "an array as a known band": (
        lambda m: KnownBands([ARRAY]),
        TypeError,
        r"bands\[0\] must be a real tensor or None, got ndarray: make it a tensor with torch\.from_numpy$",
    ),
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
    "numbers to calibrate on": (lambda m: m.calibrate([1, 2]), TypeError, r"data must be a torch\.Tensor, got int"),
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
    "an operator that keeps a tensor of each sample": (
        lambda m: MAPRefiner(1, batch_size=2)(m, Measurement(MANY, lambda x: x * MANY, 0.1)),
        TypeError,
        r"operator cannot take torch.float32 \(2, 1, 4, 4\): .*; put what differs by sample into given=$",
    ),
    "the same for a single one": (
        lambda m: Measurement(MANY, lambda x: x * MANY, 0.1).rows(slice(0, 1)).guess(m),
        ValueError,
        r"operator gives shape \(3, .* but y has \(1, 1, 4, 4\); put what differs by sample into given=$",
    ),
    "an operator that gives no numbers": (
        lambda m: Measurement(X, lambda x: x / x.norm(), 0.1).guess(m),
        ValueError,
        r"the operator's output, on zeros and on random signals, must be finite, got NaN or infinity$",
    ),
    "what is given as an array": (
        lambda m: measured(given=[ARRAY]),
        ValueError,
        r"given\[0\] must be a tensor of 2 samples, batch first, got ndarray: make it a tensor with torch.from_numpy$",
    ),
    "signals with labels": (
        lambda m: fit(m, TensorDataset(X, X), steps=1),
        TypeError,
        r"data gives pairs .*, but the model takes no condition: keep the signals alone, item\[0\], or build it",
    ),
    "a loss beside a data term": (
        lambda m: MAPRefiner.paper()(m, measured()),
        ValueError,
        r"got absolute_error beside a Measurement\. Leave loss out \(MAPRefiner\.paper sets one: use MAPRefiner\), or",
    ),
    "a rule's class": (
        lambda m: MAPRefiner(rule=Adam),  # type: ignore[arg-type]
        TypeError,
        r"rule must be a name or a Rule, got the class Adam: call it, Adam\(…\)$",
    ),
    "a temperature for each pixel": (
        lambda m: m.sample(2, temperature=torch.ones(9, 9)),  # type: ignore[arg-type]
        TypeError,
        r"temperature must be a number, got a Tensor of shape \(9, 9\), torch.float32$",
    ),
    "no rule": (lambda m: MAPRefiner(rule=NO), TypeError, r"rule must be a name or a Rule, got None"),
    "no loss": (lambda m: MAPRefiner(loss=NO), TypeError, r"loss must be 'likelihood', .* or a callable, got None"),
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
        r"known must be a DataTerm, got Tensor",
    ),
    "draws from given latents": (
        lambda m: posterior_draws(
            m, KnownBands.of(X, m.decomp, until=2), MAPRefiner(1, init=m.encode(X).latents, sample=True), 2
        ),
        ValueError,
        r"refiner must start from draws",
    ),
    "a sample that is no flag": (lambda m: MAPRefiner(sample=TEXT), TypeError, r"sample must be True or False, got"),
    "a class for a loss": (
        lambda m: MAPRefiner(loss=torch.nn.MSELoss),  # type: ignore[arg-type]
        TypeError,
        r"loss must be 'likelihood', 'l2', 'l1' or a callable, got <class 'torch\.nn.*MSELoss'>",
    ),
    "a loss without gradient": (
        lambda m: MAPRefiner(1, loss=lambda a, b: (a - b).detach().square().flatten(1).sum(1))(m, X),
        ValueError,
        r"loss must be differentiable: what it returned does not depend on h_hat for autograd",
    ),
    "a seed to refine with": (lambda m: MAPRefiner(1)(m, X, ONE), TypeError, r"generator must be .* or None, got 1"),
    "a callback as text": (
        lambda m: MAPRefiner(1)(m, X, callback=TEXT),
        TypeError,
        r"callback must be a callable \(iterate\) -> None, got 'text'",
    ),
    "too few latents to start from": (
        lambda m: MAPRefiner(1, init=m.encode(X).latents[:2])(m, X),
        ValueError,
        r"init must hold 4 tensors, one for each layer, for 2 signals, got 2 for 2 signals",
    ),
    "one beta": (lambda m: Adam(betas=0.9), TypeError, r"betas must be two numbers, got 0\.9"),  # type: ignore[arg-type]
    "a beta of one": (lambda m: Adam(betas=(0.9, 1.0)), ValueError, r"betas must be in \[0, 1\), got 1\.0"),
    "a negative eps": (lambda m: Adam(eps=-1.0), ValueError, r"eps must be positive and finite, got -1\.0"),
    "a rule's name within a rule": (lambda m: GaussNewton(local=TEXT), TypeError, r"local must be a Rule, got str"),
    "own_prior as text": (lambda m: Latent(own_prior=TEXT), TypeError, r"own_prior must be True or False, got 'text'"),
    "a chain of names": (
        lambda m: Chain("scale", "joint"),  # type: ignore[arg-type]
        TypeError,
        r"Chain takes pairs of a schedule and its share of the steps, got \('scale', 'joint'\)",
    ),
    "a share as text": (
        lambda m: Chain(("scale", TEXT)),
        TypeError,
        r"share of the steps must be a number, got 'text'",
    ),
    # Known and measured wrongly.
    "no signal": (lambda m: Signal(NO), TypeError, r"x must be a Tensor, got NoneType"),
    "a signal with an unknown loss": (
        lambda m: Signal(X, TEXT),
        ValueError,
        r"loss must be 'likelihood', 'l2', 'l1' or a callable",
    ),
    "no bands": (lambda m: KnownBands(NO), TypeError, r"bands must be a sequence of tensors and None, got NoneType"),
    "one band, not a sequence": (
        lambda m: KnownBands(X),  # type: ignore[arg-type]
        TypeError,
        r"bands must be a sequence of tensors and None, got Tensor",
    ),
    "bands by scale": (
        lambda m: KnownBands({2: X}),  # type: ignore[arg-type]
        TypeError,
        r"bands must be a sequence of tensors and None, got dict",
    ),
    "a complex band": (
        lambda m: KnownBands([X + 0j]),
        TypeError,
        r"bands\[0\] must be a real tensor or None, got torch\.complex64",
    ),
    "a band of no sample": (
        lambda m: KnownBands([torch.tensor(1.0)]),
        ValueError,
        r"bands\[0\] must hold at least one sample, batch first, got shape \(\)",
    ),
    "no projection": (lambda m: masks_of(m.decomp, NO), TypeError, r"project must be a callable \(signals\) -> signal"),
    "masks of a model": (
        lambda m: masks_of(m, half),  # type: ignore[arg-type]
        TypeError,
        r"decomp must be a Decomposition, got HVAE",
    ),
    "no signals to correct": (lambda m: known(m).correct(m, NO), TypeError, r"x must be a torch\.Tensor, got NoneType"),
    "fewer signals to correct": (
        lambda m: known(m).correct(m, X[:1]),
        ValueError,
        r"x must hold 2 signals, as many as are known, got 1",
    ),
    "noise as text": (
        lambda m: measured(noise="gauss"),
        TypeError,
        r"noise must be a Noise or a standard deviation, got 'gauss'",
    ),
    "an adjoint as text": (lambda m: measured(adjoint="A"), TypeError, r"adjoint must be a callable .*, got 'A'"),
    "linear as text": (lambda m: measured(linear="no"), TypeError, r"linear must be True or False, got 'no'"),
    "stacked as text": (lambda m: measured(stacked="no"), TypeError, r"stacked must be True or False, got 'no'"),
    "one mask, not a sequence": (lambda m: measured(given=X), TypeError, r"given must be a sequence of tensors, got T"),
    "a start of no kind": (lambda m: measured(start=3), TypeError, r"start must be a Tensor, got int"),
    "fills for a fill": (lambda m: measured(fill=["bands"]), ValueError, r"fill must be one of .*, got \['bands'\]"),
    "cropped signals to correct": (
        lambda m: measured().correct(m, half(X)),
        ValueError,
        r"x must have shape \(B, 1, 4, 4\), got \(2, 1, 4, 2\)",
    ),
    "NaN to correct": (lambda m: measured().correct(m, X / 0), ValueError, r"x must be finite, got NaN or infinity"),
    "a seed to correct with": (
        lambda m: measured().correct(m, X, ONE),
        TypeError,
        r"generator must be a torch\.Generator or None, got 1",
    ),
    "draws by a class": (
        lambda m: posterior_draws(m, known(m), MAPRefiner, 2),  # type: ignore[arg-type]
        TypeError,
        r"refiner must be a Refiner, got the class MAPRefiner",
    ),
    "draws as text": (
        lambda m: posterior_draws(m, known(m), MAPRefiner(1, sample=True), TEXT),
        TypeError,
        r"n must be an integer, got 'text'",
    ),
    # Trained and measured wrongly.
    "text to train on": (
        lambda m: fit(m, "x", steps=1, progress=False),
        TypeError,
        r"data must be a tensor \(N, C, \*size\), .*, or an iterable of batches, got str",
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
    "signals without axes as pictures": (
        lambda m: comparison(X[:, :, 0, 0], {"a": X[:, :, 0, 0]}),
        ValueError,
        r"originals must hold signals \(B, C, \*size\) of one to three axes, got shape \(2, 1\)",
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
    "a band missing between others": (
        lambda m: progressive(m.decomp, [NO, m.decomp.analysis(X)[1]], X),
        ValueError,
        r"bands must hold tensors alone, got None: finer ones are left out at the end",
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


def test_refiners_name_their_settings() -> None:
    assert repr(MAPRefiner({2: 3, 4: 5}, loss=torch.dist, init=[X, X], batch_size=2)) == (
        "MAPRefiner(steps={2: 3, 4: 5}, guidance=1.0, loss=dist, init=[2 tensors], sample=False, batch_size=2, "
        "schedule=Scale, execution=Eager, rule=Adam)"
    )


@pytest.mark.parametrize(("call", "kind", "message"), KINDS.values(), ids=KINDS)
def test_bad_input(model: HVAE, call: Callable[[HVAE], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call(model)
