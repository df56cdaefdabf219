// SPDX-License-Identifier: Apache-2.0
//
// One line an optimizer; optimizer.cc has the list that names them.
#pragma once

#include <memory>

#include "../optimizer.h"

namespace damo {

std::unique_ptr<Optimizer> make_sgd(const Settings& settings);
std::unique_ptr<Optimizer> make_adagrad(const Settings& settings);
std::unique_ptr<Optimizer> make_adam(const Settings& settings);
std::unique_ptr<Optimizer> make_rowwise_adagrad(const Settings& settings);
std::unique_ptr<Optimizer> make_amsgrad(const Settings& settings);
std::unique_ptr<Optimizer> make_adamw(const Settings& settings);
std::unique_ptr<Optimizer> make_lion(const Settings& settings);
std::unique_ptr<Optimizer> make_rmsprop(const Settings& settings);
std::unique_ptr<Optimizer> make_ftrl(const Settings& settings);

}  // namespace damo
