// SPDX-License-Identifier: Apache-2.0
//
// The main of the C++ tests: every *_test.cc beside this file is linked into one binary.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
