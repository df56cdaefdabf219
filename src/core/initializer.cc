// SPDX-License-Identifier: Apache-2.0
#include "initializer.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <stdexcept>

#include "philox.h"

namespace damo {
namespace {

// Beyond it mean + std * z would leave float32.
constexpr double kMaxNormal = 1e37;

PhiloxKey halves(uint64_t value) noexcept { return {static_cast<uint32_t>(value), static_cast<uint32_t>(value >> 32)}; }

// weights[i] = draw(word(i)), the words as initializer.h defines them.
template <class Draw>
void fill_from_words(uint64_t seed, uint64_t stream, uint64_t key, std::span<float> weights,
                     const Draw& draw) noexcept {
  const PhiloxKey s = halves(stream);
  const PhiloxCounter derived = philox4x32({s[0], s[1], 0, 0}, halves(seed));
  const PhiloxKey subkey = {derived[0], derived[1]};
  const PhiloxKey k = halves(key);
  for (size_t begin = 0; begin < weights.size(); begin += 4) {
    const PhiloxCounter words = philox4x32({k[0], k[1], static_cast<uint32_t>(begin / 4), 0}, subkey);
    const size_t count = std::min<size_t>(4, weights.size() - begin);
    for (size_t i = 0; i < count; ++i) weights[begin + i] = draw(words[i]);
  }
}

// The middle of the word's cell of (0, 1): never 0 or 1, symmetric about 1/2, exact.
double open_unit(uint32_t word) noexcept { return (static_cast<double>(word) + 0.5) * 0x1p-32; }

// Highest power first.
template <size_t N>
double horner(const std::array<double, N>& coefficients, double x) noexcept {
  double value = coefficients[0];
  for (size_t i = 1; i < N; ++i) value = value * x + coefficients[i];
  return value;
}

void fill_uniform(float low, float high, uint64_t seed, uint64_t stream, uint64_t key,
                  std::span<float> weights) noexcept {
  const double from = low, range = static_cast<double>(high) - from;
  const float before_high = std::nextafter(high, low);
  fill_from_words(seed, stream, key, weights, [&](uint32_t word) noexcept {
    const auto weight = static_cast<float>(from + range * (static_cast<double>(word) * 0x1p-32));
    return weight < high ? weight : before_high;
  });
}

void fill_normal(double mean, double std, uint64_t seed, uint64_t stream, uint64_t key,
                 std::span<float> weights) noexcept {
  fill_from_words(seed, stream, key, weights, [&](uint32_t word) noexcept {
    return static_cast<float>(mean + std * inverse_normal_cdf(open_unit(word)));
  });
}

// ------------------------------------------------------------ the list's entries

class Constant : public Initializer {
 public:
  Constant(std::string_view name, float value, Settings settings)
      : name_(name), value_(value), settings_(std::move(settings)) {}
  std::string_view name() const noexcept override { return name_; }
  Settings settings() const override { return settings_; }
  void fill(uint64_t, uint64_t, uint64_t, std::span<float> weights) const noexcept override {
    std::fill(weights.begin(), weights.end(), value_);
  }

 private:
  std::string_view name_;
  float value_;
  Settings settings_;
};

class Uniform final : public Initializer {
 public:
  Uniform(double low, double high)
      : settings_{{"low", low}, {"high", high}}, low_(static_cast<float>(low)), high_(static_cast<float>(high)) {}
  std::string_view name() const noexcept override { return "uniform"; }
  Settings settings() const override { return settings_; }
  void fill(uint64_t seed, uint64_t stream, uint64_t key, std::span<float> weights) const noexcept override {
    fill_uniform(low_, high_, seed, stream, key, weights);
  }

 private:
  Settings settings_;
  float low_;
  float high_;
};

class Normal final : public Initializer {
 public:
  Normal(double mean, double std) : mean_(mean), std_(std) {}
  std::string_view name() const noexcept override { return "normal"; }
  Settings settings() const override { return {{"mean", mean_}, {"std", std_}}; }
  void fill(uint64_t seed, uint64_t stream, uint64_t key, std::span<float> weights) const noexcept override {
    fill_normal(mean_, std_, seed, stream, key, weights);
  }

 private:
  double mean_;
  double std_;
};

class TruncatedNormal final : public Initializer {
 public:
  TruncatedNormal(double mean, double std) : mean_(mean), std_(std) {}
  std::string_view name() const noexcept override { return "truncated_normal"; }
  Settings settings() const override { return {{"mean", mean_}, {"std", std_}}; }
  void fill(uint64_t seed, uint64_t stream, uint64_t key, std::span<float> weights) const noexcept override {
    constexpr double kMassBelow = 0.02275013194817921;  // of the normal distribution, below -2
    constexpr double kMassWithin = 0.9544997361036416;  // in [-2, 2]
    fill_from_words(seed, stream, key, weights, [&](uint32_t word) noexcept {
      // The clamp: the last cells' quantiles may round past 2.
      const double z = std::clamp(inverse_normal_cdf(kMassBelow + kMassWithin * open_unit(word)), -2.0, 2.0);
      return static_cast<float>(mean_ + std_ * z);
    });
  }

 private:
  double mean_;
  double std_;
};

// Weights whose spread follows the row's dimension: gain * sqrt(square / (shrink * dimension)).
struct Spread {
  double gain;
  double square;
  double shrink;
  double at(size_t dimension) const noexcept {
    return gain * std::sqrt(square / (shrink * static_cast<double>(dimension)));
  }
};

class SpreadUniform final : public Initializer {  // within the spread
 public:
  SpreadUniform(std::string_view name, const Spread& bound, Settings settings)
      : name_(name), bound_(bound), settings_(std::move(settings)) {}
  std::string_view name() const noexcept override { return name_; }
  Settings settings() const override { return settings_; }
  void fill(uint64_t seed, uint64_t stream, uint64_t key, std::span<float> weights) const noexcept override {
    const auto bound = static_cast<float>(bound_.at(weights.size()));
    fill_uniform(-bound, bound, seed, stream, key, weights);
  }

 private:
  std::string_view name_;
  Spread bound_;
  Settings settings_;
};

class SpreadNormal final : public Initializer {  // the spread is the standard deviation
 public:
  SpreadNormal(std::string_view name, const Spread& std, Settings settings)
      : name_(name), std_(std), settings_(std::move(settings)) {}
  std::string_view name() const noexcept override { return name_; }
  Settings settings() const override { return settings_; }
  void fill(uint64_t seed, uint64_t stream, uint64_t key, std::span<float> weights) const noexcept override {
    fill_normal(0.0, std_.at(weights.size()), seed, stream, key, weights);
  }

 private:
  std::string_view name_;
  Spread std_;
  Settings settings_;
};

using Made = std::unique_ptr<Initializer>;

Made make_zeros(SettingsReader&) { return std::make_unique<Constant>("zeros", 0.0f, Settings{}); }

Made make_ones(SettingsReader&) { return std::make_unique<Constant>("ones", 1.0f, Settings{}); }

Made make_constant(SettingsReader& reader) {
  const double value = reader.number("value", std::nullopt, -kMaxFloat, kMaxFloat);
  return std::make_unique<Constant>("constant", static_cast<float>(value), Settings{{"value", value}});
}

Made make_uniform(SettingsReader& reader) {
  const double low = reader.number("low", std::nullopt, -kMaxFloat, kMaxFloat);
  const double high = reader.number("high", std::nullopt, -kMaxFloat, kMaxFloat);
  if (!(static_cast<float>(low) < static_cast<float>(high))) {
    reader.fail("low is " + format_number(low) + " and high is " + format_number(high) +
                ", expected low < high as float32; for one value use constant");
  }
  return std::make_unique<Uniform>(low, high);
}

template <class Distribution>
Made make_normal(SettingsReader& reader) {
  const double mean = reader.number("mean", 0.0, -kMaxNormal, kMaxNormal);
  const double std = reader.number("std", 1.0, 0.0, kMaxNormal);
  return std::make_unique<Distribution>(mean, std);
}

template <class Distribution>
Made make_xavier(std::string_view name, double square, SettingsReader& reader) {
  const double gain = reader.number("gain", 1.0, kMinNormalFloat, kMaxNormal);
  return std::make_unique<Distribution>(name, Spread{gain, square, 1.0}, Settings{{"gain", gain}});
}

template <class Distribution>
Made make_kaiming(std::string_view name, double square, SettingsReader& reader) {
  const double a = reader.number("a", 0.0, 0.0, kMaxNormal);
  return std::make_unique<Distribution>(name, Spread{1.0, square, 1.0 + a * a}, Settings{{"a", a}});
}

Made make_xavier_uniform(SettingsReader& reader) { return make_xavier<SpreadUniform>("xavier_uniform", 6.0, reader); }

Made make_xavier_normal(SettingsReader& reader) { return make_xavier<SpreadNormal>("xavier_normal", 2.0, reader); }

Made make_kaiming_uniform(SettingsReader& reader) {
  return make_kaiming<SpreadUniform>("kaiming_uniform", 6.0, reader);
}

Made make_kaiming_normal(SettingsReader& reader) { return make_kaiming<SpreadNormal>("kaiming_normal", 2.0, reader); }

struct Entry {
  std::string_view name;
  Made (*make)(SettingsReader&);
};

// Every initializer there is. Names are part of the persistent format: add, never change.
constexpr Entry kInitializers[] = {
    {"zeros", make_zeros},
    {"ones", make_ones},
    {"constant", make_constant},
    {"uniform", make_uniform},
    {"normal", make_normal<Normal>},
    {"truncated_normal", make_normal<TruncatedNormal>},
    {"xavier_uniform", make_xavier_uniform},
    {"xavier_normal", make_xavier_normal},
    {"kaiming_uniform", make_kaiming_uniform},
    {"kaiming_normal", make_kaiming_normal},
};

}  // namespace

double natural_log(double x) noexcept {
  constexpr uint64_t kFraction = (uint64_t{1} << 52) - 1;
  const auto bits = std::bit_cast<uint64_t>(x);
  int exponent = static_cast<int>(bits >> 52) - 1022;
  double m = std::bit_cast<double>((bits & kFraction) | uint64_t{1022} << 52);  // in [1/2, 1)
  if (m < 0.7071067811865476) {
    m += m;
    --exponent;
  }
  static constexpr std::array<double, 12> series = {1.0 / 23, 1.0 / 21, 1.0 / 19, 1.0 / 17, 1.0 / 15, 1.0 / 13,
                                                    1.0 / 11, 1.0 / 9,  1.0 / 7,  1.0 / 5,  1.0 / 3,  1.0};
  const double s = (m - 1.0) / (m + 1.0);
  return exponent * 0.6931471805599453 + (2.0 * s) * horner(series, s * s);
}

double inverse_normal_cdf(double p) noexcept {
  static constexpr std::array<double, 8> centre_numerator = {
      2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4,
      1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.3871328727963666080e0};
  static constexpr std::array<double, 8> centre_denominator = {
      5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4, 2.1213794301586595867e4,
      5.3941960214247511077e3, 6.8718700749205790830e2, 4.2313330701600911252e1, 1.0};
  static constexpr std::array<double, 8> tail_numerator = {
      7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258e0,
      3.64784832476320460504e0,  5.76949722146069140550e0,  4.63033784615654529590e0,  1.42343711074968357734e0};
  static constexpr std::array<double, 8> tail_denominator = {
      1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1,
      6.89767334985100004550e-1, 1.67638483018380384940e0,  2.05319162663775882187e0,  1.0};
  const double q = p - 0.5;
  if (std::abs(q) <= 0.425) {
    const double r = 0.180625 - q * q;
    return q * horner(centre_numerator, r) / horner(centre_denominator, r);
  }
  const double tail = q < 0.0 ? p : 1.0 - p;
  const double r = std::sqrt(-natural_log(tail)) - 1.6;
  const double z = horner(tail_numerator, r) / horner(tail_denominator, r);
  return q < 0.0 ? -z : z;
}

std::unique_ptr<Initializer> make_initializer(std::string_view name, const Settings& settings) {
  std::string known;
  for (const Entry& entry : kInitializers) {
    if (entry.name == name) {
      SettingsReader reader("initializer " + std::string(name), settings);
      auto initializer = entry.make(reader);
      reader.expect_all_taken();
      return initializer;
    }
    known += (known.empty() ? "" : ", ") + std::string(entry.name);
  }
  throw std::invalid_argument("[initializer] unknown name \"" + std::string(name) + "\", expected one of: " + known);
}

std::vector<std::string> initializer_names() {
  std::vector<std::string> names;
  for (const Entry& entry : kInitializers) names.emplace_back(entry.name);
  return names;
}

}  // namespace damo
