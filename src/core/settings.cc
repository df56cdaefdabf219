// SPDX-License-Identifier: Apache-2.0
#include "settings.h"

#include <algorithm>
#include <charconv>
#include <stdexcept>

namespace damo {

std::string format_number(double value) {
  char digits[32];
  const auto end = std::to_chars(digits, digits + sizeof digits, value).ptr;
  return std::string(digits, end);
}

double SettingsReader::number(std::string_view name, std::optional<double> default_value, double lowest,
                              double highest) {
  taken_.emplace_back(name);
  const auto found = settings_.find(name);
  if (found == settings_.end() && !default_value) fail(std::string(name) + " is missing, it has no default");
  const double value = found == settings_.end() ? *default_value : found->second;
  // Written so that NaN fails it.
  if (!(value >= lowest && value <= highest)) {
    fail(std::string(name) + " is " + format_number(value) + ", expected a number in [" + format_number(lowest) + ", " +
         format_number(highest) + "]");
  }
  return value;
}

bool SettingsReader::flag(std::string_view name, bool default_value) {
  const double value = number(name, default_value ? 1.0 : 0.0, 0.0, 1.0);
  if (value != 0.0 && value != 1.0) fail(std::string(name) + " is " + format_number(value) + ", expected 0 or 1");
  return value == 1.0;
}

void SettingsReader::expect_all_taken() const {
  for (const auto& [name, value] : settings_) {
    if (std::find(taken_.begin(), taken_.end(), name) != taken_.end()) continue;
    std::string accepted;
    for (const std::string& known : taken_) accepted += (accepted.empty() ? "" : ", ") + known;
    fail("unknown setting \"" + name + "\", expected " + (accepted.empty() ? "none" : "one of: " + accepted));
  }
}

void SettingsReader::fail(const std::string& what) const { throw std::invalid_argument("[" + owner_ + "] " + what); }

}  // namespace damo
