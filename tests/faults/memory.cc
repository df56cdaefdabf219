// SPDX-License-Identifier: Apache-2.0
//
// operator new of a process under faults.cc. A library of its own, for it has to come before a sanitizer's runtime,
// which has one too, and the rest of faults.cc after it: the sanitizer checks what a call is given, then the call
// fails.
#include <cstddef>
#include <cstdlib>
#include <new>

extern "C" void* damo_faults_allocate(size_t bytes, size_t alignment) noexcept;  // in faults.cc

namespace {

void* allocate_or_throw(size_t bytes, size_t alignment) {
  void* memory = damo_faults_allocate(bytes, alignment);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

void* operator new(size_t bytes) { return allocate_or_throw(bytes, 0); }
void* operator new[](size_t bytes) { return allocate_or_throw(bytes, 0); }
void* operator new(size_t bytes, const std::nothrow_t&) noexcept { return damo_faults_allocate(bytes, 0); }
void* operator new[](size_t bytes, const std::nothrow_t&) noexcept { return damo_faults_allocate(bytes, 0); }
void* operator new(size_t bytes, std::align_val_t alignment) {
  return allocate_or_throw(bytes, static_cast<size_t>(alignment));
}
void* operator new[](size_t bytes, std::align_val_t alignment) {
  return allocate_or_throw(bytes, static_cast<size_t>(alignment));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }
