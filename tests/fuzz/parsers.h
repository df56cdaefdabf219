// SPDX-License-Identifier: Apache-2.0
//
// Every parser of the core, for the fuzzers beside this file.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "format.h"

namespace damo {

struct Parser {
  std::string name;
  std::vector<std::string> seeds;  // whole inputs
  // Puts the checksums right again after a change, which would refuse nearly all that is changed. May be null: it has
  // none.
  std::function<void(std::string&)> repair;
  // Reads the input and returns, or throws CorruptionError. Whatever else it does is a finding.
  std::function<void(Bytes)> consume;
};

std::vector<Parser> parsers();

}  // namespace damo
