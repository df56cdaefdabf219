// SPDX-License-Identifier: Apache-2.0
#include "schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <optional>
#include <stdexcept>

namespace damo {
namespace {

using Made = std::shared_ptr<const Schedule>;

constexpr double kMaxSteps = 0x1p53;  // beyond it not every step is a double

// A formula over the step, which is a double from here on.
template <class Rate>
class Formula final : public Schedule {
 public:
  explicit Formula(const Rate& rate) : rate_(rate) {}
  double rate(uint64_t step) const override { return rate_(static_cast<double>(step)); }

 private:
  Rate rate_;
};

template <class Rate>
Made formula(const Rate& rate) {
  return std::make_shared<Formula<Rate>>(rate);
}

class LinearWarmup final : public Schedule {
 public:
  LinearWarmup(double start_lr, double warmup_steps, Made then)
      : start_lr_(start_lr), steps_(warmup_steps), then_(std::move(then)) {}
  double rate(uint64_t step) const override {
    const auto s = static_cast<double>(step);
    if (s >= steps_) return then_->rate(step - static_cast<uint64_t>(steps_));
    return start_lr_ + (then_->rate(0) - start_lr_) * (s / steps_);
  }

 private:
  double start_lr_;
  double steps_;  // a whole number
  Made then_;
};

// ------------------------------------------------------------ the list's entries

double take_rate(SettingsReader& reader, std::string_view name, std::optional<double> default_value = std::nullopt) {
  return reader.number(name, default_value, 0.0, kMaxFloat);
}

double take_steps(SettingsReader& reader, std::string_view name) {
  const double steps = reader.number(name, std::nullopt, 1.0, kMaxSteps);
  if (steps != std::floor(steps))
    reader.fail(std::string(name) + " is " + format_number(steps) + ", expected a whole number");
  return steps;
}

double take_factor(SettingsReader& reader, std::string_view name, std::optional<double> default_value = std::nullopt) {
  return reader.number(name, default_value, 0.0, kMaxFloat);
}

Made make_constant(SettingsReader& reader, const Made&) {
  const double lr = take_rate(reader, "lr");
  return formula([=](double) { return lr; });
}

Made make_exponential_decay(SettingsReader& reader, const Made&) {
  const double lr = take_rate(reader, "lr"), steps = take_steps(reader, "decay_steps");
  const double decay = take_factor(reader, "decay_rate");
  return formula([=](double s) { return lr * std::pow(decay, s / steps); });
}

Made make_polynomial_decay(SettingsReader& reader, const Made&) {
  const double lr = take_rate(reader, "lr"), steps = take_steps(reader, "decay_steps");
  const double end = take_rate(reader, "end_lr", 1e-4);
  const double power = reader.number("power", 1.0, kMinNormalFloat, kMaxFloat);
  return formula([=](double s) { return (lr - end) * std::pow(1.0 - std::min(s, steps) / steps, power) + end; });
}

Made make_natural_exponential_decay(SettingsReader& reader, const Made&) {
  const double lr = take_rate(reader, "lr"), steps = take_steps(reader, "decay_steps");
  const double decay = take_factor(reader, "decay_rate");
  return formula([=](double s) { return lr * std::exp(-decay * s / steps); });
}

Made make_inverse_time_decay(SettingsReader& reader, const Made&) {
  const double lr = take_rate(reader, "lr"), steps = take_steps(reader, "decay_steps");
  const double decay = take_factor(reader, "decay_rate");
  return formula([=](double s) { return lr / (1.0 + decay * s / steps); });
}

Made make_cosine_decay(SettingsReader& reader, const Made&) {
  const double lr = take_rate(reader, "lr"), steps = take_steps(reader, "decay_steps");
  return formula(
      [=](double s) { return lr * (0.5 * (1.0 + std::cos(std::numbers::pi * std::min(s, steps) / steps))); });
}

Made make_linear_cosine_decay(SettingsReader& reader, const Made&) {
  const double lr = take_rate(reader, "lr"), steps = take_steps(reader, "decay_steps");
  const double periods = take_factor(reader, "num_periods", 0.5);
  const double alpha = take_factor(reader, "alpha", 0.0), beta = take_factor(reader, "beta", 1e-3);
  return formula([=](double s) {
    const double m = std::min(s, steps);
    const double cosine = 0.5 * (1.0 + std::cos(2.0 * std::numbers::pi * periods * m / steps));
    return lr * ((alpha + (steps - m) / steps) * cosine + beta);
  });
}

Made make_linear_warmup(SettingsReader& reader, const Made& then) {
  const double start_lr = take_rate(reader, "start_lr", 0.0), steps = take_steps(reader, "warmup_steps");
  return std::make_shared<LinearWarmup>(start_lr, steps, then);
}

struct Entry {
  std::string_view name;
  Made (*make)(SettingsReader&, const Made& then);
  bool is_followed = false;
};

// Every schedule there is. A schedule is not stored, so its name may change; the docs and the front door have it too.
constexpr Entry kSchedules[] = {
    {"constant", make_constant},
    {"exponential_decay", make_exponential_decay},
    {"polynomial_decay", make_polynomial_decay},
    {"natural_exponential_decay", make_natural_exponential_decay},
    {"inverse_time_decay", make_inverse_time_decay},
    {"cosine_decay", make_cosine_decay},
    {"linear_cosine_decay", make_linear_cosine_decay},
    {"linear_warmup", make_linear_warmup, true},
};

}  // namespace

Made make_schedule(std::string_view name, const Settings& settings, Made then) {
  std::string known;
  for (const Entry& entry : kSchedules) {
    if (entry.name == name) {
      SettingsReader reader("schedule " + std::string(name), settings);
      if (entry.is_followed != (then != nullptr))
        reader.fail(entry.is_followed ? "nothing follows it, expected a rate or a schedule"
                                      : "something follows it, expected that of linear_warmup alone");
      Made schedule = entry.make(reader, then);
      reader.expect_all_taken();
      return schedule;
    }
    known += (known.empty() ? "" : ", ") + std::string(entry.name);
  }
  throw std::invalid_argument("[schedule] unknown name \"" + std::string(name) + "\", expected one of: " + known);
}

std::vector<std::string> schedule_names() {
  std::vector<std::string> names;
  for (const Entry& entry : kSchedules) names.emplace_back(entry.name);
  return names;
}

}  // namespace damo
