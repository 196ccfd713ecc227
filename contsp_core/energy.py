"""The energy of a crystal: a graph network that no description changes, continuous in the atoms; and its gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus
from torch.nn.utils.parametrizations import spectral_norm

from contsp_core.crystals import MAX_ATOMIC_NUMBER, Crystals, check_settings
from contsp_core.data import retold
from contsp_core.graph import Graph, build_graph, cutoff_radius, edge_vectors
from contsp_core.lattice import without_skew

try:  # without numba the same energy is computed by the plain torch path
    from contsp_core import kernels
except ImportError:
    kernels = None  # type: ignore[assignment]


@dataclass(frozen=True)
class EnergyConfig:
    """Settings of the energy; the defaults are the paper's for Perov-5 and MP-20."""

    width: int = 32  # D, of node features and of fully connected layers
    n_conv: int = 3
    n_fc: int = 2  # the last one linear, to a scalar
    n_basis: int = 32  # K
    basis_max: float = 20.0  # Å, last centre of the distance basis
    basis_width: float = 3.0  # s in units of the spacing of the centres
    cutoff_multiple: float = 3.0  # R in units of (V / N)^{1/3}
    density_weight: float = 1.0  # λ_ρ
    reference_density: float = 0.05  # ρ₀, Å⁻³, where no atomic volumes were learned
    spectral_norm: bool = True
    form: Literal["paper", "residual"] = "paper"  # of update and read-out
    noise_min: float | None = None  # Å; given for an energy trained at many noise levels σ
    noise_max: float | None = None
    noise_default: float = 0.15  # Å; where the energy is read unless another level is asked for
    strain_noise: float = 0.1  # κ, Å⁻¹: at noise level σ the cell is strained by a Gaussian of width min(κσ, cap)
    strain_cap: float = 1.0
    n_start_cells: int = 1  # training crystals whose cells chains may start from; training sets it to all

    def __post_init__(self) -> None:
        check_settings(self, n_basis=(2, math.inf), density_weight=(0, math.inf))
        low, high = self.noise_min, self.noise_max
        if (low is None) != (high is None) or (low is not None and high is not None and not low < high):
            raise ValueError(f"noise_min, noise_max are {low, high}, expected both None, or 0 < noise_min < noise_max")

    @property
    def n_vectors(self) -> int:
        """How many features of the messages are also summed as vectors."""
        return -(-self.width // 3) if self.form == "residual" else 0


PRESETS: dict[str, EnergyConfig] = {  # of the paper's public configuration files
    "perov5": EnergyConfig(),
    "mp20": EnergyConfig(),
    "mpts52": EnergyConfig(width=64, n_conv=6, n_fc=4, n_basis=64),
    "carbon24": EnergyConfig(width=128, n_conv=6, n_fc=4, n_basis=128),
}
NOISE_LEVELS = EnergyConfig(  # an energy for score matching
    width=96, n_basis=64, basis_max=12.0, basis_width=1.5, cutoff_multiple=2.5, density_weight=0.1,
    spectral_norm=False, form="residual", noise_min=0.02, noise_max=1.5, strain_noise=0.2,
)  # fmt: skip


class GaussianBasis(nn.Module):
    """φ_m(d) = exp(−½ ((d − μ_m) / s)²), μ evenly spaced on [0, basis_max]."""

    def __init__(self, config: EnergyConfig) -> None:
        super().__init__()
        self.offset = nn.Buffer(torch.linspace(0, config.basis_max, config.n_basis))
        self.width = config.basis_width * config.basis_max / (config.n_basis - 1)
        self.reach = config.basis_max + 40 * self.width  # Å; beyond, every φ is zero in either precision

    def forward(self, distance: Tensor) -> Tensor:
        """(...,) Å -> (..., K)."""
        return torch.exp(-0.5 * ((distance[..., None] - self.offset) / self.width) ** 2)

    def slope(self, distance: Tensor) -> Tensor:
        """dφ/dd, (...,) Å -> (..., K)."""
        return -(distance[..., None] - self.offset) / self.width**2 * self(distance)


class ContinuousConv(nn.Module):
    """Messages m_ij = w(d) σ(u) ⊙ v with (u, v) = (W₁h_i + W₂h_j + b) ⊙ (W₃φ(d) + b₃), and the update of h_i.

    The paper's: h′_i = softplus(tanh(Σ_j m_ij) + h_i), which saturates where an atom has many neighbours and knows
    no angles. Residual: h′_i = h_i + W₅ silu(W₄ tanh(Σ_j m_ij / 5) + W₆ tanh(√(1 + |W₇ Σ_j m_ij x_ij / R|²) − 1)), the
    length taken over x, y, z: it changes with the angles between neighbours.
    """

    def __init__(self, config: EnergyConfig) -> None:
        super().__init__()
        self.lin1 = nn.Linear(config.width, 2 * config.width)
        self.lin2 = nn.Linear(config.width, 2 * config.width)
        self.lin3 = nn.Linear(config.n_basis, 2 * config.width)
        self.residual = config.form == "residual"
        if self.residual:
            self.lin4 = nn.Linear(config.width, config.width)
            self.lin5 = nn.Linear(config.width, config.width)
            self.lin6 = nn.Linear(config.width, config.width, bias=False)
            self.lin7 = nn.Linear(config.n_vectors, config.width, bias=False)

    def forward(self, nodes: Tensor, shift: Tensor | float, messages: Callable[..., Tensor]) -> Tensor:
        """(n_atoms, D) -> (n_atoms, D); ``messages(a, b, lin3)`` sums the messages of projected nodes."""
        summed = messages(self.lin1(nodes) + shift, self.lin2(nodes), self.lin3)
        if not self.residual:
            return softplus(torch.tanh(summed) + nodes)
        summed, vectors = summed[:, : nodes.shape[1]], summed[:, nodes.shape[1] :].unflatten(1, (3, -1))
        length = (1 + self.lin7(vectors).square().sum(dim=1)).sqrt() - 1
        hidden = self.lin4(torch.tanh(summed / 5)) + self.lin6(torch.tanh(length))
        return nodes + self.lin5(silu(hidden))


class NoiseFeatures(nn.Module):
    """Smooth features of log σ that shift every layer, so that one network serves all noise levels."""

    def __init__(self, config: EnergyConfig, n_features: int = 16) -> None:
        super().__init__()
        log_min, log_max = (math.log(cast(float, level)) for level in (config.noise_min, config.noise_max))
        self.centre = nn.Buffer(torch.linspace(log_min, log_max, n_features))
        self.width = (log_max - log_min) / (n_features - 1)
        self.to_conv = nn.Linear(n_features, 2 * config.width * config.n_conv)
        self.to_readout = nn.Linear(n_features, config.width)

    def forward(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(n_systems,) Å -> shifts (n_systems, n_conv, 2 D) and (n_systems, D)."""
        features = torch.exp(-0.5 * ((sigma.log()[:, None] - self.centre) / self.width) ** 2)
        return self.to_conv(features).unflatten(1, (-1, 2 * self.to_readout.out_features)), self.to_readout(features)


class ContinuousCGCNN(nn.Module):
    """E(U) = f_θ(U) + λ_ρ ln²(ρ/ρ₀), dimensionless (Tone et al., arXiv 2502.02026).

    The value does not depend on the description of the crystal (basis, images, order, supercell) nor on its
    orientation, origin or handedness, and is continuous in the atoms: an edge comes and goes with weight and slope 0.

    If the configuration has noise levels, f_θ(U) = g_θ(U, σ) / σ, at σ = ``noise_default`` unless σ is given. Score
    matching does not see the relative depth of wells further apart than σ, so another energy may be the better judge.
    Atomic volumes (buffer ``atomic_volume``, Å³), where learned, replace the constant 1/ρ₀.

    Attributes:
        sampling: how its crystals are sampled unless asked otherwise, an ``AnnealConfig`` or ``DiffusionConfig``.
        judge: the energy that ranks its crystals: itself, unless another one is given.
    """

    def __init__(self, config: EnergyConfig = EnergyConfig(), sampling: Any = None, judge: Any = None) -> None:
        super().__init__()
        self.config, self.sampling = config, sampling
        self.judge: ContinuousCGCNN
        vars(self)["judge"] = judge or self  # not as a module: its weights are not this energy's
        self.embedding = nn.Embedding(MAX_ATOMIC_NUMBER, config.width)
        self.distance_expansion = GaussianBasis(config)
        self.conv_layers = nn.ModuleList(ContinuousConv(config) for _ in range(config.n_conv))
        layers = [nn.Linear(config.width, config.width) for _ in range(config.n_fc - 1)]
        self.fc_layers = nn.ModuleList(spectral_norm(layer) if config.spectral_norm else layer for layer in layers)
        self.fc_final = nn.Linear(config.width, 1)
        self.noise_features: NoiseFeatures | Any = NoiseFeatures(config) if config.noise_max is not None else None
        self.atomic_volume = nn.Buffer(torch.full((MAX_ATOMIC_NUMBER + 1,), 1 / config.reference_density))
        if config.noise_max is not None:
            self.start_cells = nn.Buffer(torch.eye(3).repeat(config.n_start_cells, 1, 1))  # Å
            self.start_counts = nn.Buffer(torch.ones(config.n_start_cells, MAX_ATOMIC_NUMBER + 1, dtype=torch.uint8))
        self.cutoff_radius = partial(cutoff_radius, multiple=config.cutoff_multiple)  # of a batch: (n_systems,), Å
        self.use_kernels = kernels is not None

    def forward(self, crystals: Crystals, sigma: Tensor | None = None) -> Tensor:
        """(n_systems,) energies of a batch; ``sigma`` (n_systems,), Å, is for an energy with noise levels only."""
        if sigma is None and self.noise_features is not None:
            sigma = torch.full_like(crystals.cell[:, 0, 0], self.config.noise_default)
        crystals = without_skew(crystals)  # a skewed cell has more images to search than the memory can hold
        messages = self._messages(crystals)
        nodes = torch.tanh(self.embedding(crystals.atomic_numbers - 1))
        to_conv, to_readout = (None, 0.0) if sigma is None else self.noise_features(sigma)
        for layer, conv in enumerate(self.conv_layers):
            shift = 0.0 if to_conv is None else crystals.to_atoms(to_conv[:, layer])
            nodes = conv(nodes, shift, messages)
        if self.config.form == "residual":
            shift = crystals.to_atoms(to_readout) if isinstance(to_readout, Tensor) else to_readout
            energy = crystals.sum_atoms(self._readout(nodes + shift)) / crystals.n_atoms
        else:
            energy = self._readout(crystals.sum_atoms(nodes) / crystals.n_atoms[:, None] + to_readout)
        return (energy if sigma is None else energy / sigma) + self.density_term(crystals)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ContinuousCGCNN:
        if self.judge is not self:  # it follows to another device or precision
            self.judge._apply(fn, recurse)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _readout(self, features: Tensor) -> Tensor:
        """(n, D) -> (n,)."""
        for layer in self.fc_layers:
            features = softplus(layer(features))
        return self.fc_final(features).squeeze(1)

    def density_term(self, crystals: Crystals) -> Tensor:
        """(n_systems,) λ_ρ ln²(ρ/ρ₀), with 1/ρ₀ the mean atomic volume of the composition."""
        expected = crystals.sum_atoms(self.atomic_volume.index_select(0, crystals.atomic_numbers))
        return self.config.density_weight * torch.log(crystals.volume / expected) ** 2

    def _messages(self, crystals: Crystals) -> Callable[[Tensor, Tensor, nn.Linear], Tensor]:
        """Everything about the geometry, as a function that sums the messages of projected nodes."""
        cutoff = self.cutoff_radius(crystals)
        if self.use_kernels and crystals.cell.device.type == "cpu":
            return self._fused_messages(crystals, cutoff)
        graph = build_graph(crystals, cutoff.detach())
        distance, weight, direction = self._edges(crystals, cutoff, graph)
        source, target, n_vectors = graph.source, graph.target, self.config.n_vectors
        basis = self.distance_expansion(distance)

        def messages(received: Tensor, sent: Tensor, lin3: nn.Linear) -> Tensor:
            total = received.new_zeros(len(received), received.shape[1] // 2 + 3 * n_vectors)
            edge_filter = lin3(basis)
            for i, j, sign in ((source, target, 1), (target, source, -1)):
                gate, value = ((received.index_select(0, i) + sent.index_select(0, j)) * edge_filter).chunk(2, dim=1)
                message = weight[:, None] * torch.sigmoid(gate) * value
                vectors = sign * direction[:, :, None] * message[:, None, :n_vectors]
                total = total.index_add(0, i, torch.cat([message, vectors.flatten(1)], dim=1))
            return total

        return messages

    def _edges(self, crystals: Crystals, cutoff: Tensor, graph: Graph) -> tuple[Tensor, ...]:
        """Of each edge: its length d (Å), its weight w(d), and its vector in units of R."""
        vector = edge_vectors(crystals, graph)
        distance = vector.square().sum(dim=1).clamp(min=1e-24).sqrt()
        radius = crystals.to_atoms(cutoff).index_select(0, graph.source)
        # w(d) = 1 + cos(π d / R): zero with zero slope at R; the clamp covers edges that rounding puts a hair beyond
        weight = 1 + torch.cos(math.pi * (distance / radius).clamp(max=1))
        return distance, weight, vector / radius[:, None]

    def _fused_messages(self, crystals: Crystals, cutoff: Tensor) -> Callable[[Tensor, Tensor, nn.Linear], Tensor]:
        edges = kernels.build_edges(crystals, cutoff)
        distance, weight, direction = self._edges(crystals, cutoff, edges.graph)
        # the interpolation error falls as the fourth power of spacing / s: 1e-9 for single, 1e-13 for double precision
        basis = self.distance_expansion
        spacing = basis.width / (16 if distance.dtype == torch.float32 else 240)
        n_nodes = int(min(float(cutoff.detach().nan_to_num(0, 0).max()), basis.reach) / spacing) + 3
        grid = torch.arange(n_nodes, dtype=distance.dtype) * spacing
        values, slopes = (x * (x.abs() > 1e-20) for x in (basis(grid), basis.slope(grid) * spacing))  # no subnormals
        within = distance.clamp(max=basis.reach)  # beyond, the filter is constant

        def messages(received: Tensor, sent: Tensor, lin3: nn.Linear) -> Tensor:
            table = torch.cat([lin3(values), slopes @ lin3.weight.T], dim=1)
            geometry = (within, weight, direction)
            return kernels.message_sum(received, sent, table, geometry, self.config.n_vectors, spacing, edges)

        return messages

    @classmethod
    def from_public_weights(cls, weights: Mapping[str, np.ndarray], preset: str = "perov5") -> ContinuousCGCNN:
        """From weights named as in the public implementation, in their own precision, in evaluation mode.

        A ValueError tells of an unknown preset, or of missing, unexpected or misshapen weights.
        """
        if preset not in PRESETS:
            raise ValueError(f"preset is {preset!r}, expected one of {', '.join(PRESETS)}")
        model = cls(PRESETS[preset])
        state = {name: torch.as_tensor(np.asarray(array)) for name, array in weights.items()}
        dtype = next(iter(state.values())).dtype if state else torch.float32
        with retold(f"weights do not fit preset {preset!r}", RuntimeError):
            model.to(dtype).load_state_dict({"atomic_volume": model.atomic_volume} | state)
        return model.eval()


def portable(model: ContinuousCGCNN) -> ContinuousCGCNN:
    """The same energy for other processes: torch pickles no spectral norms, so they are worked into the weights."""
    if not model.config.spectral_norm and model.judge is model:
        return model
    judge, weights = None if model.judge is model else portable(model.judge), model.state_dict()
    weights |= {f"fc_layers.{i}.weight": layer.weight for i, layer in enumerate(model.fc_layers)}
    with torch.device("meta"):
        plain = ContinuousCGCNN(replace(model.config, spectral_norm=False), model.sampling, judge)
    plain.use_kernels = model.use_kernels
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()}, assign=True)
    return plain.eval().requires_grad_(False)


def energy_and_gradient(
    energy: Callable[..., Tensor], crystals: Crystals, *args: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """E (n_systems,), ∂E/∂ε (n_systems, 3, 3) and ∂E/∂X (n_atoms_total, 3), Å⁻¹, all detached.

    The second is at ε = 0 of L exp(ε), X exp(ε): symmetric for a rotation-invariant energy.
    """
    cell, positions = crystals.cell.detach().requires_grad_(), crystals.positions.detach().requires_grad_()
    with torch.enable_grad():
        value = energy(crystals.replace(cell=cell, positions=positions), *args)
        on_cell, on_positions = torch.autograd.grad(value.sum(), (cell, positions), materialize_grads=True)
    on_atoms = crystals.sum_atoms(crystals.positions[:, :, None] * on_positions[:, None, :])
    return value.detach(), crystals.cell.mT @ on_cell + on_atoms, on_positions
