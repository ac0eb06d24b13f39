"""torch's default device: models are built on it, and work whatever it is.

Every tensor that the package makes without saying where would be on the default device. The meta device, which
holds no numbers, stands for any that differs from the model's: reading such a tensor, or mixing it with others,
is an error.
"""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from separable_hvae import (
    HVAE,
    FFT2Real,
    KnownBands,
    MAPRefiner,
    Measurement,
    Wavelet2,
    evaluate,
    fit,
    masks_of,
    posterior_draws,
)
from tests.helpers.zoo import SMALL, Make

X = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
META = torch.device("meta")


@pytest.fixture(autouse=True)
def _first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def build(make: Make) -> HVAE:
    torch.manual_seed(0)
    return HVAE(make(), layers=1, width=4, bottleneck=4, blocks=1)


def devices(model: torch.nn.Module) -> set[str]:
    return {t.device.type for t in [*model.parameters(), *model.buffers()]}


@pytest.mark.parametrize("name", [name for name in SMALL if name != "own-dct"])  # Whose shapes depend on numbers.
def test_models_are_built_on_the_default_device(name: str) -> None:
    with META:
        model = build(make := SMALL[name])
    assert devices(model) == {"meta"}
    # Wherever the decomposition comes from, the model's own is where the model is.
    decomp = make()
    with META:
        assert devices(HVAE(decomp, layers=1, width=4, bottleneck=4, blocks=0)) == {"meta"}
    assert "meta" not in devices(decomp)


@pytest.fixture(params=[lambda: FFT2Real(8, 1), lambda: Wavelet2(8, "db2", 1)], ids=["fourier", "wavelet"])
def model(request: pytest.FixtureRequest) -> HVAE:
    with torch.device("cpu"):
        made = build(request.param)
    made.calibrate(X)
    return made.eval()


WORK: dict[str, Callable[[HVAE], object]] = {
    "loss": lambda m: m.loss(X, torch.Generator().manual_seed(0)).backward(),
    "sample": lambda m: m.sample(2),
    "decode": lambda m: m.decode(m.encode(X).latents[:2]),
    "calibrate": lambda m: m.calibrate(X.split(2)),
    "laws": lambda m: m.decomp.check(),
    "evaluate": lambda m: evaluate(m, X, batch_size=4),
    "latent by latent": lambda m: MAPRefiner(2, rule="gd", schedule="latent")(m, X),
    "scale by scale": lambda m: MAPRefiner(2)(m, X),
    "jointly": lambda m: MAPRefiner(2, schedule="joint", rule="gauss-newton")(m, X),
    "known bands": lambda m: MAPRefiner(1)(m, KnownBands.of(X, m.decomp, until=4)),
    "masks": lambda m: masks_of(m.decomp, lambda x: x),
    "measurement": lambda m: MAPRefiner(1)(m, Measurement(X[..., :4], lambda x: x[..., :4], 0.1)),
    "draws": lambda m: posterior_draws(m, KnownBands.of(X, m.decomp, until=4), MAPRefiner(1, sample=True), 2),
}


@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_a_model_works_whatever_the_default_device_is(model: HVAE, work: Callable[[HVAE], object]) -> None:
    with META:
        work(model)
    assert devices(model) == {"cpu"}


def test_training_and_files_whatever_the_default_device_is(model: HVAE, tmp_path: Path) -> None:
    data: Any = X if isinstance(model.decomp, FFT2Real) else list(X)

    def stop(record: dict[str, Any], average: HVAE) -> None:
        if record["step"] == 3:
            raise InterruptedError

    expected = copy.deepcopy(model)
    train = partial(fit, data=data, steps=4, batch_size=2, every=1, progress=False)
    train(expected)
    with META:
        with pytest.raises(InterruptedError):
            train(model, checkpoint=tmp_path, checkpoint_every=0, callback=stop)
        train(model, checkpoint=tmp_path)
        model.save_pretrained(tmp_path)
        loaded = HVAE.from_pretrained(tmp_path)
    assert devices(loaded) == devices(model) == {"cpu"}
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
        assert torch.equal(loaded.state_dict()[name], value)
