import contextlib
import copy
import errno
import hashlib
import itertools
import json
import math
import os
import random
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from typing_extensions import override

from separable_hvae import (
    HVAE,
    CoefficientHead,
    Decomposition,
    FFT2Real,
    GridHead,
    Identity,
    ScaleHead,
    Wavelet2,
    __version__,
)
from separable_hvae._validation import plain
from separable_hvae.serialization import atomic, model_folder
from tests.helpers.models import seeded, tiny, units
from tests.helpers.zoo import DEVICES, OWN, ZOO, Make, Pyramid, RingDCT, signal

CONFIG, WEIGHTS = "config.json", "model.safetensors"
PYRAMID = "tests.helpers.zoo:Pyramid"


class Turned(Decomposition):
    """An own decomposition with an argument, a parameter and a persistent buffer: the signal, turned."""

    orthonormal = True
    table: Tensor

    def __init__(self, size: int, gain: float = 1.0, *, names: Sequence[str] = ("a", "b")) -> None:
        super().__init__((size,), 1)
        self.gain, self.names = gain, names
        self.basis = nn.Parameter(torch.eye(size))
        self.register_buffer("table", torch.ones(size, dtype=torch.float64))

    @override
    def config(self) -> dict[str, Any]:
        return {"size": self.size[0], "gain": self.gain, "names": self.names}

    @override
    def analysis(self, x: Tensor) -> list[Tensor]:
        return [x @ self.basis.to(x)]

    @override
    def synthesis(self, bands: Sequence[Tensor | None]) -> Tensor:
        h = self.check_bands(bands)[0]
        return h @ self.basis.to(h).T

    @override
    def band_shape(self, scale: int) -> tuple[int, ...] | None:
        return (1, *self.size) if scale == self.scales[-1] else None


class OwnHead(GridHead):
    """An own head, with its decomposition as a submodule and a tied weight."""

    def __init__(self, decomp: Decomposition, scale: int, **options: Any) -> None:
        super().__init__(decomp, scale, **options)
        self.again = decomp
        self.tied = self.emit

    @override
    def forward(self, context: Tensor) -> Tensor:
        return 2 * super().forward(context)


class Special(HVAE):
    """An own model."""


class Unkept(Identity):
    """Keeps another value than it was given."""

    def __init__(self, gain: float) -> None:
        super().__init__(4)
        self.gain = 2 * gain


def small(decomp: Decomposition, *, seed: int = 0, **options: Any) -> HVAE:
    return tiny(decomp, seed=seed, **({"layers": 1, "width": 2, "bottleneck": 2, "blocks": 1} | options))


def same(a: HVAE, b: HVAE) -> bool:
    """Whether two models have the same tensors and give the same results, bit for bit."""
    state = b.state_dict()
    assert a.state_dict().keys() == state.keys()
    equal = all(v.dtype == state[k].dtype and torch.equal(v, state[k]) for k, v in a.state_dict().items())
    x = signal(a.decomp, dtype=torch.float32)
    with torch.no_grad():
        p, q = a(x, seeded()), b(x, seeded())
    assert p.kl is not None
    assert q.kl is not None
    results = zip([p.reconstruction, p.kl, p.nll, *p.bands], [q.reconstruction, q.kl, q.nll, *q.bands], strict=True)
    return equal and all(torch.equal(u, v) for u, v in results)


def alter(folder: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> None:
    """Rewrite a folder with other content and valid digests."""
    config = json.loads((folder / CONFIG).read_text())
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    change(config, tensors)

    def text(digest: str) -> bytes:
        return json.dumps({**config, "sha256": digest}).encode()

    data = safetensors.torch.save(tensors, {"config_sha256": hashlib.sha256(text("")).hexdigest()})
    (folder / WEIGHTS).write_bytes(data)
    (folder / CONFIG).write_bytes(text(hashlib.sha256(data).hexdigest()))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    small(FFT2Real(4, channels=1)).save_pretrained(folder)
    return folder


@pytest.fixture
def own(saved: Path, tmp_path: Path) -> Path:
    """A copy that may be spoilt."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


# Round trips.


@pytest.mark.parametrize("head", ["grid", "coefficient"])
@pytest.mark.parametrize("name", ZOO)
def test_round_trip_of_every_decomposition_and_head(name: str, head: str, tmp_path: Path) -> None:
    model = small(ZOO[name](), head=head, blocks=0)
    model.save_pretrained(tmp_path)
    classes = [RingDCT, Pyramid] if name in OWN else []
    loaded = HVAE.from_pretrained(tmp_path, classes=classes)
    assert loaded.config == model.config
    assert loaded.decomp.config() == model.decomp.config()
    assert loaded.scales == model.scales
    assert not loaded.training
    assert same(model, loaded)


@pytest.mark.parametrize(
    "options",
    [
        {"layers": [1, 3, 2, 1], "latent_channels": 3, "blocks": 0},
        {"layers": (2, 1, 1, 1)},
        {"sigma": "learned"},
        {"sigma": 1 / 3, "band_input": False},
        {"head": GridHead},
        {"head": CoefficientHead},
        {"scales": [2, 8]},
    ],
)
def test_round_trip_of_options(options: dict[str, Any], tmp_path: Path) -> None:
    model = small(FFT2Real(8, channels=1), **options)
    model.calibrate(5 * signal(model.decomp, 8, torch.float32))
    with torch.no_grad():
        model.log_sigma.add_(0.125)
    model.save_pretrained(tmp_path)
    loaded = HVAE.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert loaded.scales == model.scales == tuple(options.get("scales", (1, 2, 4, 8)))
    assert isinstance(loaded.log_sigma, nn.Parameter) == (options.get("sigma") == "learned")
    assert units(loaded) == units(model) != [1.0] * len(model.subsets)
    assert loaded.is_calibrated
    assert model.is_calibrated
    assert same(model, loaded)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_round_trip_of_the_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model = small(Turned(4)).to(dtype)
    model.save_pretrained(tmp_path)
    assert same(model, loaded := HVAE.from_pretrained(tmp_path, classes=[Turned]))
    assert loaded.start.dtype == dtype
    # Half precision is for networks.
    assert loaded.decomp.get_buffer("table").dtype == model.decomp.get_buffer("table").dtype == torch.float64

    # Parts that were cast, or not, on their own.
    model.decomp.double()
    model.encoder.float()
    model.save_pretrained(tmp_path)
    loaded = HVAE.from_pretrained(tmp_path, classes=[Turned])
    assert {k: v.dtype for k, v in loaded.state_dict().items()} == {k: v.dtype for k, v in model.state_dict().items()}
    assert loaded.start.dtype == dtype
    assert loaded.decomp.get_buffer("table").dtype == torch.float64


def test_loading_draws_no_random_numbers_and_gives_a_model_that_trains(saved: Path) -> None:
    before = torch.get_rng_state()
    with torch.inference_mode():
        model = HVAE.from_pretrained(saved)
    assert torch.equal(torch.get_rng_state(), before)
    model.train().loss(signal(model.decomp, dtype=torch.float32)).backward()
    assert model.start.grad is not None


@pytest.mark.parametrize("device", DEVICES)
def test_device(device: str, tmp_path: Path) -> None:
    model = small(Turned(4)).to(device)
    model.save_pretrained(tmp_path)
    loaded = HVAE.from_pretrained(tmp_path, classes=[Turned], device=device)
    assert {t.device.type for t in loaded.state_dict().values()} == {device}
    loaded(signal(loaded.decomp, dtype=torch.float32, device=device))


def test_saving_twice_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    HVAE.from_pretrained(saved).save_pretrained(tmp_path)
    for name in (CONFIG, WEIGHTS, "README.md"):
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()


# Tensors with several names.


def test_the_decomposition_is_the_models_alone(tmp_path: Path) -> None:
    model = small(Turned(4))
    assert [n for n, m in model.named_modules() if isinstance(m, Decomposition)] == ["decomp"]
    assert [n for n in model.state_dict() if n.endswith("basis")] == ["decomp.basis"]
    model.save_pretrained(tmp_path)
    for m in (model, copy.deepcopy(model).double(), HVAE.from_pretrained(tmp_path, classes=[Turned])):
        for subset in m.subsets:
            assert subset.head.decomp is m.decomp
        basis = m.subsets[0].head.decomp.get_parameter("basis")
        assert basis is m.decomp.basis
        assert basis.dtype == m.start.dtype
    with torch.no_grad():
        model.decomp.get_parameter("basis").copy_(torch.linalg.qr(torch.randn(4, 4))[0])
    model.save_pretrained(tmp_path)
    assert same(model, HVAE.from_pretrained(tmp_path, classes=[Turned]))


def test_tensors_with_several_names_are_stored_once_and_stay_shared(tmp_path: Path) -> None:
    model = small(Turned(4), head=OwnHead)
    names = set(model.state_dict())
    assert {"decomp.basis", "decoder.subsets.0.head.again.basis", "decoder.subsets.0.head.tied.weight"} < names
    model.save_pretrained(tmp_path)
    stored = set(safetensors.torch.load_file(tmp_path / WEIGHTS))
    assert {n for n in names - stored if ".again." not in n and ".tied." not in n} == set()
    assert stored < names
    assert sum(n.endswith("basis") for n in stored) == 1
    loaded = HVAE.from_pretrained(tmp_path, classes=[Turned, OwnHead])
    head: Any = loaded.subsets[0].head
    assert head.again is head.decomp is loaded.decomp
    assert head.tied.weight is head.emit.weight
    assert same(model, loaded)


def test_tensors_that_share_memory_are_stored_apart(tmp_path: Path) -> None:
    class Sharing(Turned):
        def __init__(self, size: int, gain: float = 1.0, *, names: Sequence[str] = ("a", "b")) -> None:
            super().__init__(size, gain, names=names)
            self.table = torch.arange(4.0)
            self.register_buffer("whole", self.table.view(2, 2))
            self.register_buffer("part", self.table[1:])
            self.register_buffer("wide", torch.ones(()).expand(4))

    model = small(Sharing(4))
    model.decomp.get_parameter("basis").data = torch.arange(16.0).reshape(4, 4).T
    model.save_pretrained(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / WEIGHTS)
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())


# Classes of one's own.


@pytest.mark.parametrize("head", [OwnHead, "grid"])
@pytest.mark.parametrize("decomp", [lambda: Turned(4, 3.0, names=["c"]), lambda: FFT2Real(4)], ids=["own", "fft2"])
def test_own_classes_come_from_the_caller(decomp: Make, head: type[ScaleHead] | str, tmp_path: Path) -> None:
    model = small(decomp(), head=head)
    model.save_pretrained(tmp_path)
    needed: list[type[nn.Module]] = [c for c in (Turned, OwnHead) if c in (type(model.decomp), head)]
    plenty: list[type[nn.Module]] = [OwnHead, RingDCT, Turned, Turned, GridHead]
    for classes in (needed, plenty):
        loaded = HVAE.from_pretrained(tmp_path, classes=classes)
        assert type(loaded.decomp) is type(model.decomp)
        assert loaded.config == model.config
        assert same(model, loaded)
    assert same(model, HVAE.from_pretrained(tmp_path, trust_import_paths=True))
    for missing in needed:
        others = [c for c in needed if c is not missing]
        with pytest.raises(ValueError, match=rf"config\.json .*{missing.__name__}.*trust_import_paths=True"):
            HVAE.from_pretrained(tmp_path, classes=others)


def test_own_arguments_are_kept(tmp_path: Path) -> None:
    small(Turned(4, 3.0, names=["c"])).save_pretrained(tmp_path)
    loaded: Any = HVAE.from_pretrained(tmp_path, classes=[Turned]).decomp
    assert (loaded.gain, loaded.names) == (3.0, ["c"])


def test_a_class_that_moved_is_found_by_its_name(tmp_path: Path) -> None:
    class Local(Identity):
        pass

    moved = type("Local", (Identity,), {})
    small(Local(4)).save_pretrained(tmp_path)
    assert "<locals>" in (tmp_path / CONFIG).read_text()
    assert type(HVAE.from_pretrained(tmp_path, classes=[Local]).decomp) is Local
    assert type(HVAE.from_pretrained(tmp_path, classes=[moved]).decomp) is moved
    assert type(HVAE.from_pretrained(tmp_path, classes=[moved, Local]).decomp) is Local
    with pytest.raises(ValueError, match="may be any of"):
        HVAE.from_pretrained(tmp_path, classes=[moved, type("Local", (Identity,), {})])
    with pytest.raises(ValueError, match="does not describe"):
        HVAE.from_pretrained(tmp_path, trust_import_paths=True)


def test_a_subclass_of_the_model(tmp_path: Path) -> None:
    Special(Identity(4), layers=1, width=2, bottleneck=2).save_pretrained(tmp_path)
    assert type(Special.from_pretrained(tmp_path)) is Special
    with pytest.raises(ValueError, match="does not describe a HVAE: its model is 'Special'"):
        HVAE.from_pretrained(tmp_path)


class Extended(HVAE):
    """An own model with an option, which its ``config`` may lack."""

    def __init__(
        self,
        decomp: Decomposition,
        scales: Sequence[int] | None = None,
        *,
        extra: int = 3,
        keep: bool = True,
        **rest: Any,
    ) -> None:
        super().__init__(decomp, scales, **rest)
        self.extra = extra
        if keep:
            self.config |= {"extra": extra, "keep": keep}


class Narrow(HVAE):
    """An own model that decides on options itself."""

    def __init__(self, decomp: Decomposition, width: int = 2) -> None:
        super().__init__(decomp, width=width, layers=1, bottleneck=2, blocks=0)


def test_options_of_a_subclass_come_back_or_cannot_be_saved(tmp_path: Path) -> None:
    options: dict[str, Any] = {"layers": 1, "width": 2, "bottleneck": 2, "blocks": 0}
    Extended(Identity(4), extra=7, **options).save_pretrained(tmp_path / "kept")
    assert Extended.from_pretrained(tmp_path / "kept").extra == 7
    with pytest.raises(
        TypeError, match=r"Extended takes \['extra', 'keep'\], which its config lacks: set self\.config\['extra'\]"
    ):
        Extended(Identity(4), extra=7, keep=False, **options).save_pretrained(tmp_path / "lost")
    with pytest.raises(TypeError, match=r"Narrow cannot be built again .* unexpected keyword argument 'scales'"):
        Narrow(Identity(4)).save_pretrained(tmp_path / "lost")
    assert not (tmp_path / "lost").exists()


@pytest.mark.parametrize("place", ["decomposition", "head"])
@pytest.mark.parametrize("trust", [False, True])
def test_nothing_that_a_file_names_is_executed(
    place: str, trust: bool, own: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    called: list[Any] = []
    monkeypatch.setattr(os, "system", lambda *args, **kwargs: called.append(args))
    (tmp_path / "evil_module.py").write_text("import sys\nsys.evil = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("os:system", "evil_module:Evil", "builtins:eval", "separable_hvae.fourier:torch", "os:", ":", "x:y"):

        def change(config: dict[str, Any], _: object, name: str = name) -> None:
            if place == "head":
                config["options"]["head"] = name
            else:
                config["decomposition"] = {"class": name, "arguments": {"size": "echo", "channels": 1}}

        if trust and name.startswith("evil"):
            continue
        alter(own, change)
        with pytest.raises(ValueError, match=r"config\.json does not describe a HVAE"):
            HVAE.from_pretrained(own, trust_import_paths=trust)
    assert not called
    assert not hasattr(sys, "evil")
    assert "evil_module" not in sys.modules


# What a decomposition was built with.


@pytest.mark.parametrize("make", ZOO.values(), ids=ZOO)
def test_config_of_a_decomposition_builds_it_again(make: Make) -> None:
    decomp = make()
    config = json.loads(json.dumps(decomp.config()))
    assert config == decomp.config()
    again = type(decomp)(**config)
    assert again.config() == config
    assert (again.scales, again.band_shapes) == (decomp.scales, decomp.band_shapes)
    x = signal(decomp, 1)
    assert all(torch.equal(a, b) for a, b in zip(again.analysis(x), decomp.analysis(x), strict=True))


def test_config_follows_bind() -> None:
    assert Wavelet2(8, "db2").bind([2, 8]).config() == {
        "size": [8, 8],
        "wavelet": "db2",
        "channels": 3,
        "scales": [2, 8],
        "is_complex": False,
    }


def test_config_that_cannot_be_told() -> None:
    class Kept(Identity):
        def __init__(self, gain: Any) -> None:
            super().__init__(4)
            self.gain = gain

    class Unset(Identity):
        def __init__(self, gain: float) -> None:
            super().__init__(4)

    class Open(Identity):
        def __init__(self, **options: Any) -> None:
            super().__init__(4, **options)

    with pytest.raises(TypeError, match=r"Unset has no attribute 'gain' for its argument: .* override its config"):
        Unset(1.0).config()
    with pytest.raises(TypeError, match=r"Open cannot tell what its argument \*\*options.* was: override its config"):
        Open().config()
    for gain in (torch.ones(2), math.nan, math.inf, {1: 2}, {"a": {1, 2}}, b"", torch.float32):
        with pytest.raises(TypeError, match=r"Kept.gain holds .*, which JSON cannot hold: override its config"):
            Kept(gain).config()
    assert Kept((1, [2.5, None, {"a": (True, "b")}])).config() == {"gain": [1, [2.5, None, {"a": [True, "b"]}]]}
    assert plain("x", ()) == []


def test_arguments_that_build_another_decomposition_are_refused(tmp_path: Path) -> None:
    class Side(Identity):
        def __init__(self, size: int) -> None:
            super().__init__((size, size))

    for decomp, message in (
        (Unkept(0.5), r"{'gain': 1.0}, its config\(\) gives {'gain': 2.0}"),
        (Side(4), "size must be"),
    ):
        with pytest.raises(TypeError, match=rf"cannot be built again: .*{message}.*: override its config\(\)"):
            small(decomp).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


# What cannot be saved.


def test_state_that_cannot_be_saved_leaves_the_folder_alone(tmp_path: Path) -> None:
    class Extra(Turned):
        @override
        def get_extra_state(self) -> object:
            return {"a": 1}

    class Double(Turned):
        def __init__(self, size: int, gain: float = 1.0, *, names: Sequence[str] = ("a", "b")) -> None:
            super().__init__(size, gain, names=names)
            self.register_buffer("wave", torch.ones(2, dtype=torch.complex128))

    for kind, message in ((Extra, "only tensors can be saved"), (Double, "complex128 cannot be saved")):
        model = small(kind(4))
        with pytest.raises(TypeError, match=message):
            model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# The files.


def test_config_is_for_people(saved: Path) -> None:
    text = (saved / CONFIG).read_text()
    config = json.loads(text)
    digest = hashlib.sha256((saved / WEIGHTS).read_bytes()).hexdigest()
    assert config == {
        "format": 2,
        "version": __version__,
        "model": "HVAE",
        "decomposition": {"class": "FFT2Real", "arguments": {"size": [4, 4], "channels": 1, "scales": [1, 2, 4]}},
        "scales": [1, 2, 4],
        "options": {
            "layers": 1,
            "width": 2,
            "bottleneck": 2,
            "latent_channels": 1,
            "blocks": 1,
            "head": "grid",
            "sigma": 0.1,
            "band_input": True,
            "likelihood": None,
            "condition": None,
        },
        "dtype": "float32",
        "sha256": digest,
    }
    assert '\n  "model": "HVAE",\n' in text
    assert text.endswith("}\n")
    with safetensors.safe_open(saved / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {
            "config_sha256": hashlib.sha256(text.replace(digest, "").encode()).hexdigest(),
        }


def test_folder(saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    plain_file = saved.parent / "plain"
    plain_file.write_text("")
    modes = {stat.S_IMODE(p.stat().st_mode) for p in saved.iterdir()}
    assert modes == {stat.S_IMODE(plain_file.stat().st_mode)}
    card = (saved / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: separable-hvae\n")
    assert "FFT2Real(size=(4, 4), channels=1, scales=[1, 2, 4])" in card


def test_a_model_card_is_kept(own: Path) -> None:
    (own / "README.md").write_text("mine")
    HVAE.from_pretrained(own).save_pretrained(own)
    assert (own / "README.md").read_text() == "mine"


def test_new_folders_are_made_and_names_may_be_strings(saved: Path, tmp_path: Path) -> None:
    model = HVAE.from_pretrained(str(saved))
    model.save_pretrained(str(tmp_path / "a" / "b"))
    assert same(model, HVAE.from_pretrained(str(tmp_path / "a" / "b")))


FORMAT_1 = """{
  "format": 1,
  "version": "0.1.0",
  "model": "HVAE",
  "decomposition": {"class": "Identity", "arguments": {"size": [2], "channels": 1, "scales": [2], "is_complex": false}},
  "scales": [2],
  "options": {
    "layers": [1],
    "width": 2,
    "bottleneck": 1,
    "latent_channels": 1,
    "blocks": 0,
    "head": "coefficient",
    "sigma": "learned",
    "band_input": false
  },
  "dtype": "float32",
  "sha256": "%s"
}
"""
FORMAT_1_TENSORS: dict[str, tuple[int, ...]] = {
    "start": (1, 2, 2),
    "log_sigma": (),
    "calibrated": (),
    "magnitude": (),
    "encoder.stem.weight": (2, 1, 3),
    "encoder.stem.bias": (2,),
    "subsets.0.centre": (1, 2),
    "subsets.0.unit": (),
    "subsets.0.layers.0.prior.enter.weight": (1, 2, 1),
    "subsets.0.layers.0.prior.enter.bias": (1,),
    "subsets.0.layers.0.prior.mix.weight": (1, 1, 3),
    "subsets.0.layers.0.prior.mix.bias": (1,),
    "subsets.0.layers.0.prior.leave.weight": (4, 1, 1),
    "subsets.0.layers.0.prior.leave.bias": (4,),
    "subsets.0.layers.0.posterior.enter.weight": (1, 4, 1),
    "subsets.0.layers.0.posterior.enter.bias": (1,),
    "subsets.0.layers.0.posterior.mix.weight": (1, 1, 3),
    "subsets.0.layers.0.posterior.mix.bias": (1,),
    "subsets.0.layers.0.posterior.leave.weight": (2, 1, 1),
    "subsets.0.layers.0.posterior.leave.bias": (2,),
    "subsets.0.layers.0.inject.weight": (2, 1, 1),
    "subsets.0.layers.0.inject.bias": (2,),
    "subsets.0.layers.0.block.enter.weight": (1, 2, 1),
    "subsets.0.layers.0.block.enter.bias": (1,),
    "subsets.0.layers.0.block.mix.weight": (1, 1, 3),
    "subsets.0.layers.0.block.mix.bias": (1,),
    "subsets.0.layers.0.block.leave.weight": (2, 1, 1),
    "subsets.0.layers.0.block.leave.bias": (2,),
    "subsets.0.head.emit.weight": (1, 2, 3),
    "subsets.0.head.emit.bias": (1,),
}


def test_what_an_earlier_version_wrote_loads(tmp_path: Path) -> None:
    values = iter(torch.linspace(-1, 1, 1000))
    tensors = {}
    for name, shape in FORMAT_1_TENSORS.items():
        tensors[name] = torch.tensor([float(next(values)) for _ in range(math.prod(shape))]).reshape(shape)
    tensors["calibrated"] = torch.tensor(16)
    data = safetensors.torch.save(tensors, {"config_sha256": hashlib.sha256((FORMAT_1 % "").encode()).hexdigest()})
    (tmp_path / WEIGHTS).write_bytes(data)
    (tmp_path / CONFIG).write_text(FORMAT_1 % hashlib.sha256(data).hexdigest())
    model = HVAE.from_pretrained(tmp_path)
    state, parts = model.state_dict(), {"start": "decoder", "subsets": "decoder"}
    parts |= {"calibrated": "standardization", "magnitude": "standardization"}
    known = {f"{parts[k.split('.')[0]]}.{k}" if k.split(".")[0] in parts else k: v for k, v in tensors.items()}
    offset = state.pop("standardization.offset")
    assert not offset.any()
    known["likelihood.log_sigma"] = known.pop("log_sigma")
    assert state.keys() == known.keys()
    assert all(torch.equal(state[k], v) for k, v in known.items())


# Damage.


def test_flipped_bits_are_refused(saved: Path, own: Path) -> None:
    draw = random.Random(0)
    for i in range(200):
        path = own / (CONFIG, WEIGHTS)[i % 2]
        good = path.read_bytes()
        bad = bytearray(good)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"config\.json|model\.safetensors"):
            HVAE.from_pretrained(own)
        path.write_bytes(good)
    assert same(HVAE.from_pretrained(saved), HVAE.from_pretrained(own))


def test_cut_files_are_refused(own: Path) -> None:
    draw = random.Random(1)
    for i in range(50):
        path = own / (CONFIG, WEIGHTS)[i % 2]
        good = path.read_bytes()
        cut = (0, 1, len(good) - 1)[i // 2] if i < 6 else draw.randrange(len(good))
        path.write_bytes(good[:cut])
        with pytest.raises(ValueError, match=r"config\.json|model\.safetensors"):
            HVAE.from_pretrained(own)
        path.write_bytes(good)
    for path in (own / CONFIG, own / WEIGHTS):
        good = path.read_bytes()
        path.write_bytes(good + b" ")
        with pytest.raises(ValueError, match="altered"):
            HVAE.from_pretrained(own)
        path.write_bytes(good)


def test_files_of_two_models_are_refused(own: Path, tmp_path: Path) -> None:
    small(FFT2Real(4, channels=1), seed=1).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / WEIGHTS, own)
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or altered: its SHA-256 is"):
        HVAE.from_pretrained(own)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (CONFIG, None, r"config\.json is missing"),
        (WEIGHTS, None, r"model\.safetensors is missing"),
        (CONFIG, b"", r"config\.json is no JSON"),
        (CONFIG, b"\xff\xfe", r"config\.json is no JSON"),
        (CONFIG, b"[" * 100_000, r"config\.json is no JSON"),
        (CONFIG, b"format: 1", r"config\.json is no JSON"),
        (CONFIG, b"[1]", r"config\.json must hold an object with the key 'format', 1 to 2"),
        (CONFIG, b"null", r"config\.json must hold an object"),
        (CONFIG, b"{}", r"config\.json must hold an object"),
        (CONFIG, b'{"format": "1"}', r"config\.json must hold an object"),
        (CONFIG, b'{"format": true}', r"config\.json must hold an object"),
        (CONFIG, b'{"format": 0}', r"config\.json must hold an object"),
        (CONFIG, b'{"format": 3}', r"config\.json has format 3; .* reads up to 2: upgrade"),
        (CONFIG, b'{"format": 1}', r"model\.safetensors is truncated or altered: .*config\.json says None"),
        (CONFIG, b'{"format": 1, "sha256": [2]}', r"model\.safetensors is truncated or altered: .*says \[2\]"),
        (WEIGHTS, b"", r"model\.safetensors is truncated or altered"),
        (WEIGHTS, b"\x80\x04.", r"model\.safetensors is truncated or altered"),
    ],
)
def test_bad_files(name: str, content: bytes | None, message: str, own: Path) -> None:
    (own / name).unlink()
    if content is not None:
        (own / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        HVAE.from_pretrained(own)


def test_weights_that_are_no_safetensors_file(own: Path) -> None:
    (own / WEIGHTS).write_bytes(b"no tensors")
    config = json.loads((own / CONFIG).read_text())
    (own / CONFIG).write_text(json.dumps({**config, "sha256": hashlib.sha256(b"no tensors").hexdigest()}))
    with pytest.raises(ValueError, match=r"model\.safetensors is no safetensors file"):
        HVAE.from_pretrained(own)
    data = safetensors.torch.save({"a": torch.ones(1)})
    (own / WEIGHTS).write_bytes(data)
    (own / CONFIG).write_text(json.dumps({**config, "sha256": hashlib.sha256(data).hexdigest()}))
    with pytest.raises(ValueError, match=r"config\.json was altered"):
        HVAE.from_pretrained(own)


Change = Callable[[dict[str, Any], dict[str, Tensor]], object]
CHANGES: list[tuple[Change, str]] = [
    (lambda c, t: c.update(extra=1), r"keys \['extra'\] are unknown"),
    (lambda c, t: c.pop("options"), r"keys \['options'\] are missing"),
    (lambda c, t: c.pop("version"), r"keys \['version'\] are missing"),
    (lambda c, t: c["decomposition"].update(extra=1), r"keys \['decomposition.extra'\] are unknown"),
    (lambda c, t: c["decomposition"].pop("class"), r"keys \['decomposition.class'\] are missing"),
    (lambda c, t: c.update(decomposition=[]), r"decomposition must be of type dict, got \[\]"),
    (lambda c, t: c["decomposition"].update({"class": 1}), r"decomposition.class must be of type str, got 1"),
    (lambda c, t: c.update(scales=4), "scales must be of type list, got 4"),
    (lambda c, t: c.update(scales=[1, 4, 2]), "scales must increase"),
    (lambda c, t: c.update(scales=[1, "4"]), "scales must be integers"),
    (lambda c, t: c.update(model="Other"), "its model is 'Other'"),
    (lambda c, t: c.update(dtype="int8"), r"dtype must be one of \[.*\], got 'int8'"),
    (lambda c, t: c["decomposition"].update({"class": "FFT9Real"}), "'FFT9Real' is no Decomposition of this library"),
    (lambda c, t: c["decomposition"].update({"class": "GridHead"}), "'GridHead' is no Decomposition of this library"),
    (lambda c, t: c["decomposition"].update({"class": PYRAMID}), r"pass it as classes=\[Pyramid\]"),
    (lambda c, t: c["decomposition"]["arguments"].update(extra=1), "unexpected keyword argument 'extra'"),
    (lambda c, t: c["decomposition"]["arguments"].pop("size"), "missing 1 required positional argument: 'size'"),
    (lambda c, t: c["decomposition"]["arguments"].pop("channels"), "its config.* gives .*'channels': 3"),
    (lambda c, t: c["decomposition"]["arguments"].update(size="4"), "size must be"),
    (lambda c, t: c["decomposition"]["arguments"].update(size=[4, 2]), "must have shape"),
    (lambda c, t: c["options"].update(extra=1), "unexpected keyword argument 'extra'"),
    (lambda c, t: c["options"].update(decomp=1), "multiple values for argument 'decomp'"),
    (lambda c, t: c["options"].pop("width"), r"options \['width'\] are missing"),
    (lambda c, t: c["options"].pop("head"), r"options \['head'\] are missing"),
    (lambda c, t: c["options"].update(width="2"), "width must be an integer"),
    (lambda c, t: c["options"].update(width=0), "width must be at least 1"),
    (lambda c, t: c["options"].update(layers=[1, 2]), "layers must be one number or one for each"),
    (lambda c, t: c["options"].update(sigma=-1.0), "sigma must be positive"),
    (lambda c, t: c["options"].update(head=3), "head must be a name"),
    (lambda c, t: c["options"].update(head=["grid"]), "head must be a name"),
    (lambda c, t: c["options"].update(head="round"), "'round' is no ScaleHead of this library"),
    (lambda c, t: c["options"].update(head="FFT2Real"), "'FFT2Real' is no ScaleHead of this library"),
    (lambda c, t: c["options"].update(width=3), "must have shape"),
    (lambda c, t: c["options"].update(band_input=False),
     r"tensors \['decoder.subsets.0.layers.0.residual_conv.*'\] are unexpected"),
    (lambda c, t: c["options"].update(blocks=2), r"tensors \['.*'\] are missing"),
    (lambda c, t: t.pop("decoder.start"), r"tensors \['decoder.start'\] are missing"),
    (lambda c, t: t.update(extra=torch.ones(1)), r"tensors \['extra'\] are unexpected"),
    (lambda c, t: t.update({"decoder.start": torch.ones(1, 2, 1)}),
     r"start must have shape \(1, 2, 1, 1\), got \(1, 2, 1\)"),
    (lambda c, t: t.update({"decoder.start": torch.ones(1, 2, 1, 1).int()}),
     "start must be torch.float32, got torch.int32"),
    (lambda c, t: t.update({"standardization.calibrated": torch.tensor(1.0)}),
     "calibrated must be torch.int64, got torch.float32"),
    (lambda c, t: t.update({"standardization.calibrated": torch.tensor(1).int()}),
     "must be torch.int64, got torch.int32"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=[message for _, message in CHANGES])
def test_bad_content(change: Change, message: str, own: Path) -> None:
    alter(own, change)
    with pytest.raises(
        ValueError, match=rf"(config\.json does not describe a HVAE|model\.safetensors does not fit).*{message}"
    ):
        HVAE.from_pretrained(own)


def test_bad_calls(own: Path, tmp_path: Path) -> None:
    HVAE.from_pretrained(own, classes=[RingDCT, OwnHead])
    bad: Any
    for bad in (nn.Linear, "tests.helpers.zoo:RingDCT", RingDCT((4, 4), 1)):
        with pytest.raises(
            TypeError, match="classes must hold subclasses of Decomposition, ScaleHead, Condition, Likelihood"
        ):
            HVAE.from_pretrained(own, classes=[bad])
    for missing in (tmp_path / "missing", str(tmp_path / "missing"), "./missing", "missing", "../a/b", own / CONFIG):
        with pytest.raises(ValueError, match="is neither a folder nor an id 'owner/name'"):
            HVAE.from_pretrained(missing)


# Saving is all or nothing.


class Cut(BaseException):
    """The power goes off."""


@pytest.fixture
def power(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Everything that writes counts down ``left``, and fails at zero and from then on."""
    state = SimpleNamespace(left=math.inf)
    write, sync, replace, unlink = atomic._write, atomic._sync, Path.replace, Path.unlink

    def spend(error: type[BaseException] = Cut) -> None:
        state.left -= 1
        if state.left < 0:
            raise error

    def cut_write(path: Path, content: bytes) -> None:
        try:
            spend()
        except Cut:
            if state.left == -1:
                write(path, content[: len(content) // 2])
            raise
        write(path, content)

    def cut_sync(folder: Path) -> None:
        spend()
        sync(folder)

    def cut_replace(self: Path, target: Path) -> Path:
        spend()
        return replace(self, target)

    def cut_unlink(self: Path, missing_ok: bool = False) -> None:
        spend()
        unlink(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(atomic, "_write", cut_write)
        patch.setattr(atomic, "_sync", cut_sync)
        patch.setattr(Path, "replace", cut_replace)
        patch.setattr(Path, "unlink", cut_unlink)
        yield state


def test_a_save_that_is_cut_off_leaves_the_old_model_or_the_new_one(power: SimpleNamespace, tmp_path: Path) -> None:
    def save(folder: Path, number: int) -> None:
        model_folder.write(folder, {"number": number}, {"number": torch.tensor(number)}, "card")

    def load(folder: Path) -> int:
        settings, tensors, _ = model_folder.read(folder)
        assert settings["number"] == int(tensors["number"])
        return int(settings["number"])

    outcomes: set[tuple[int, int]] = set()
    # The second cut hits what the first one left; no save takes more than twelve steps.
    for first, second in itertools.product(range(12), repeat=2):
        folder = tmp_path / f"{first}-{second}"
        power.left = math.inf
        save(folder, 0)
        found = [0]
        for cut, number in ((first, 1), (second, 2)):
            power.left = cut
            with contextlib.suppress(Cut):
                save(folder, number)
            done = power.left >= 0
            power.left = math.inf
            found.append(load(folder))
            assert found[-1] == number or (not done and found[-1] == found[-2])
        outcomes.add((found[1], found[2]))
        save(folder, 3)
        assert load(folder) == 3
        assert sorted(p.name for p in folder.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    assert outcomes == {(0, 0), (0, 2), (1, 1), (1, 2)}


def test_the_first_save_cut_off_leaves_a_whole_model_or_none(power: SimpleNamespace, tmp_path: Path) -> None:
    model = small(FFT2Real(4, channels=1))
    for cut in range(12):
        folder = tmp_path / str(cut)
        power.left = cut
        with contextlib.suppress(Cut):
            model.save_pretrained(folder)
        power.left = math.inf
        if (folder / WEIGHTS).exists():
            assert same(model, HVAE.from_pretrained(folder))
        else:
            with pytest.raises(ValueError, match="is missing"):
                HVAE.from_pretrained(folder)


def test_an_error_while_writing_leaves_no_trace(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in own.iterdir()}
    write = atomic._write

    def full(path: Path, content: bytes) -> None:
        write(path, content[:10])
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(atomic, "_write", full)
    with pytest.raises(OSError, match="no space left"):
        small(FFT2Real(4, channels=1), seed=1).save_pretrained(own)
    assert {p.name: p.read_bytes() for p in own.iterdir()} == before


# The hub.


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A stand-in for huggingface_hub that keeps repositories in folders."""
    calls: list[tuple[str, dict[str, Any]]] = []
    root = tmp_path / "hub"

    class HfApi:
        def __init__(self, token: str | None = None) -> None:
            calls.append(("token", {"token": token}))

        def create_repo(self, repo_id: str, **options: Any) -> SimpleNamespace:
            calls.append(("create_repo", options))
            (root / repo_id).mkdir(parents=True, exist_ok=True)
            return SimpleNamespace(repo_id=repo_id)

        def create_branch(self, repo_id: str, **options: Any) -> None:
            calls.append(("create_branch", options))

        def file_exists(self, repo_id: str, filename: str, *, revision: str | None = None) -> bool:
            return (root / repo_id / filename).exists()

        def upload_folder(self, *, repo_id: str, folder_path: str, ignore_patterns: list[str], **options: Any) -> str:
            calls.append(("upload_folder", options))
            shutil.copytree(
                folder_path, root / repo_id, ignore=shutil.ignore_patterns(*ignore_patterns), dirs_exist_ok=True
            )
            return f"https://hub/{repo_id}"

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append(("snapshot_download", {"revision": revision, "allow_patterns": allow_patterns}))
        if not (root / repo_id).exists():
            raise FileNotFoundError(repo_id)
        return str(root / repo_id)

    module = ModuleType("huggingface_hub")
    vars(module).update(HfApi=HfApi, snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return SimpleNamespace(calls=calls, root=root)


def test_push_and_load(hub: SimpleNamespace, saved: Path) -> None:
    model = HVAE.from_pretrained(saved)
    assert model.push_to_hub("me/mine", private=True, token="t") == "https://hub/me/mine"
    assert hub.calls == [
        ("token", {"token": "t"}),
        ("create_repo", {"private": True, "exist_ok": True}),
        ("upload_folder", {"revision": None, "commit_message": "Upload model"}),
    ]
    (hub.root / "me/mine/README.md").write_text("mine")
    hub.calls.clear()
    model.push_to_hub("me/mine", branch="b", commit_message="m")
    assert hub.calls[2:] == [
        ("create_branch", {"branch": "b", "exist_ok": True}),
        ("upload_folder", {"revision": "b", "commit_message": "m"}),
    ]
    assert (hub.root / "me/mine/README.md").read_text() == "mine"
    hub.calls.clear()
    assert same(model, HVAE.from_pretrained("me/mine", revision="b"))
    assert hub.calls == [("snapshot_download", {"revision": "b", "allow_patterns": [CONFIG, WEIGHTS]})]
    with pytest.raises(FileNotFoundError) as error:
        HVAE.from_pretrained("me/other")
    assert "'me/other' is no folder here, so it was looked up on the hub." in error.value.__notes__


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, saved: Path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    model = HVAE.from_pretrained(saved)
    with pytest.raises(ImportError, match=r'push_to_hub needs the extra "hub": pip install "separable-hvae\[hub\]"'):
        model.push_to_hub("me/mine")
    with pytest.raises(ImportError, match=r"'me/mine' is no folder here, and loading it from the hub needs the extra"):
        HVAE.from_pretrained("me/mine")


# What is saved must load.


class Forgetful(HVAE):
    """Takes an option by name and forgets it."""

    def __init__(self, decomp: Decomposition, scales: Sequence[int] | None = None, **options: Any) -> None:
        self_extra = options.pop("extra", 1)
        super().__init__(decomp, scales, **options)
        self.extra = self_extra


class Mindful(Forgetful):
    """Takes an option by name and keeps it."""

    def __init__(self, decomp: Decomposition, scales: Sequence[int] | None = None, **options: Any) -> None:
        super().__init__(decomp, scales, **options)
        self.config["extra"] = self.extra


def test_wrapped_parts_are_refused(tmp_path: Path) -> None:
    wrapped = small(FFT2Real(4, channels=1))
    cast(Any, wrapped).encoder = torch.compile(wrapped.encoder, backend="eager")
    normed = small(FFT2Real(4, channels=1))
    weight_norm(normed.subsets[0].layers[0].inject)
    exchanged = small(FFT2Real(4, channels=1))
    exchanged.encoder.stem = nn.Conv2d(1, 2, 5, padding=2)
    for model, name in ((wrapped, r"encoder\."), (normed, r"inject\."), (exchanged, r"encoder\.stem")):
        with pytest.raises(TypeError, match=rf"HVAE cannot be loaded again: .* it would not have .*{name}"):
            model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_options_by_keyword_are_kept_or_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"layers": 1, "width": 2, "bottleneck": 2, "blocks": 1}
    Forgetful(FFT2Real(4, channels=1), **options).save_pretrained(tmp_path / "default")
    with pytest.raises(TypeError, match="extra is 5, and 1 in a model built from its config"):
        Forgetful(FFT2Real(4, channels=1), extra=5, **options).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    Mindful(FFT2Real(4, channels=1), extra=5, **options).save_pretrained(tmp_path / "kept")
    assert Mindful.from_pretrained(tmp_path / "kept").extra == 5


def test_a_tilde_is_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    model = small(FFT2Real(4, channels=1))
    model.save_pretrained("~/models/one")
    assert (tmp_path / "models" / "one" / CONFIG).is_file()
    assert same(model, HVAE.from_pretrained("~/models/one"))


def test_a_model_without_the_biases_that_bands_cannot_hear(tmp_path: Path) -> None:
    model = small(FFT2Real(4, channels=1), head="grid")
    names = [name for name in model.state_dict() if name.endswith("head.emit.bias")]
    assert names == ["decoder.subsets.0.head.emit.bias"]
