# SPDX-License-Identifier: Apache-2.0
"""Reads a serving file with Python alone: `python examples/read_dump.py weights.bin` prints a line for each row.

The file is described in docs/format.md; examples/read_dump.c does the same in C, damo_embedding.read_dump with NumPy.
"""

import struct
import sys


def read_dump(path):
    """Yields (group, key, weights) for each row; a file that is not whole is a ValueError."""
    with open(path, "rb") as file:
        length = file.seek(0, 2)
        file.seek(0)
        tables = file.read(3072)
        if len(tables) < 3072:
            raise ValueError(f"{path} has {length} bytes, the tables of a dump alone have 3072")
        dimensions, rows = struct.unpack("<256i", tables[:1024]), list(struct.unpack("<256Q", tables[1024:]))
        for group in range(256):
            if dimensions[group] < 0 or (dimensions[group] == 0 and rows[group] > 0):
                raise ValueError(f"{path} has {rows[group]} rows of dimension {dimensions[group]} in group {group}")
        expected = 3072 + sum(n * (12 + 4 * dimension) for n, dimension in zip(rows, dimensions, strict=True))
        if length != expected:
            raise ValueError(f"{path} has {length} bytes, its tables ask for {expected}")
        while file.tell() < length:
            start = file.tell()
            key, group = struct.unpack("<Qi", file.read(12))
            if not 0 <= group < 256 or rows[group] == 0:
                raise ValueError(f"{path} has a row of group {group} too many (offset {start})")
            weights = file.read(4 * dimensions[group])
            if len(weights) < 4 * dimensions[group]:
                raise ValueError(f"{path} ends inside of a row (offset {start})")
            rows[group] -= 1
            yield group, key, struct.unpack(f"<{dimensions[group]}f", weights)


if __name__ == "__main__":
    for group, key, weights in read_dump(sys.argv[1]):
        print(group, key, *(f"{weight:.9g}" for weight in weights))
