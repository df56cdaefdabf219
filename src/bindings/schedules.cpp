// SPDX-License-Identifier: Apache-2.0
//
// schedule.h for Python. A rate is described by (name, settings, what follows a warm-up or None), or it is a function
// of the step, which is called with the interpreter lock: nobody may wait for a lock of the core while holding that
// one.
#include "schedules.h"

#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

namespace nb = nanobind;
using namespace nb::literals;
using damo::bindings::Rate;

namespace {

class FunctionSchedule final : public damo::Schedule {
 public:
  explicit FunctionSchedule(std::shared_ptr<damo::bindings::Function> function) : function_(std::move(function)) {}
  double rate(uint64_t step) const override {
    const nb::gil_scoped_acquire held;
    // Of our own, for as long as the call takes: another thread may give the group another rate meanwhile.
    const nb::object call = function_->object;
    if (!call.is_valid())
      throw std::runtime_error("[schedule] the function that makes the rate was collected: set lr again");
    return nb::cast<double>(call(step));
  }

 private:
  std::shared_ptr<damo::bindings::Function> function_;
};

std::shared_ptr<const damo::Schedule> build(nb::handle description,
                                            std::shared_ptr<damo::bindings::Function>& function) {
  if (!nb::isinstance<nb::tuple>(description)) {
    function = std::make_shared<damo::bindings::Function>(nb::borrow(description));
    return std::make_shared<FunctionSchedule>(function);
  }
  const auto parts = nb::cast<nb::tuple>(description);
  const auto settings = nb::cast<std::map<std::string, double>>(parts[1]);
  std::shared_ptr<const damo::Schedule> then;
  if (!parts[2].is_none()) then = build(parts[2], function);
  return damo::make_schedule(nb::cast<std::string>(parts[0]), {settings.begin(), settings.end()}, std::move(then));
}

// A function may know its own storage, and the storage's table knows the function: the collector must see that circle,
// or the storage would stay open. It sees it here, for whoever sets a rate keeps it beside the storage (rates.py).
int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  if (!nb::inst_ready(self)) return 0;
  const Rate* rate = nb::inst_ptr<Rate>(self);
  if (rate->function) Py_VISIT(rate->function->object.ptr());
  return 0;
}

int clear(PyObject* self) {
  Rate* rate = nb::inst_ptr<Rate>(self);
  if (rate->function) rate->function->object.reset();
  return 0;
}

PyType_Slot slots[] = {
    {Py_tp_traverse, reinterpret_cast<void*>(traverse)}, {Py_tp_clear, reinterpret_cast<void*>(clear)}, {0, nullptr}};

}  // namespace

void bind_schedules(nb::module_& m) {
  nb::class_<Rate>(m, "Rate", nb::type_slots(slots), "What a group's updates take their rate from.")
      .def(
          "__init__",
          [](Rate* rate, nb::handle description) {
            std::shared_ptr<damo::bindings::Function> function;
            std::shared_ptr<const damo::Schedule> schedule = build(description, function);
            new (rate) Rate{std::move(schedule), std::move(function)};
          },
          "description"_a, nb::sig("def __init__(self, description: object) -> None"))
      .def(
          "at", [](const Rate& rate, uint64_t step) { return rate.schedule->rate(step); }, "step"_a,
          "The rate of the update number `step`, 0 for the first.");
  m.def("schedule_names", &damo::schedule_names, "Every schedule of the core.");
}
