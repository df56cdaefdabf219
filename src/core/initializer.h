// SPDX-License-Identifier: Apache-2.0
//
// First weights of a row: a pure function of (seed, stream, key, position),
// drawn by counter (Philox 4x32-10), so that a row starts the same in any order
// of arrival, on any number of threads, machines and restarts. No engine, no
// lock, no state. The bits do not depend on the machine's libm: what is beyond
// +, -, *, / and sqrt is our own code.
//
// The function, part of the persistent format (a row that was only looked up is
// stored without its floats); docs/initializers.md says it for users:
//   subkey   = philox4x32(counter = {low(stream), high(stream), 0, 0}, key = {low(seed), high(seed)})
//   word(i)  = philox4x32(counter = {low(key), high(key), i / 4, 0}, key = {subkey[0], subkey[1]})[i % 4]
// low and high are the 32-bit halves of a 64-bit number. The counter's last word tells uses apart: 0 is first
// weights, other values are kept for later uses of the same (seed, stream, key).
// From the word w of position i, in doubles, rounded once to float32:
//   uniform            low + (high - low) * (w * 2^-32), low and high rounded to float32 first; a result that
//                      rounds up to high becomes the float before it
//   normal             mean + std * inverse_normal_cdf((w + 0.5) * 2^-32)
//   truncated_normal   mean + std * z, z = inverse_normal_cdf(P + Q * ((w + 0.5) * 2^-32)) clamped to [-2, 2],
//                      P = 0.02275013194817921 and Q = 0.9544997361036416 the normal mass below -2 and in [-2, 2]:
//                      the distribution of "redraw what is beyond 2 std", without redrawing
//   xavier_uniform     uniform with high = gain * sqrt(6 / dimension), low = -high
//   xavier_normal      normal with std = gain * sqrt(2 / dimension), mean = 0
//   kaiming_uniform    uniform with high = sqrt(6 / ((1 + a * a) * dimension)), low = -high
//   kaiming_normal     normal with std = sqrt(2 / ((1 + a * a) * dimension)), mean = 0
// One word a weight: a row of a smaller dimension is the start of a larger one, but for the scale of the last four.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "settings.h"

namespace damo {

class Initializer {
 public:
  virtual ~Initializer() = default;
  virtual std::string_view name() const noexcept = 0;  // part of the persistent format
  virtual Settings settings() const = 0;               // what makes an equal initializer; kept in the manifest
  // Fills `weights` (the row's dimension). `stream` tells the groups of a storage apart: the group's
  // number, or a hash of its name. All 64 bits of `key` count.
  virtual void fill(uint64_t seed, uint64_t stream, uint64_t key, std::span<float> weights) const noexcept = 0;
};

// As make_optimizer: checks every setting, std::invalid_argument names what is wrong.
std::unique_ptr<Initializer> make_initializer(std::string_view name, const Settings& settings);
std::vector<std::string> initializer_names();

// ln x for positive normal x, relative error below 1e-15: x = m * 2^e with m in [sqrt(1/2), sqrt(2)),
// s = (m - 1) / (m + 1), then e * ln 2 + 2 s * (1 + s^2/3 + ... + s^22/23) by Horner's rule.
double natural_log(double x) noexcept;

// The quantile of the standard normal distribution for p in [2^-33, 1 - 2^-33], relative error about 1e-15:
// Wichura, "Algorithm AS 241: the percentage points of the normal distribution", Applied Statistics 37 (1988),
// PPND16, with natural_log. (Its third branch is for p beyond this range.)
double inverse_normal_cdf(double p) noexcept;

}  // namespace damo
