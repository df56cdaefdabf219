# SPDX-License-Identifier: Apache-2.0
"""How far rows are from those of PyTorch's optimizers after 1,000 random steps.

Every optimizer of optimizer_cases.py trains three rows of a storage, some of them in each step, beside what it follows:
torch.optim's optimizer, one for each row, or SparseAdam on the table; for those that torch.optim does not have, the
formulas of their papers in doubles.

    scripts/agreement       prints the table that docs/optimizers.md quotes
"""

from __future__ import annotations

import dataclasses
import tempfile
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

import damo_embedding as de
from optimizer_cases import CASES

ROWS, DIMENSION, STEPS = 3, 16, 1_000
KEYS = np.array([7, -1, 1 << 40])

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


class Peer(Protocol):
    """The same rows in somebody else's hands."""

    def update(self, rows: npt.NDArray[np.int64], gradients: Floats) -> None: ...

    def weights(self) -> npt.NDArray[Any]: ...

    def state(self, entry: str) -> npt.NDArray[Any]:
        """[rows, dimension], or [rows, 1]."""
        ...


# ---------------------------------------------------------------- torch's


class TorchRows:
    """A parameter and an optimizer for each row: a row without a gradient does not move."""

    def __init__(self, name: str, arguments: dict[str, Any], first: Floats) -> None:
        import torch

        self.parameters = [torch.nn.Parameter(torch.from_numpy(row.copy())) for row in first]
        self.optimizers = [getattr(torch.optim, name)([parameter], **arguments) for parameter in self.parameters]

    def update(self, rows: npt.NDArray[np.int64], gradients: Floats) -> None:
        import torch

        for row, gradient in zip(rows, gradients, strict=True):
            self.parameters[row].grad = torch.from_numpy(gradient)
            self.optimizers[row].step()

    def weights(self) -> npt.NDArray[Any]:
        return np.stack([parameter.detach().numpy() for parameter in self.parameters])

    def state(self, entry: str) -> npt.NDArray[Any]:
        pairs = zip(self.parameters, self.optimizers, strict=True)
        return np.stack([optimizer.state[parameter][entry].numpy() for parameter, optimizer in pairs])


class TorchSparseAdam:
    """One parameter with sparse gradients."""

    def __init__(self, arguments: dict[str, Any], first: Floats) -> None:
        import torch

        self.parameter = torch.nn.Parameter(torch.from_numpy(first.copy()))
        self.optimizer = torch.optim.SparseAdam([self.parameter], **arguments)

    def update(self, rows: npt.NDArray[np.int64], gradients: Floats) -> None:
        import torch

        self.parameter.grad = torch.sparse_coo_tensor(
            rows[np.newaxis], torch.from_numpy(gradients), self.parameter.shape, check_invariants=True
        )
        self.optimizer.step()

    def weights(self) -> npt.NDArray[Any]:
        return self.parameter.detach().numpy()

    def state(self, entry: str) -> npt.NDArray[Any]:
        return self.optimizer.state[self.parameter][entry].numpy()


# ------------------------------------------------------------- the papers'


class PaperRows:
    """Rows in doubles; `step` is the paper's update of some of them."""

    entries: tuple[str, ...] = ()
    width = DIMENSION

    def __init__(self, arguments: dict[str, Any], first: Floats) -> None:
        self.a = arguments
        self.w = first.astype(np.float64)
        self.blocks = {entry: np.zeros((ROWS, self.width)) for entry in self.entries}
        self.count = np.zeros((ROWS, 1))

    def update(self, rows: npt.NDArray[np.int64], gradients: Floats) -> None:
        self.count[rows] += 1
        blocks = {entry: block[rows] for entry, block in self.blocks.items()}
        self.w[rows] = self.step(self.w[rows], gradients.astype(np.float64), blocks, self.count[rows])
        for entry, block in blocks.items():
            self.blocks[entry][rows] = block

    def step(self, w: Doubles, g: Doubles, blocks: dict[str, Doubles], count: Doubles) -> Doubles:
        raise NotImplementedError

    def weights(self) -> npt.NDArray[Any]:
        return self.w

    def state(self, entry: str) -> npt.NDArray[Any]:
        return self.blocks[entry]


class PaperRowWiseAdagrad(PaperRows):
    """Mudigere et al. 2022, with the parameters of TorchRec's."""

    entries = ("sum",)
    width = 1

    def __init__(self, arguments: dict[str, Any], first: Floats) -> None:
        super().__init__(arguments, first)
        self.blocks["sum"] += self.a["initial_accumulator_value"]

    def step(self, w: Doubles, g: Doubles, blocks: dict[str, Doubles], count: Doubles) -> Doubles:
        g = g + self.a["weight_decay"] * w
        blocks["sum"] += (g**2).mean(axis=1, keepdims=True)
        rate = self.a["lr"] / (1 + (count - 1) * self.a["lr_decay"])
        return w - rate * g / (np.sqrt(blocks["sum"]) + self.a["eps"])


class PaperLion(PaperRows):
    """Chen et al. 2023, program 1."""

    entries = ("exp_avg",)

    def step(self, w: Doubles, g: Doubles, blocks: dict[str, Doubles], count: Doubles) -> Doubles:
        (beta1, beta2), m = self.a["betas"], blocks["exp_avg"]
        update = np.sign(beta1 * m + (1 - beta1) * g)
        m[...] = beta2 * m + (1 - beta2) * g
        return w - self.a["lr"] * (update + self.a["weight_decay"] * w)


class PaperFTRL(PaperRows):
    """McMahan et al. 2013, algorithm 1: a weight before the first gradient is what was given."""

    entries = ("z", "n")

    def step(self, w: Doubles, g: Doubles, blocks: dict[str, Doubles], count: Doubles) -> Doubles:
        alpha, beta, lambda1, lambda2 = (self.a[name] for name in ("lr", "beta", "lambda1", "lambda2"))
        z, n = blocks["z"], blocks["n"]
        sigma = (np.sqrt(n + g**2) - np.sqrt(n)) / alpha
        z += g - sigma * w
        n += g**2
        weights = -1 / ((beta + np.sqrt(n)) / alpha + lambda2) * (z - np.sign(z) * lambda1)
        return np.where(np.abs(z) <= lambda1, 0.0, weights)


def peer_of(optimizer: Any, first: Floats) -> tuple[str, Peer]:
    """What an optimizer follows, with the same arguments."""
    arguments = {field.name: getattr(optimizer, field.name) for field in dataclasses.fields(optimizer)}
    name = type(optimizer).__name__
    if name in ("RowWiseAdagrad", "Lion", "FTRL"):
        paper = {"RowWiseAdagrad": PaperRowWiseAdagrad, "Lion": PaperLion, "FTRL": PaperFTRL}[name]
        return "the paper's formula in NumPy, in doubles", paper(arguments, first)
    if name == "Adam" and arguments.pop("bias_correction") == "global":
        assert arguments.pop("weight_decay") == 0.0  # it has none
        return "`torch.optim.SparseAdam`", TorchSparseAdam(arguments, first)
    if name == "AMSGrad":
        return "`torch.optim.Adam(amsgrad=True)`", TorchRows("Adam", {**arguments, "amsgrad": True}, first)
    return f"`torch.optim.{name}`", TorchRows(name, arguments, first)


# ---------------------------------------------------------- side by side


def relative(ours: Floats, theirs: npt.NDArray[Any]) -> float:
    """The largest difference of a row's numbers, each relative to its size plus a tenth of the row's largest.

    Without the tenth, a weight that happens to be near 0 would have any difference at all.
    """
    size = np.abs(theirs) + np.abs(theirs).max(axis=1, keepdims=True) / 10
    difference = np.abs(ours - theirs.astype(np.float64))
    return float(np.divide(difference, size, out=difference, where=size > 0).max())


@dataclasses.dataclass(frozen=True)
class Agreement:
    peer: str
    weights: float  # differences, as `relative` has them
    state: float | None  # None: there is none


def compare(storage: de.Storage, optimizer: Any, group: int) -> Agreement:
    """1,000 steps of one optimizer in a new group of the storage, each step on one row at least."""
    rows = de.Embedding(storage, optimizer, de.Normal(), DIMENSION, group)
    peer_name, peer = peer_of(optimizer, rows.lookup(KEYS))
    random = np.random.default_rng(2)
    for _ in range(STEPS):
        touched = np.flatnonzero(random.random(ROWS) < 0.4)
        if touched.size == 0:
            touched = random.integers(0, ROWS, 1)
        gradients = random.standard_normal((touched.size, DIMENSION)).astype(np.float32)
        rows.apply_gradients(KEYS[touched], gradients)
        peer.update(touched, gradients)
    seen = [rows.inspect(int(key)) for key in KEYS]
    states = [relative(np.stack([row.state[entry] for row in seen]), peer.state(entry)) for entry in seen[0].state]
    weights = relative(np.stack([row.weights for row in seen]), peer.weights())
    return Agreement(peer_name, weights, max(states, default=None))


def table() -> str:
    """The largest difference of each optimizer over all of its cases, as docs/optimizers.md has it."""
    found: dict[tuple[str, str], list[Agreement]] = {}
    with tempfile.TemporaryDirectory() as directory, de.Storage(directory + "/rows.damo", memory="64MiB") as storage:
        for group, optimizer in enumerate(CASES):
            agreement = compare(storage, optimizer, group)
            found.setdefault((type(optimizer).__name__, agreement.peer), []).append(agreement)
    lines = ["| | beside | settings | weights | state |", "|---|---|---|---|---|"]
    for (name, peer), agreements in found.items():
        weights = max(agreement.weights for agreement in agreements)
        states = [agreement.state for agreement in agreements if agreement.state is not None]
        lines.append(f"| `{name}` | {peer} | {len(agreements)} | {weights:.0e} | {max(states):.0e} |")
    return "\n".join(lines)


def main() -> None:
    import torch

    torch.set_num_threads(1)
    print(f"After {STEPS} random steps, torch {torch.__version__}; tests allow 1e-5.\n\n{table()}")


if __name__ == "__main__":
    main()
