"""The energy written as its definition reads: no trick, no shared code. Reference for tests, baseline for timings.

Every directed edge is listed, nodes are gathered by advanced indexing, and gradients are left to autograd.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from contsp_core import Crystals
from contsp_core.energy import ContinuousCGCNN


class LiteralEnergy:
    """E(U) = f_θ(U) + λ_ρ ln²(ρ/ρ₀) with the weights of a :class:`ContinuousCGCNN` without noise levels.

    The weights are read once, in evaluation mode (the spectral norm is the one stored).
    """

    def __init__(self, model: ContinuousCGCNN) -> None:
        self.config = model.config
        self.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def __call__(self, crystals: Crystals) -> Tensor:
        """(n_systems,) energies, differentiable in cell and positions."""
        radius = self.config.cutoff_multiple * (crystals.volume / crystals.n_atoms) ** (1 / 3)
        i, j, k = directed_edges(crystals, radius.detach())
        system = crystals.system_idx[i]
        vectors = crystals.positions[j] + (k[:, None, :] @ crystals.cell[system])[:, 0] - crystals.positions[i]
        distance = (vectors**2).sum(dim=1).sqrt()
        weight = 1 + torch.cos(math.pi * distance / radius[system])
        basis = self.basis(distance)
        nodes = torch.tanh(self.weights["embedding.weight"][crystals.atomic_numbers - 1])
        for layer in range(self.config.n_conv):
            nodes = self.convolution(f"conv_layers.{layer}", nodes, i, j, weight, basis)
        return self.read_out(crystals, nodes) + self.density_term(crystals)

    def basis(self, distance: Tensor) -> Tensor:
        """φ_m(d) = exp(−½ ((d − μ_m)/s)²): (n_edges,) -> (n_edges, K)."""
        centres = self.weights["distance_expansion.offset"]
        width = self.config.basis_width * self.config.basis_max / (self.config.n_basis - 1)
        return torch.exp(-0.5 * ((distance[:, None] - centres) / width) ** 2)

    def convolution(self, name: str, nodes: Tensor, i: Tensor, j: Tensor, weight: Tensor, basis: Tensor) -> Tensor:
        """h′_i = softplus(tanh(Σ_j w σ(u) ⊙ v) + h_i), (u, v) = (W₁h_i + b₁ + W₂h_j + b₂) ⊙ (W₃φ + b₃)."""
        z = (self.linear(f"{name}.lin1", nodes[i]) + self.linear(f"{name}.lin2", nodes[j])) * self.linear(
            f"{name}.lin3", basis
        )
        width = self.config.width
        message = weight[:, None] * torch.sigmoid(z[:, :width]) * z[:, width:]
        summed = torch.zeros_like(nodes).index_put((i,), message, accumulate=True)
        return softplus(torch.tanh(summed) + nodes)

    def read_out(self, crystals: Crystals, nodes: Tensor) -> Tensor:
        """Mean over the atoms, spectrally normalised layers with softplus, and a linear layer to a scalar."""
        summed = nodes.new_zeros(len(crystals), nodes.shape[1])
        features = summed.index_put((crystals.system_idx,), nodes, accumulate=True) / crystals.n_atoms[:, None]
        for layer in range(self.config.n_fc - 1):
            features = softplus(features @ self.normalised(layer).T + self.weights[f"fc_layers.{layer}.bias"])
        return self.linear("fc_final", features)[:, 0]

    def normalised(self, layer: int) -> Tensor:
        """W / σ(W), the largest singular value σ(W) = uᵀ W v by the stored singular vectors."""
        if not self.config.spectral_norm:
            return self.weights[f"fc_layers.{layer}.weight"]
        prefix = f"fc_layers.{layer}.parametrizations.weight"
        weight = self.weights[f"{prefix}.original"]
        return weight / (self.weights[f"{prefix}.0._u"] @ weight @ self.weights[f"{prefix}.0._v"])

    def density_term(self, crystals: Crystals) -> Tensor:
        """λ_ρ ln²(ρ/ρ₀)."""
        return (
            self.config.density_weight
            * torch.log(crystals.n_atoms / crystals.volume / self.config.reference_density) ** 2
        )

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
