# SPDX-License-Identifier: Apache-2.0
"""DeepFM on MovieLens-100K: `python examples/deepfm.py FOLDER_OF_ML_100K`.

Six lines lie between torch.nn.Embedding and our tables:
`diff examples/deepfm_nn_embedding.py examples/deepfm.py`.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

FIELDS = ("user_id", "item_id", "age", "gender", "occupation", "release_year")
DIMENSION, BATCH, EPOCHS = 16, 1024, 4


def read_table(path: Path) -> dict[str, np.ndarray]:
    """Columns of a tab-separated file whose first line names them, as in `user_id:token`."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    cells = np.array([line.split("\t") for line in lines])
    return {column[0].split(":")[0]: column[1:] for column in cells.T}


def read_ratings(folder: Path) -> tuple[dict[str, np.ndarray], torch.Tensor]:
    """The fields of every rating, and whether it has four stars or more."""
    columns = read_table(folder / "ml-100k.inter")
    labels = torch.from_numpy((columns["rating"].astype(np.float32) >= 4).astype(np.float32))
    for kind in ("user", "item"):
        table = read_table(folder / f"ml-100k.{kind}")
        place = {value: i for i, value in enumerate(table[f"{kind}_id"])}
        rows = [place[value] for value in columns[f"{kind}_id"]]
        columns |= {name: column[rows] for name, column in table.items()}
    return {field: columns[field] for field in FIELDS}, labels


class DeepFM(nn.Module):
    def __init__(self, embeddings: nn.ModuleDict) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.bias = nn.Parameter(torch.zeros(()))
        self.network = nn.Sequential(nn.Linear(len(FIELDS) * (DIMENSION - 1), 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, ids: dict[str, torch.Tensor]) -> torch.Tensor:
        rows = torch.stack([self.embeddings[field](ids[field]) for field in FIELDS], dim=1)
        first, factors = rows[..., 0], rows[..., 1:]
        pairs = (factors.sum(1).square() - factors.square().sum(1)).sum(1) / 2
        return self.bias + first.sum(1) + pairs + self.network(factors.flatten(1)).squeeze(1)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    columns, labels = read_ratings(folder)
    vocabularies = {field: np.unique(column) for field, column in columns.items()}
    ids = {field: torch.from_numpy(np.searchsorted(vocabularies[field], column)) for field, column in columns.items()}
    tables = {field: nn.Embedding(len(vocabularies[field]), DIMENSION, sparse=True) for field in FIELDS}
    for table in tables.values():
        nn.init.uniform_(table.weight, -0.05, 0.05)
    model = DeepFM(nn.ModuleDict(tables))
    sparse = torch.optim.SparseAdam(list(model.embeddings.parameters()), lr=5e-3)
    dense = torch.optim.Adam([model.bias, *model.network.parameters()], lr=1e-3)

    shuffled = torch.randperm(len(labels))
    train, test = shuffled[: len(labels) * 8 // 10], shuffled[len(labels) * 8 // 10 :]
    for epoch in range(EPOCHS):
        for batch in train[torch.randperm(len(train))].split(BATCH):
            logits = model({field: values[batch] for field, values in ids.items()})
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels[batch])
            sparse.zero_grad()
            dense.zero_grad()
            loss.backward()
            sparse.step()
            dense.step()
        model.eval()
        with torch.no_grad():
            logits = model({field: values[test] for field, values in ids.items()})
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels[test])
            accuracy = ((logits > 0) == labels[test]).float().mean()
        model.train()
        print(f"epoch {epoch + 1}: test loss {loss:.4f}, accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
