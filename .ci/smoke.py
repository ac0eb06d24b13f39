"""What an installed release must do without any extra: build, encode, refine, save, load, and say what is missing."""

import importlib.metadata
import tempfile
from pathlib import Path

import torch

import separable_hvae
from separable_hvae import HVAE, FFT2Real, MAPRefiner, Wavelet2, fit

assert Path(separable_hvae.__file__).parent.name == "separable_hvae"
assert "site-packages" in separable_hvae.__file__, separable_hvae.__file__
assert (Path(separable_hvae.__file__).parent / "py.typed").exists()
version = importlib.metadata.version("separable-hvae")
assert version == separable_hvae.__version__

torch.manual_seed(0)
for decomp in (FFT2Real(8, channels=1), Wavelet2(8, "db2", channels=1)):
    decomp.check()
    model = HVAE(decomp, layers=3, width=8, bottleneck=4, blocks=1, latent_channels=2)
    x = torch.randn(3, 1, 8, 8)
    model.loss(x).backward()
    result = MAPRefiner(steps=3)(model.eval(), x)
    assert torch.isfinite(result.reconstruction).all()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = HVAE.from_pretrained(folder)
    torch.testing.assert_close(MAPRefiner(steps=3)(again, x).reconstruction, result.reconstruction)

missing = ""
try:
    fit(model, x, steps=1)
except ImportError as error:
    missing = str(error)
assert "separable-hvae[train]" in missing, "the environment is not empty: fit found its extra"
print(f"separable-hvae {version}: installed and working on torch {torch.__version__}")
