// SPDX-License-Identifier: Apache-2.0
//
// The extension module damo_embedding._core: declarations, calls, nothing else.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_errors(nb::module_& m);
void bind_filters(nb::module_& m);
void bind_hash_keys(nb::module_& m);
void bind_optimizers(nb::module_& m);
void bind_schedules(nb::module_& m);
void bind_storage(nb::module_& m);
void bind_table(nb::module_& m);

NB_MODULE(_core, m) {
  nb::set_leak_warnings(
      false);  // objects that live until the interpreter ends are no leak, and a library does not print
  m.doc() = "The C++ core of damo_embedding. Private: use damo_embedding's own names.";
  bind_errors(m);
  bind_filters(m);
  bind_hash_keys(m);
  bind_optimizers(m);
  bind_schedules(m);
  bind_table(m);
  bind_storage(m);
}
