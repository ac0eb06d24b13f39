r"""What refinement is compared with.

    TV, wavelets      argmin_x ½‖A x − y‖² + λ‖K x‖₁,     K the gradient, or the details of a wavelet transform
    PnP-HVAE          z_l ← (μ_q/σ_q² + w μ_p/σ_p²) / (1/σ_q² + w/σ_p²), level by level; x ← argmin of
                      ‖A x − y‖²/2σ_n² + ‖x − decode(z)‖²/2σ²; and again        (Prost et al., ICCV 2023)

The minimisations are Condat's and Vũ's primal–dual steps,

    x⁺ = x − τ (A*(A x − y) + K* u),        u⁺ = clip_λ(u + s K (2 x⁺ − x)),

which need nothing of A but A and A*; scikit-image's own solvers know A = 1 only.
"""

import torch
from torch import Tensor

from separable_hvae import HVAE, Measurement, Wavelet2
from separable_hvae.functional import pack, unpack


class TotalVariation:
    """Isotropic total variation, over all real channels of a pixel together."""

    name = "total variation"
    bound = 8.0  # of ‖K‖²

    def forward(self, x: Tensor) -> Tensor:
        """Differences to the next pixel on both axes, ``(B, C, 2, H, W)``; none beyond the border."""
        down = torch.diff(x, dim=-2, append=x[..., -1:, :])
        right = torch.diff(x, dim=-1, append=x[..., -1:])
        return torch.stack([down, right], 2)

    def adjoint(self, u: Tensor) -> Tensor:
        """Minus the divergence of ``(B, C, 2, H, W)``."""
        down, right = u[:, :, 0, :-1], u[:, :, 1, :, :-1]
        zero_down, zero_right = torch.zeros_like(u[:, :, 0, :1]), torch.zeros_like(u[:, :, 0, :, :1])
        vertical = torch.diff(torch.cat([zero_down, down, zero_down], -2), dim=-2)
        horizontal = torch.diff(torch.cat([zero_right, right, zero_right], -1), dim=-1)
        return -vertical - horizontal

    def clip(self, u: Tensor, weight: float) -> Tensor:
        """Project onto ``|u| ≤ weight`` in every pixel."""
        size = u.square().sum((1, 2), keepdim=True).sqrt()
        return u * (weight / size.clamp_min(weight))


class WaveletSparsity:
    """Absolute values of an orthogonal wavelet's details; the coarsest averages are free."""

    name = "wavelet sparsity"
    bound = 1.0

    def __init__(self, side: int, channels: int, wavelet: str = "db2") -> None:
        self.transform = Wavelet2(side, wavelet, channels)

    def forward(self, x: Tensor) -> Tensor:
        """All details side by side, ``(B, N)``."""
        return torch.cat([h.flatten(1) for h in self.transform.analysis(x)[1:]], 1)

    def adjoint(self, u: Tensor) -> Tensor:
        """The signal of details ``(B, N)``."""
        shapes = list(self.transform.band_shapes.values())[1:]
        parts = u.split([int(torch.tensor(shape).prod()) for shape in shapes], 1)
        return self.transform.synthesis([None, *(p.reshape(len(u), *s) for p, s in zip(parts, shapes, strict=True))])

    def clip(self, u: Tensor, weight: float) -> Tensor:
        """Project onto ``|u| ≤ weight``."""
        return u.clamp(-weight, weight)


Sparsity = TotalVariation | WaveletSparsity


def sparse(problem: Measurement, like: Tensor, penalty: Sparsity, weight: float, steps: int = 300) -> Tensor:
    """Minimise ½‖A x − y‖² + weight · ‖K x‖₁ for an operator with ‖A‖ ≤ 1."""
    dual_step = 1 / penalty.bound
    step = 1 / (0.5 + dual_step * penalty.bound)
    y, given, operator = problem.y, problem.given, problem.operator
    x = operator.transposed(y, like, given)
    u = torch.zeros_like(penalty.forward(pack(x)))
    with torch.no_grad():
        for _ in range(steps):
            fit = operator.transposed(operator.predict(x, y, given) - y, like, given)
            pull = unpack(penalty.adjoint(u), is_complex=like.is_complex())
            moved = x - step * (fit + pull)
            u = penalty.clip(u + dual_step * penalty.forward(pack(2 * moved - x)), weight)
            x = moved
    return x


@torch.no_grad()
def pnp_hvae(model: HVAE, problem: Measurement, temperature: float, steps: int = 12) -> Tensor:
    """Alternate between latents in closed form and a linear solve for the image.

    Args:
        model: The model; the vanilla one in the publication.
        problem: What was measured.
        temperature: Of the prior, at most 1: its precision counts ``1/temperature² − 1`` times beside the
            posterior's.
        steps: Alternations.
    """
    model.eval()
    weight = 1 / temperature**2 - 1
    x = problem.guess(model)
    for _ in range(steps):
        seen = model.observe(x)
        context, bands = model.start.expand(len(x), *model.start.shape[1:]), list[Tensor]()
        for i, subset in enumerate(model.subsets):
            latents: list[Tensor] = []
            flow = context
            evidence = model.decoder.evidence(i, seen, bands)
            for m, layer in enumerate(subset.layers):
                q = subset.posterior(m, flow, evidence)
                features = subset.prior_features(m, flow)
                p = layer(features, q.mean).prior
                trust, pull = torch.exp(-2 * q.log_sigma), weight * torch.exp(-2 * p.log_sigma)
                z = (trust * q.mean + pull * p.mean) / (trust + pull)
                flow = layer(features, z).context
                latents.append(z)
            passed = subset(context, latents)
            context = passed.context
            bands.append(passed.band)
        x = problem.correct(model, model.decomp.synthesis(bands))
    return x
