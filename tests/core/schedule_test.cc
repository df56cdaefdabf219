// SPDX-License-Identifier: Apache-2.0
#include "schedule.h"

#include <doctest/doctest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>

namespace damo {
namespace {

std::string message_of(std::string_view name, const Settings& settings, std::shared_ptr<const Schedule> then = {}) {
  try {
    make_schedule(name, settings, std::move(then));
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "nothing was thrown";
}

double rate(std::string_view name, const Settings& settings, uint64_t step) {
  return make_schedule(name, settings)->rate(step);
}

// A whole set of settings for each name that nothing follows.
Settings settings_of(const std::string& name) {
  if (name == "constant") return {{"lr", 0.5}};
  Settings settings{{"lr", 0.5}, {"decay_steps", 100}};
  if (name == "exponential_decay" || name == "natural_exponential_decay" || name == "inverse_time_decay")
    settings["decay_rate"] = 0.25;
  return settings;
}

TEST_CASE("schedules give what one computes by hand") {
  const Settings half{{"lr", 0.5}, {"decay_steps", 100}, {"decay_rate", 0.25}};
  CHECK(rate("constant", {{"lr", 0.5}}, 12345) == 0.5);
  CHECK(rate("exponential_decay", half, 50) == doctest::Approx(0.25).epsilon(1e-15));
  CHECK(rate("exponential_decay", half, 200) == doctest::Approx(0.03125).epsilon(1e-15));
  CHECK(rate("polynomial_decay", {{"lr", 0.5}, {"decay_steps", 100}, {"end_lr", 0.1}}, 25) ==
        doctest::Approx(0.4).epsilon(1e-15));
  CHECK(rate("polynomial_decay", {{"lr", 0.5}, {"decay_steps", 100}, {"end_lr", 0.1}, {"power", 2.0}}, 50) ==
        doctest::Approx(0.2).epsilon(1e-15));
  CHECK(rate("natural_exponential_decay", half, 400) == doctest::Approx(0.5 / 2.718281828459045).epsilon(1e-15));
  CHECK(rate("inverse_time_decay", half, 400) == doctest::Approx(0.25).epsilon(1e-15));
  CHECK(rate("cosine_decay", {{"lr", 0.5}, {"decay_steps", 100}}, 50) == doctest::Approx(0.25).epsilon(1e-15));
  CHECK(rate("linear_cosine_decay", {{"lr", 0.5}, {"decay_steps", 100}, {"alpha", 0.5}, {"beta", 0.25}}, 50) ==
        doctest::Approx(0.5 * ((0.5 + 0.5) * 0.5 + 0.25)).epsilon(1e-15));
  // A whole period is done half-way, so the cosine is 1 again.
  CHECK(rate("linear_cosine_decay", {{"lr", 0.5}, {"decay_steps", 100}, {"num_periods", 2.0}}, 50) ==
        doctest::Approx(0.5 * (0.5 + 0.001)).epsilon(1e-15));
}

TEST_CASE("schedules begin at their rate, and those with an end stay there") {
  for (const std::string name :
       {"exponential_decay", "polynomial_decay", "natural_exponential_decay", "inverse_time_decay", "cosine_decay"}) {
    CAPTURE(name);
    CHECK(rate(name, settings_of(name), 0) == 0.5);
  }
  const uint64_t last = std::numeric_limits<uint64_t>::max();
  for (const uint64_t step : {uint64_t{100}, uint64_t{101}, last}) {
    CAPTURE(step);
    CHECK(rate("polynomial_decay", {{"lr", 0.5}, {"decay_steps", 100}, {"end_lr", 0.1}}, step) == 0.1);
    CHECK(rate("cosine_decay", settings_of("cosine_decay"), step) == 0.0);
    CHECK(rate("linear_cosine_decay", settings_of("linear_cosine_decay"), step) == 0.5 * 0.001);
  }
}

TEST_CASE("every listed schedule gives a rate at every step") {
  for (const std::string& name : schedule_names()) {
    CAPTURE(name);
    const auto schedule = name == "linear_warmup"
                              ? make_schedule(name, {{"warmup_steps", 10}}, make_schedule("constant", {{"lr", 0.5}}))
                              : make_schedule(name, settings_of(name));
    for (uint64_t step = 0; step < 300; ++step) {
      CHECK(schedule->rate(step) >= 0.0);
      CHECK(schedule->rate(step) <= 0.501);
    }
    for (int bit = 0; bit < 64; ++bit) {
      CHECK(schedule->rate(uint64_t{1} << bit) >= 0.0);
      CHECK(schedule->rate(uint64_t{1} << bit) <= 0.501);
    }
  }
}

TEST_CASE("a warm-up rises in a straight line to where the next schedule begins, which starts at its own step 0") {
  const auto then = make_schedule("exponential_decay", {{"lr", 0.5}, {"decay_steps", 10}, {"decay_rate", 0.5}});
  const auto warm = make_schedule("linear_warmup", {{"warmup_steps", 4}, {"start_lr", 0.1}}, then);
  CHECK(warm->rate(0) == 0.1);
  CHECK(warm->rate(1) == doctest::Approx(0.2).epsilon(1e-15));
  CHECK(warm->rate(3) == doctest::Approx(0.4).epsilon(1e-15));
  for (uint64_t step = 4; step < 50; ++step) CHECK(warm->rate(step) == then->rate(step - 4));
  // A warm-up may follow a warm-up.
  const auto twice = make_schedule("linear_warmup", {{"warmup_steps", 2}}, warm);
  CHECK(twice->rate(0) == 0.0);
  CHECK(twice->rate(1) == 0.05);
  for (uint64_t step = 2; step < 50; ++step) CHECK(twice->rate(step) == warm->rate(step - 2));
}

TEST_CASE("a bad setting of a schedule is refused by name, with what is accepted") {
  CHECK(message_of("step_decay", {}) ==
        "[schedule] unknown name \"step_decay\", expected one of: constant, exponential_decay, polynomial_decay, "
        "natural_exponential_decay, inverse_time_decay, cosine_decay, linear_cosine_decay, linear_warmup");
  CHECK(message_of("cosine_decay", {{"lr", 0.1}}) ==
        "[schedule cosine_decay] decay_steps is missing, it has no default");
  CHECK(message_of("cosine_decay", {{"lr", 0.1}, {"decay_steps", 0}})
            .starts_with("[schedule cosine_decay] decay_steps is 0, expected a number in [1, "));
  CHECK(message_of("cosine_decay", {{"lr", 0.1}, {"decay_steps", 1.5}}) ==
        "[schedule cosine_decay] decay_steps is 1.5, expected a whole number");
  CHECK(message_of("cosine_decay", {{"lr", -0.1}, {"decay_steps", 1}})
            .starts_with("[schedule cosine_decay] lr is -0.1, expected a number in [0, "));
  CHECK(message_of("cosine_decay", {{"lr", 0.1}, {"decay_steps", 1}, {"decay_rate", 0.5}}) ==
        "[schedule cosine_decay] unknown setting \"decay_rate\", expected one of: lr, decay_steps");
  CHECK(message_of("exponential_decay", {{"lr", 0.1}, {"decay_steps", 1}, {"decay_rate", std::nan("")}})
            .starts_with("[schedule exponential_decay] decay_rate is nan"));
  CHECK(message_of("polynomial_decay", {{"lr", 0.1}, {"decay_steps", 1}, {"power", 0.0}})
            .starts_with("[schedule polynomial_decay] power is 0, expected a number in [1.17"));
  CHECK(message_of("linear_warmup", {{"warmup_steps", 1}}) ==
        "[schedule linear_warmup] nothing follows it, expected a rate or a schedule");
  CHECK(message_of("constant", {{"lr", 0.1}}, make_schedule("constant", {{"lr", 0.1}})) ==
        "[schedule constant] something follows it, expected that of linear_warmup alone");
}

}  // namespace
}  // namespace damo
