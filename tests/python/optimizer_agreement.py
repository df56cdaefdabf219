# SPDX-License-Identifier: Apache-2.0
"""How far rows are from those of PyTorch's optimizers after 1,000 random steps.

Every optimizer of optimizer_cases.py trains three rows of a storage, two of them in every step, beside what it follows:
torch.optim's optimizer, one for each row, or SparseAdam on the table; for those that torch.optim does not have, the
formulas of their papers in doubles. Lion's is in float32, as torch's are: each of its steps is as long as the first, so
the roundings of a thousand add up, and in float32 it is about 1.2e-5 from itself in doubles.

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
CHANCES = np.array([1.0, 1.0, 0.4])  # of a row to be in a step

Floats = npt.NDArray[np.float32]
Numbers = npt.NDArray[Any]  # float32 or float64


class Peer(Protocol):
    """The same rows in somebody else's hands."""

    dtype: np.dtype[Any]

    def update(self, rows: npt.NDArray[np.int64], gradients: Floats) -> None: ...

    def weights(self) -> npt.NDArray[Any]: ...

    def state(self, entry: str) -> npt.NDArray[Any]:
        """[rows, dimension], or [rows, 1]."""
        ...


# ---------------------------------------------------------------- torch's


class TorchRows:
    """A parameter and an optimizer for each row: a row without a gradient does not move."""

    def __init__(self, name: str, arguments: dict[str, Any], first: npt.NDArray[Any]) -> None:
        import torch

        self.dtype = first.dtype
        self.parameters = [torch.nn.Parameter(torch.from_numpy(row.copy())) for row in first]
        self.optimizers = [getattr(torch.optim, name)([parameter], **arguments) for parameter in self.parameters]

    def update(self, rows: npt.NDArray[np.int64], gradients: Floats) -> None:
        import torch

        for row, gradient in zip(rows, gradients, strict=True):
            self.parameters[row].grad = torch.from_numpy(gradient.astype(self.dtype))
            self.optimizers[row].step()

    def weights(self) -> npt.NDArray[Any]:
        return np.stack([parameter.detach().numpy() for parameter in self.parameters])

    def state(self, entry: str) -> npt.NDArray[Any]:
        pairs = zip(self.parameters, self.optimizers, strict=True)
        return np.stack([optimizer.state[parameter][entry].numpy() for parameter, optimizer in pairs])


class TorchSparseAdam:
    """One parameter with sparse gradients."""

    def __init__(self, arguments: dict[str, Any], first: npt.NDArray[Any]) -> None:
        import torch

        self.dtype = first.dtype
        self.parameter = torch.nn.Parameter(torch.from_numpy(first.copy()))
        self.optimizer = torch.optim.SparseAdam([self.parameter], **arguments)

    def update(self, rows: npt.NDArray[np.int64], gradients: Floats) -> None:
        import torch

        self.parameter.grad = torch.sparse_coo_tensor(
            rows[np.newaxis],
            torch.from_numpy(gradients.astype(self.dtype)),
            self.parameter.shape,
            check_invariants=True,
        )
        self.optimizer.step()

    def weights(self) -> npt.NDArray[Any]:
        return self.parameter.detach().numpy()

    def state(self, entry: str) -> npt.NDArray[Any]:
        return self.optimizer.state[self.parameter][entry].numpy()


# ------------------------------------------------------------- the papers'


class PaperRows:
    """Rows in the type of the first weights; `step` is the paper's update of some of them."""

    entries: tuple[str, ...] = ()
    width = DIMENSION

    def __init__(self, arguments: dict[str, Any], first: npt.NDArray[Any]) -> None:
        self.a = arguments
        self.dtype = first.dtype
        self.w = first.copy()
        self.blocks = {entry: np.zeros((ROWS, self.width), self.dtype) for entry in self.entries}
        self.count = np.zeros((ROWS, 1), self.dtype)

    def update(self, rows: npt.NDArray[np.int64], gradients: Floats) -> None:
        self.count[rows] += 1
        blocks = {entry: block[rows] for entry, block in self.blocks.items()}
        self.w[rows] = self.step(self.w[rows], gradients.astype(self.dtype), blocks, self.count[rows])
        for entry, block in blocks.items():
            self.blocks[entry][rows] = block

    def step(self, w: Numbers, g: Numbers, blocks: dict[str, Numbers], count: Numbers) -> Numbers:
        raise NotImplementedError

    def weights(self) -> npt.NDArray[Any]:
        return self.w

    def state(self, entry: str) -> npt.NDArray[Any]:
        return self.blocks[entry]


class PaperRowWiseAdagrad(PaperRows):
    """Mudigere et al. 2022, with the parameters of TorchRec's."""

    entries = ("sum",)
    width = 1

    def __init__(self, arguments: dict[str, Any], first: npt.NDArray[Any]) -> None:
        super().__init__(arguments, first)
        self.blocks["sum"] += self.a["initial_accumulator_value"]

    def step(self, w: Numbers, g: Numbers, blocks: dict[str, Numbers], count: Numbers) -> Numbers:
        g = g + self.a["weight_decay"] * w
        blocks["sum"] += (g**2).mean(axis=1, keepdims=True)
        rate = self.a["lr"] / (1 + (count - 1) * self.a["lr_decay"])
        return w - rate * g / (np.sqrt(blocks["sum"]) + self.a["eps"])


class PaperLion(PaperRows):
    """Chen et al. 2023, program 1."""

    entries = ("exp_avg",)

    def step(self, w: Numbers, g: Numbers, blocks: dict[str, Numbers], count: Numbers) -> Numbers:
        (beta1, beta2), m = self.a["betas"], blocks["exp_avg"]
        update = np.sign(beta1 * m + (1 - beta1) * g)
        m[...] = beta2 * m + (1 - beta2) * g
        return w - self.a["lr"] * (update + self.a["weight_decay"] * w)


class PaperFTRL(PaperRows):
    """McMahan et al. 2013, algorithm 1: a weight before the first gradient is what was given."""

    entries = ("z", "n")

    def step(self, w: Numbers, g: Numbers, blocks: dict[str, Numbers], count: Numbers) -> Numbers:
        alpha, beta, lambda1, lambda2 = (self.a[name] for name in ("lr", "beta", "lambda1", "lambda2"))
        z, n = blocks["z"], blocks["n"]
        sigma = (np.sqrt(n + g**2) - np.sqrt(n)) / alpha
        z += g - sigma * w
        n += g**2
        weights = -1 / ((beta + np.sqrt(n)) / alpha + lambda2) * (z - np.sign(z) * lambda1)
        return np.where(np.abs(z) <= lambda1, 0.0, weights)


def peer_of(optimizer: Any, first: npt.NDArray[Any]) -> tuple[str, Peer]:
    """What an optimizer follows, with the same arguments; most go on in the type of the first weights."""
    arguments = {field.name: getattr(optimizer, field.name) for field in dataclasses.fields(optimizer)}
    name = type(optimizer).__name__
    if name in ("RowWiseAdagrad", "Lion", "FTRL"):
        paper = {"RowWiseAdagrad": PaperRowWiseAdagrad, "Lion": PaperLion, "FTRL": PaperFTRL}[name]
        if name == "Lion":
            return "the paper's formula in NumPy, in float32", paper(arguments, first)
        return "the paper's formula in NumPy, in doubles", paper(arguments, first.astype(np.float64))
    if name == "Adam" and arguments.pop("bias_correction") == "global":
        assert arguments.pop("weight_decay") == 0.0  # it has none
        return "`torch.optim.SparseAdam`", TorchSparseAdam(arguments, first)
    if name == "AMSGrad":
        return "`torch.optim.Adam(amsgrad=True)`", TorchRows("Adam", {**arguments, "amsgrad": True}, first)
    return f"`torch.optim.{name}`", TorchRows(name, arguments, first)


# ---------------------------------------------------------- side by side


def relative(ours: npt.NDArray[Any], theirs: npt.NDArray[Any], share: float = 0.1) -> float:
    """The largest difference of a row's numbers, each relative to its size plus a share of the row's largest.

    With a share of 0, a weight that happens to be near 0 has any difference at all.
    """
    theirs = theirs.astype(np.float64)
    size = np.abs(theirs) + np.abs(theirs).max(axis=1, keepdims=True) * share
    difference = np.abs(ours - theirs)
    return float(np.divide(difference, size, out=difference, where=size > 0).max())


@dataclasses.dataclass(frozen=True)
class Agreement:
    peer: str
    weights: float  # differences, as `relative` has them
    state: float | None  # None: there is none
    alone: float  # of the weights, each relative to its own size alone
    theirs_alone: float | None  # the same of what is followed, in float32 beside itself in doubles; None: not asked


def compare(storage: de.Storage, optimizer: Any, group: int, *, doubles: bool = False) -> Agreement:
    """1,000 steps of one optimizer in a new group of the storage; two rows are in all of them."""
    rows = de.Embedding(storage, optimizer, de.Normal(), DIMENSION, group)
    first = rows.lookup(KEYS)
    peer_name, peer = peer_of(optimizer, first)
    exact = peer_of(optimizer, first.astype(np.float64))[1] if doubles and peer.dtype == np.float32 else None
    random = np.random.default_rng(2)
    for _ in range(STEPS):
        touched = np.flatnonzero(random.random(ROWS) < CHANCES)
        gradients = random.standard_normal((touched.size, DIMENSION)).astype(np.float32)
        rows.apply_gradients(KEYS[touched], gradients)
        peer.update(touched, gradients)
        if exact is not None:
            exact.update(touched, gradients)
    seen = [rows.inspect(int(key)) for key in KEYS]
    states = [relative(np.stack([row.state[entry] for row in seen]), peer.state(entry)) for entry in seen[0].state]
    weights = np.stack([row.weights for row in seen])
    return Agreement(
        peer_name,
        relative(weights, peer.weights()),
        max(states, default=None),
        relative(weights, peer.weights(), share=0.0),
        None if exact is None else relative(peer.weights(), exact.weights(), share=0.0),
    )


def table() -> str:
    """The largest difference of each optimizer over all of its cases, as docs/optimizers.md has it."""
    found: dict[tuple[str, str], list[Agreement]] = {}
    with tempfile.TemporaryDirectory() as directory, de.Storage(directory + "/rows.damo", memory="64MiB") as storage:
        for group, optimizer in enumerate(CASES):
            agreement = compare(storage, optimizer, group, doubles=True)
            found.setdefault((type(optimizer).__name__, agreement.peer), []).append(agreement)
    lines = [
        "| | beside | settings | weights | state | weights, of \\|x\\| alone | its own, of \\|x\\| alone |",
        "|---|---|---|---|---|---|---|",
    ]
    for (name, peer), agreements in found.items():
        weights = max(agreement.weights for agreement in agreements)
        states = [agreement.state for agreement in agreements if agreement.state is not None]
        alone = max(agreement.alone for agreement in agreements)
        torch_s = [agreement.theirs_alone for agreement in agreements if agreement.theirs_alone is not None]
        own = f"{max(torch_s):.0e}" if torch_s else ""
        lines.append(
            f"| `{name}` | {peer} | {len(agreements)} | {weights:.0e} | {max(states):.0e} | {alone:.0e} | {own} |"
        )
    return "\n".join(lines)


def main() -> None:
    import torch

    torch.set_num_threads(1)
    print(f"After {STEPS} random steps, torch {torch.__version__}; tests allow 1e-5.\n\n{table()}")


if __name__ == "__main__":
    main()
