// SPDX-License-Identifier: Apache-2.0
//
// Settings of optimizers and initializers: named doubles, checked once at the
// door. The loops behind it trust what it let through.
#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace damo {

// By name, as the user's front door gives them: {"lr": 1e-3, "beta1": 0.9, ...}.
using Settings = std::map<std::string, double, std::less<>>;

inline constexpr double kMaxFloat = std::numeric_limits<float>::max();
inline constexpr double kMinNormalFloat = std::numeric_limits<float>::min();
inline constexpr double kBelowOne = 1.0 - 0x1p-24;  // the largest float below 1

// A double as messages show it: the shortest digits that read back as the same number.
std::string format_number(double value);

// Takes settings out one by one; std::invalid_argument names the setting, its value and what is accepted:
//   [optimizer adam] eps is 0, expected a number in [1.1754943508222875e-38, 3.4028234663852886e+38]
class SettingsReader {
 public:
  // `owner` as messages show it: "optimizer adam".
  SettingsReader(std::string owner, const Settings& settings) : owner_(std::move(owner)), settings_(settings) {}

  // The setting, or its default when it was not given; without a default it must be given.
  double number(std::string_view name, std::optional<double> default_value, double lowest, double highest);
  // 0 or 1, as a bool.
  bool flag(std::string_view name, bool default_value);
  // Throws when a setting was given that nobody asked for.
  void expect_all_taken() const;
  [[noreturn]] void fail(const std::string& what) const;

 private:
  std::string owner_;
  const Settings& settings_;
  std::vector<std::string> taken_;
};

}  // namespace damo
