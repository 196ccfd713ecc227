"""What does an energy on a hard-cut graph do? CGCNN with a cutoff, or a fixed number of neighbours, as baselines.

Gated convolutions on concatenated features (Xie & Grossman, Phys. Rev. Lett. 120, 145301, 2018), without batch
normalisation, which would make the energy of a crystal depend on its batch. The weights are random: what these models
show, jumps in the energy, comes from the graph and not from training.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from contsp_core.crystals import MAX_ATOMIC_NUMBER, Crystals
from contsp_core.graph import Graph, build_graph, edge_vectors, nearest_neighbors
from contsp_core.lattice import without_skew

N_BASIS, N_CONVOLUTIONS = 32, 3
TYPICAL_N_NEIGHBORS = 100  # within 8 Å at 0.05 atoms per Å³


class GatedConvolution(nn.Module):
    """h′ᵢ = softplus(hᵢ + c Σ_j sigmoid(W_f z + b_f) ⊙ softplus(W_s z + b_s)), z = [hᵢ, h_j, φ(d)] (eq. 5)."""

    def __init__(self, n_features: int, n_basis: int, message_scale: float) -> None:
        super().__init__()
        self.message_scale = message_scale  # c, one over a typical number of neighbours, not batch normalisation
        self.linear = nn.Linear(2 * n_features + n_basis, 2 * n_features)

    def forward(self, features: Tensor, basis: Tensor, graph: Graph) -> Tensor:
        """Update features (n_atoms, n_features) along directed edges with distance basis (n_edges, n_basis)."""
        z = torch.cat([features[graph.source], features[graph.target], basis], dim=1)
        gate, core = self.linear(z).chunk(2, dim=1)
        messages = self.message_scale * torch.sigmoid(gate) * softplus(core)
        return softplus(features + torch.zeros_like(features).index_add(0, graph.source, messages))


class CGCNN(nn.Module):
    """The energy of a crystal from its hard-cut graph; invariant, but not continuous.

    Args:
        neighbors: "radius" (all within ``cutoff``) or "nearest" (the ``n_neighbors`` nearest of each atom; rounding
            chooses among equally distant ones, so the choice can depend on the description).
        cutoff: radius of the graph, Å; for "nearest" it only fixes the range of the distance Gaussians.
        seed: of the random weights.
    """

    def __init__(
        self, neighbors: str = "radius", cutoff: float = 8.0, n_neighbors: int = 12, n_features: int = 32, seed: int = 0
    ) -> None:
        super().__init__()
        if neighbors not in ("radius", "nearest"):
            raise ValueError(f"neighbors is {neighbors!r}, expected 'radius' or 'nearest'")
        if cutoff <= 0 or n_neighbors < 1 or n_features < 1:
            raise ValueError(f"{cutoff=}, {n_neighbors=}, {n_features=}: too small")
        self.neighbors, self.cutoff, self.n_neighbors = neighbors, cutoff, n_neighbors
        scale = 1 / (TYPICAL_N_NEIGHBORS if neighbors == "radius" else n_neighbors)
        self.embedding = nn.Embedding(MAX_ATOMIC_NUMBER + 1, n_features)
        self.convolutions = nn.ModuleList(GatedConvolution(n_features, N_BASIS, scale) for _ in range(N_CONVOLUTIONS))
        self.hidden, self.readout = nn.Linear(n_features, n_features), nn.Linear(n_features, 1)
        self.register_buffer("centers", torch.linspace(0, cutoff, N_BASIS))
        rng = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            width = 1.0 if parameter is self.embedding.weight else parameter.shape[-1] ** -0.5
            nn.init.normal_(parameter, std=width, generator=rng)

    def cutoff_radius(self, crystals: Crystals) -> Tensor:
        """(n_systems,) the hard cutoff, Å."""
        return torch.full_like(crystals.volume, self.cutoff)

    def forward(self, crystals: Crystals) -> Tensor:
        """(n_systems,) energies, dimensionless, differentiable in cell and positions on a fixed graph."""
        crystals = without_skew(crystals)  # few images to search, whatever the description
        if self.neighbors == "radius":
            graph = build_graph(crystals, self.cutoff_radius(crystals)).directed()
        else:
            graph = nearest_neighbors(crystals, self.n_neighbors)
        distance = edge_vectors(crystals, graph).norm(dim=1, keepdim=True)
        basis = torch.exp(-(((distance - self.centers) / (self.centers[1] - self.centers[0])) ** 2))
        features = self.embedding(crystals.atomic_numbers)
        for convolution in self.convolutions:
            features = convolution(features, basis, graph)
        mean = crystals.sum_atoms(features) / crystals.n_atoms[:, None]
        return self.readout(softplus(self.hidden(softplus(mean)))).squeeze(1)
