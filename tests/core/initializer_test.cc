// SPDX-License-Identifier: Apache-2.0
#include "initializer.h"

#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <functional>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "philox.h"

namespace damo {
namespace {

std::vector<float> filled(const Initializer& initializer, uint64_t seed, uint64_t stream, uint64_t key,
                          size_t dimension) {
  std::vector<float> weights(dimension, -123.0f);
  initializer.fill(seed, stream, key, weights);
  return weights;
}

std::vector<uint32_t> bits(const std::vector<float>& floats) {
  std::vector<uint32_t> result;
  for (const float value : floats) result.push_back(std::bit_cast<uint32_t>(value));
  return result;
}

std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "nothing was thrown";
}

// Every initializer that draws, with settings.
std::vector<std::unique_ptr<Initializer>> random_initializers() {
  std::vector<std::unique_ptr<Initializer>> all;
  all.push_back(make_initializer("uniform", {{"low", -1.0}, {"high", 1.0}}));
  all.push_back(make_initializer("normal", {}));
  for (const char* name : {"truncated_normal", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal"})
    all.push_back(make_initializer(name, {}));
  return all;
}

bool spread_follows_dimension(const Initializer& initializer) {
  return initializer.name().starts_with("xavier") || initializer.name().starts_with("kaiming");
}

TEST_CASE("philox4x32 gives the known answers of its paper's test suite") {
  // kat_vectors of the authors' Random123 library: philox4x32, 10 rounds.
  CHECK(philox4x32({0, 0, 0, 0}, {0, 0}) == PhiloxCounter{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  constexpr uint32_t ones = 0xffffffff;
  CHECK(philox4x32({ones, ones, ones, ones}, {ones, ones}) ==
        PhiloxCounter{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  CHECK(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
        PhiloxCounter{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

TEST_CASE("first weights are these bits for ever") {
  // From the documented formula in NumPy: initializer(name, settings).weights(42, 7, [0xfedcba9876543210], 6) of
  // tests/python/reference.py.
  const auto check = [](std::string_view name, const Settings& settings, const std::vector<uint32_t>& expected) {
    CHECK(bits(filled(*make_initializer(name, settings), 42, 7, 0xfedcba9876543210, 6)) == expected);
  };
  check("uniform", {{"low", -0.01}, {"high", 0.01}},
        {0x3a1b52e8, 0x3bc149fd, 0xbc04410b, 0x3af7a1eb, 0x3baefef0, 0xba61d298});
  check("normal", {{"mean", 0.0}, {"std", 0.01}},
        {0x3a42d94e, 0x3c06f31a, 0xbc5561f0, 0x3b1ca8f1, 0x3beee759, 0xba8dca17});
  check("truncated_normal", {{"mean", 1.0}, {"std", 2.0}},
        {0x3f922933, 0x40237f55, 0xbfb39ce1, 0x3fba5c66, 0x40184ecb, 0x3f4b248f});
}

TEST_CASE("zeros, ones and constant fill what they say") {
  CHECK(filled(*make_initializer("zeros", {}), 1, 2, 3, 3) == std::vector<float>{0, 0, 0});
  CHECK(filled(*make_initializer("ones", {}), 1, 2, 3, 3) == std::vector<float>{1, 1, 1});
  CHECK(filled(*make_initializer("constant", {{"value", 0.1}}), 1, 2, 3, 2) == std::vector<float>{0.1f, 0.1f});
}

TEST_CASE("first weights are a pure function of seed, stream, key and position") {
  for (const auto& initializer : random_initializers()) {
    CAPTURE(initializer->name());
    const auto row = filled(*initializer, 5, 6, 7, 37);
    filled(*initializer, 8, 9, 10, 16);
    CHECK(filled(*initializer, 5, 6, 7, 37) == row);
    // A smaller dimension is the start of a larger one, unless the weights' spread follows the dimension.
    if (!spread_follows_dimension(*initializer)) {
      for (const size_t dimension : {1u, 3u, 4u, 5u, 36u}) {
        CHECK(filled(*initializer, 5, 6, 7, dimension) == std::vector<float>(row.begin(), row.begin() + dimension));
      }
    }
    // Equal settings, another object.
    CHECK(filled(*make_initializer(initializer->name(), initializer->settings()), 5, 6, 7, 37) == row);
  }
}

TEST_CASE("every bit of seed, stream and key changes the whole row") {
  for (const auto& initializer : random_initializers()) {
    CAPTURE(initializer->name());
    const auto row = filled(*initializer, 0, 0, 0, 8);
    const auto check_all_differ = [&](const std::vector<float>& other) {
      for (size_t i = 0; i < row.size(); ++i) CHECK(other[i] != row[i]);
    };
    for (int bit = 0; bit < 64; ++bit) {
      CAPTURE(bit);
      const uint64_t one = uint64_t{1} << bit;
      check_all_differ(filled(*initializer, one, 0, 0, 8));
      check_all_differ(filled(*initializer, 0, one, 0, 8));
      check_all_differ(filled(*initializer, 0, 0, one, 8));
    }
  }
}

TEST_CASE("seed, stream and key do not stand in for each other") {
  const auto uniform = make_initializer("uniform", {{"low", 0.0}, {"high", 1.0}});
  std::set<std::vector<float>> rows;
  for (uint64_t a = 0; a < 6; ++a) {
    for (uint64_t b = 0; b < 6; ++b) {
      for (uint64_t c = 0; c < 6; ++c) rows.insert(filled(*uniform, a, b, c, 4));
    }
  }
  CHECK(rows.size() == 6 * 6 * 6);
}

TEST_CASE("uniform stays in [low, high) where rounding to float reaches high") {
  // Two floats wide: half of all draws round up to high.
  const float high = std::nextafter(1.0f, 2.0f);
  const auto tight = make_initializer("uniform", {{"low", 1.0}, {"high", high}});
  for (uint64_t key = 0; key < 100; ++key) {
    for (const float weight : filled(*tight, 0, 0, key, 8)) CHECK(weight == 1.0f);
  }
  // 0.1 is not a float; the bounds are the floats nearest to the settings.
  const auto rounded = make_initializer("uniform", {{"low", -0.1}, {"high", 0.1}});
  for (uint64_t key = 0; key < 1000; ++key) {
    for (const float weight : filled(*rounded, 0, 0, key, 8)) {
      CHECK(weight >= -0.1f);
      CHECK(weight < 0.1f);
    }
  }
}

TEST_CASE("truncated_normal stays within two standard deviations and fills them") {
  const auto initializer = make_initializer("truncated_normal", {{"mean", 3.0}, {"std", 0.5}});
  float lowest = 3.0f;
  float highest = 3.0f;
  for (uint64_t key = 0; key < 2000; ++key) {
    for (const float weight : filled(*initializer, 0, 0, key, 16)) {
      lowest = std::min(lowest, weight);
      highest = std::max(highest, weight);
    }
  }
  CHECK(lowest >= 2.0f);
  CHECK(lowest < 2.01f);
  CHECK(highest <= 4.0f);
  CHECK(highest > 3.99f);
}

TEST_CASE("xavier and kaiming are uniform or normal, as wide as the dimension says") {
  for (const size_t dimension : {1u, 2u, 7u, 16u, 100u, 4096u}) {
    CAPTURE(dimension);
    const auto check_uniform = [&](std::string_view name, const Settings& settings, double bound) {
      const auto plain = make_initializer("uniform", {{"low", -bound}, {"high", bound}});
      CHECK(bits(filled(*make_initializer(name, settings), 1, 2, 3, dimension)) ==
            bits(filled(*plain, 1, 2, 3, dimension)));
    };
    const auto check_normal = [&](std::string_view name, const Settings& settings, double std) {
      const auto plain = make_initializer("normal", {{"std", std}});
      CHECK(bits(filled(*make_initializer(name, settings), 1, 2, 3, dimension)) ==
            bits(filled(*plain, 1, 2, 3, dimension)));
    };
    const auto d = static_cast<double>(dimension);
    check_uniform("xavier_uniform", {}, std::sqrt(6.0 / d));
    check_uniform("xavier_uniform", {{"gain", 0.1}}, 0.1 * std::sqrt(6.0 / d));
    check_normal("xavier_normal", {}, std::sqrt(2.0 / d));
    check_normal("xavier_normal", {{"gain", 3.0}}, 3.0 * std::sqrt(2.0 / d));
    check_uniform("kaiming_uniform", {}, std::sqrt(6.0 / d));
    check_uniform("kaiming_uniform", {{"a", 1.0}}, std::sqrt(3.0 / d));
    check_normal("kaiming_normal", {}, std::sqrt(2.0 / d));
    check_normal("kaiming_normal", {{"a", 1.0}}, std::sqrt(1.0 / d));
  }
}

TEST_CASE("kaiming_uniform with a = sqrt(5) is uniform within sqrt(1 / dimension), to the bit, for every dimension") {
  const auto kaiming = make_initializer("kaiming_uniform", {{"a", std::sqrt(5.0)}});
  for (size_t dimension = 1; dimension <= 4096; ++dimension) {
    const double bound = std::sqrt(1.0 / static_cast<double>(dimension));
    const auto plain = make_initializer("uniform", {{"low", -bound}, {"high", bound}});
    const bool equal =
        bits(filled(*kaiming, 0, 0, dimension, dimension)) == bits(filled(*plain, 0, 0, dimension, dimension));
    CHECK_MESSAGE(equal, dimension);
  }
}

TEST_CASE("natural_log is the logarithm to 1e-15") {
  for (double x = 0x1p-40; x < 1e6; x *= 1.0173) {
    CAPTURE(x);
    const auto expected = static_cast<double>(std::log(static_cast<long double>(x)));
    CHECK(std::abs(natural_log(x) - expected) <= 1e-15 * std::max(std::abs(expected), 1e-2));
  }
  CHECK(natural_log(1.0) == 0.0);
}

TEST_CASE("inverse_normal_cdf inverts the distribution, is odd, and is finite for every word") {
  for (double p = 0x1p-33; p < 0.5; p *= 1.0731) {
    CAPTURE(p);
    const double z = inverse_normal_cdf(p);
    CHECK(0.5 * std::erfc(-z / std::sqrt(2.0)) == doctest::Approx(p).epsilon(1e-13));
    CHECK(inverse_normal_cdf(1.0 - p) == doctest::Approx(-z).epsilon(1e-7));
  }
  CHECK(inverse_normal_cdf(0.5) == 0.0);
  CHECK(inverse_normal_cdf(0.975) == doctest::Approx(1.959963984540054).epsilon(1e-15));
  CHECK(inverse_normal_cdf(0x1p-33) == -inverse_normal_cdf(1.0 - 0x1p-33));
  CHECK(std::abs(inverse_normal_cdf(0x1p-33)) < 6.4);
}

TEST_CASE("settings come back with defaults filled in") {
  CHECK(make_initializer("normal", {{"std", 0.5}})->settings() == Settings{{"mean", 0.0}, {"std", 0.5}});
  CHECK(make_initializer("uniform", {{"low", 0.0}, {"high", 2.0}})->settings() ==
        Settings{{"low", 0.0}, {"high", 2.0}});
  CHECK(make_initializer("constant", {{"value", 0.1}})->settings() == Settings{{"value", 0.1}});
  CHECK(make_initializer("zeros", {})->settings().empty());
  CHECK(make_initializer("xavier_normal", {})->settings() == Settings{{"gain", 1.0}});
  CHECK(make_initializer("kaiming_uniform", {{"a", 0.5}})->settings() == Settings{{"a", 0.5}});
}

TEST_CASE("every listed initializer says its name") {
  for (const std::string& name : initializer_names()) {
    Settings settings;
    if (name == "constant") settings = {{"value", 1.0}};
    if (name == "uniform") settings = {{"low", 0.0}, {"high", 1.0}};
    CHECK(make_initializer(name, settings)->name() == name);
  }
}

TEST_CASE("a bad setting is refused by name, with what is accepted") {
  const auto message = [](std::string_view name, const Settings& settings) {
    return message_of([&] { make_initializer(name, settings); });
  };
  CHECK(message("xavier", {}) ==
        "[initializer] unknown name \"xavier\", expected one of: zeros, ones, constant, uniform, normal, "
        "truncated_normal, xavier_uniform, xavier_normal, kaiming_uniform, kaiming_normal");
  CHECK(message("xavier_uniform", {{"gain", 0.0}}).starts_with("[initializer xavier_uniform] gain is 0, expected a"));
  CHECK(message("kaiming_normal", {{"a", -1.0}}) ==
        "[initializer kaiming_normal] a is -1, expected a number in [0, 1e+37]");
  CHECK(message("constant", {}) == "[initializer constant] value is missing, it has no default");
  CHECK(
      message("constant", {{"value", 1e39}}) ==
      "[initializer constant] value is 1e+39, expected a number in [-3.4028234663852886e+38, 3.4028234663852886e+38]");
  CHECK(message("uniform", {{"low", 1.0}, {"high", 1.0}}) ==
        "[initializer uniform] low is 1 and high is 1, expected low < high as float32; for one value use constant");
  CHECK(
      message("uniform", {{"low", 1.0}, {"high", 1.0 + 1e-12}}).starts_with("[initializer uniform] low is 1 and high"));
  CHECK(message("normal", {{"std", -1.0}}) == "[initializer normal] std is -1, expected a number in [0, 1e+37]");
  CHECK(message("normal", {{"mean", std::nan("")}})
            .starts_with("[initializer normal] mean is nan, expected a number in"));
  CHECK(message("zeros", {{"value", 0.0}}) == "[initializer zeros] unknown setting \"value\", expected none");
  CHECK(message("normal", {{"stddev", 1.0}}) ==
        "[initializer normal] unknown setting \"stddev\", expected one of: mean, std");
}

}  // namespace
}  // namespace damo
