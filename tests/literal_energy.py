"""The energy written as its definition reads: no trick, no shared code. Reference for tests, baseline for timings.

Every directed edge is listed, nodes are gathered by advanced indexing, and gradients are left to autograd.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from contsp_core import Crystals
from contsp_core.energy import ContinuousCGCNN


class LiteralEnergy:
    """E(U) = f_θ(U) + λ_ρ ln²(ρ/ρ₀) with the weights of a :class:`ContinuousCGCNN`, in either form.

    The weights are read once, in evaluation mode (the spectral norm is the one stored). With noise levels f_θ is
    g_θ(U, σ) / σ.
    """

    def __init__(self, model: ContinuousCGCNN) -> None:
        self.config = model.config
        self.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def __call__(self, crystals: Crystals, sigma: Tensor | None = None) -> Tensor:
        """(n_systems,) energies, differentiable in cell and positions; σ is the default one if None."""
        if self.config.noise_max is None:
            to_conv, to_readout, sigma = torch.zeros(len(crystals), self.config.n_conv, 1), torch.zeros(1, 1), 1.0
        else:
            sigma = crystals.volume.new_full((len(crystals),), self.config.noise_default) if sigma is None else sigma
            features = self.noise_features(sigma)
            to_conv = self.linear("noise_features.to_conv", features).reshape(len(sigma), self.config.n_conv, -1)
            to_readout = self.linear("noise_features.to_readout", features)
        radius = self.config.cutoff_multiple * (crystals.volume / crystals.n_atoms) ** (1 / 3)
        i, j, k = directed_edges(crystals, radius.detach())
        system = crystals.system_idx[i]
        vectors = crystals.positions[j] + (k[:, None, :] @ crystals.cell[system])[:, 0] - crystals.positions[i]
        distance = (vectors**2).sum(dim=1).sqrt()
        weight = 1 + torch.cos(math.pi * distance / radius[system])
        edges = i, j, weight, self.basis(distance), vectors / radius[system][:, None]
        nodes = torch.tanh(self.weights["embedding.weight"][crystals.atomic_numbers - 1])
        for layer in range(self.config.n_conv):
            nodes = self.convolution(f"conv_layers.{layer}", nodes, to_conv[crystals.system_idx, layer], *edges)
        return self.read_out(crystals, nodes, to_readout) / sigma + self.density_term(crystals)

    def noise_features(self, sigma: Tensor) -> Tensor:
        """Sixteen Gaussians of ln σ, as far apart as they are wide, from one end of the noise levels to the other."""
        first, last = math.log(self.config.noise_min), math.log(self.config.noise_max)
        centres = [first + (last - first) * place / 15 for place in range(16)]
        return torch.stack([torch.exp(-0.5 * ((sigma.log() - c) / (last - first) * 15) ** 2) for c in centres], dim=1)

    def basis(self, distance: Tensor) -> Tensor:
        """φ_m(d) = exp(−½ ((d − μ_m)/s)²): (n_edges,) -> (n_edges, K)."""
        centres = self.weights["distance_expansion.offset"]
        width = self.config.basis_width * self.config.basis_max / (self.config.n_basis - 1)
        return torch.exp(-0.5 * ((distance[:, None] - centres) / width) ** 2)

    def convolution(
        self, name: str, nodes: Tensor, shift: Tensor, i: Tensor, j: Tensor, weight: Tensor, basis: Tensor, x: Tensor
    ) -> Tensor:
        """Messages m = w σ(u) ⊙ v, (u, v) = (W₁h_i + b₁ + shift + W₂h_j + b₂) ⊙ (W₃φ + b₃), and the update of h_i.

        The paper's: softplus(tanh(Σ m) + h_i). Residual: h_i + W₅ silu(W₄ tanh(Σ m / 5) + b₄ + W₆ tanh(length)) + b₅
        with length = √(1 + |W₇ Σ m x|²) − 1 of a third of the messages.
        """
        sent = self.linear(f"{name}.lin2", nodes[j])
        z = (self.linear(f"{name}.lin1", nodes[i]) + shift[i] + sent) * self.linear(f"{name}.lin3", basis)
        width = self.config.width
        message = weight[:, None] * torch.sigmoid(z[:, :width]) * z[:, width:]
        summed = torch.zeros_like(nodes).index_put((i,), message, accumulate=True)
        if self.config.form == "paper":
            return softplus(torch.tanh(summed) + nodes)
        squares, n_vectors = torch.ones_like(nodes), round(width / 3)
        for axis in range(3):
            part = message[:, :n_vectors] * x[:, [axis]]
            vector = nodes.new_zeros(len(nodes), n_vectors).index_put((i,), part, accumulate=True)
            squares = squares + (vector @ self.weights[f"{name}.lin7.weight"].T) ** 2
        hidden = self.linear(f"{name}.lin4", torch.tanh(summed / 5))
        hidden = hidden + torch.tanh(squares**0.5 - 1) @ self.weights[f"{name}.lin6.weight"].T
        return nodes + self.linear(f"{name}.lin5", silu(hidden))

    def read_out(self, crystals: Crystals, nodes: Tensor, shift: Tensor) -> Tensor:
        """Layers with softplus and a linear one to a scalar: of the mean over the atoms, or (residual) before it."""
        own = crystals.system_idx
        features = (
            self.mean(crystals, nodes) + shift
            if self.config.form == "paper"
            else nodes + shift.expand(len(crystals), -1)[own]
        )
        for layer in range(self.config.n_fc - 1):
            features = softplus(features @ self.normalised(layer).T + self.weights[f"fc_layers.{layer}.bias"])
        energies = self.linear("fc_final", features)
        return (energies if self.config.form == "paper" else self.mean(crystals, energies))[:, 0]

    @staticmethod
    def mean(crystals: Crystals, values: Tensor) -> Tensor:
        """Over the atoms of each crystal: (n_atoms, K) -> (n_systems, K)."""
        summed = values.new_zeros(len(crystals), values.shape[1])
        return summed.index_put((crystals.system_idx,), values, accumulate=True) / crystals.n_atoms[:, None]

    def normalised(self, layer: int) -> Tensor:
        """W / σ(W), the largest singular value σ(W) = uᵀ W v by the stored singular vectors."""
        if not self.config.spectral_norm:
            return self.weights[f"fc_layers.{layer}.weight"]
        prefix = f"fc_layers.{layer}.parametrizations.weight"
        weight = self.weights[f"{prefix}.original"]
        return weight / (self.weights[f"{prefix}.0._u"] @ weight @ self.weights[f"{prefix}.0._v"])

    def density_term(self, crystals: Crystals) -> Tensor:
        """λ_ρ ln²(ρ/ρ₀), 1/ρ₀ the mean of the atomic volumes."""
        volume = self.mean(crystals, self.weights["atomic_volume"][crystals.atomic_numbers][:, None])[:, 0]
        return self.config.density_weight * torch.log(crystals.n_atoms / crystals.volume * volume) ** 2

    def linear(self, name: str, inputs: Tensor) -> Tensor:
        """W x + b of a named layer."""
        return inputs @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]


@torch.no_grad()
def directed_edges(crystals: Crystals, radius: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All (i, j, k) with |x_j + k L − x_i| ≤ R, but not (i, i, 0): one crystal at a time, every image in a wide box.

    Args:
        crystals: the batch.
        radius: (n_systems,) R, Å.

    Returns:
        i and j (n_edges,) int64, and k (n_edges, 3) in the precision of the cell.
    """
    edges, first = [], 0
    for cell, cutoff, n_atoms in zip(crystals.cell, radius, crystals.n_atoms.tolist()):
        positions = crystals.positions[first : first + n_atoms]
        frac = positions @ torch.linalg.inv(cell)
        # faces are 1 / |column of L⁻¹| apart; atoms may lie several cells away from each other
        reach = cutoff * torch.linalg.inv(cell).norm(dim=0) + frac.amax(dim=0) - frac.amin(dim=0)
        images = torch.cartesian_prod(*[torch.arange(-n, n + 1) for n in reach.ceil().long().tolist()]).to(cell)
        vectors = positions[None, :, None] + images @ cell - positions[:, None, None]
        near = vectors.norm(dim=3) <= cutoff
        near[torch.arange(n_atoms), torch.arange(n_atoms), len(images) // 2] = False
        i, j, k = near.nonzero().unbind(1)
        edges.append((first + i, first + j, images[k]))
        first += n_atoms
    i, j, k = (torch.cat(column) for column in zip(*edges))
    return i, j, k
