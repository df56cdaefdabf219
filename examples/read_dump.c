// SPDX-License-Identifier: Apache-2.0
//
// Reads a serving file (docs/format.md) with the C library alone, and prints a line for each row: group, key, weights.
//
//   cc -std=c11 -O2 -o read_dump examples/read_dump.c && ./read_dump weights.bin
//
// Nothing in the file is believed before it has been held against the file's length: what is damaged is refused with
// the offset and exit status 1. Works on machines of any byte order.
#define _FILE_OFFSET_BITS 64
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { kGroups = 256, kTablesBytes = kGroups * (4 + 8), kPrefixBytes = 8 + 4 };

static const char* path;

static _Noreturn void fail(uint64_t offset, const char* what) {
  fprintf(stderr, "%s: %s (offset %" PRIu64 ")\n", path, what, offset);
  exit(EXIT_FAILURE);
}

static uint64_t little_endian(const unsigned char* bytes, int count) {
  uint64_t value = 0;
  for (int i = count - 1; i >= 0; --i) value = value << 8 | bytes[i];
  return value;
}

// The file may become shorter while it is read.
static void take(FILE* file, unsigned char* bytes, size_t count, uint64_t offset) {
  if (fread(bytes, 1, count, file) != count) fail(offset, ferror(file) ? strerror(errno) : "the file ends too early");
}

int main(int argc, char** argv) {
  if (argc != 2) {
    fprintf(stderr, "usage: %s FILE\n", argv[0]);
    return 2;
  }
  path = argv[1];
  FILE* file = fopen(path, "rb");
  if (file == NULL || fseeko(file, 0, SEEK_END) != 0) fail(0, strerror(errno));
  const off_t end = ftello(file);
  if (end < 0 || fseeko(file, 0, SEEK_SET) != 0) fail(0, strerror(errno));
  const uint64_t length = (uint64_t)end;
  if (length < kTablesBytes) fail(length, "the file ends inside of its tables");

  // The tables: a dimension and a number of rows for each group. Together they give the file's length, exactly.
  static unsigned char tables[kTablesBytes];
  take(file, tables, sizeof tables, 0);
  uint64_t row_bytes[kGroups], rows_left[kGroups], largest = 0, records = length - kTablesBytes;
  for (unsigned group = 0; group < kGroups; ++group) {
    const uint64_t dimension = little_endian(tables + 4 * group, 4);
    rows_left[group] = little_endian(tables + 4 * kGroups + 8 * group, 8);
    row_bytes[group] = kPrefixBytes + 4 * dimension;  // at most 2^34
    if (dimension > INT32_MAX) fail(4 * group, "a dimension is negative");
    if (dimension == 0 && rows_left[group] != 0) fail(4 * group, "a group has rows and no dimension");
    if (rows_left[group] > records / row_bytes[group]) fail(length, "the file is shorter than its tables say");
    records -= rows_left[group] * row_bytes[group];
    if (rows_left[group] != 0 && row_bytes[group] > largest) largest = row_bytes[group];
  }
  if (records != 0) fail(length - records, "the file is longer than its tables say");

  // The rows, in any order. `largest` is no more than the file's length: it may be allocated.
  unsigned char* row = malloc(largest + 1);
  if (row == NULL) fail(0, "not enough memory for a row");
  for (uint64_t offset = kTablesBytes; offset < length;) {
    if (length - offset < kPrefixBytes) fail(offset, "the file ends inside of a row");
    take(file, row, kPrefixBytes, offset);
    const uint64_t key = little_endian(row, 8), group = little_endian(row + 8, 4);
    if (group >= kGroups || rows_left[group] == 0) fail(offset, "a row is of a group that has no more of them");
    if (length - offset < row_bytes[group]) fail(offset, "the file ends inside of a row");
    const size_t weights_bytes = (size_t)row_bytes[group] - kPrefixBytes;
    take(file, row, weights_bytes, offset);
    printf("%" PRIu64 " %" PRIu64, group, key);
    for (size_t at = 0; at < weights_bytes; at += 4) {
      const uint32_t bits = (uint32_t)little_endian(row + at, 4);
      float weight;
      memcpy(&weight, &bits, sizeof weight);
      printf(" %.9g", (double)weight);
    }
    putchar('\n');
    --rows_left[group];
    offset += row_bytes[group];
  }
  free(row);
  fclose(file);
  if (fflush(stdout) != 0) {
    fprintf(stderr, "standard output: %s\n", strerror(errno));
    return EXIT_FAILURE;
  }
  return EXIT_SUCCESS;
}
