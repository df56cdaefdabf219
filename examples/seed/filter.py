# SPDX-License-Identifier: Apache-2.0
"""damo.PyFilter: keys that came often enough. `python examples/seed/filter.py [DIRECTORY]`"""

import os
import sys
import tempfile

import damo

directory = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
parameters = damo.Parameters()
parameters.insert("capacity", 10000)
parameters.insert("count", 3)
parameters.insert("path", os.path.join(directory, "filter"))
parameters.insert("fpr", 0.001)
parameters.insert("reload", True)

counter = damo.PyFilter(parameters)
for day in range(3):
    counter.add(7, 1)
    counter.add(9, 2)
    print("day", day + 1, "key 7:", counter.check(7), "key 9:", counter.check(9))
assert [counter.check(key) for key in (7, 8, 9)] == [True, False, True]

again = damo.PyFilter(parameters)  # goes on with the file
assert again.check(7)
