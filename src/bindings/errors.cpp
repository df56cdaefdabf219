// SPDX-License-Identifier: Apache-2.0
//
// Each exception of the core as the Python class of the same name in damo_embedding/errors.py.
#include <nanobind/nanobind.h>

#include <filesystem>
#include <stdexcept>
#include <string>
#include <system_error>

#include "error.h"

namespace nb = nanobind;

namespace {

void raise(const char* name, const std::exception& error) {
  try {
    const nb::object type = nb::module_::import_("damo_embedding.errors").attr(name);
    PyErr_SetString(type.ptr(), error.what());
  } catch (nb::python_error& failed) {
    failed.restore();
  }
}

}  // namespace

void bind_errors(nb::module_&) {
  nb::register_exception_translator([](const std::exception_ptr& pointer, void*) {
    try {
      std::rethrow_exception(pointer);
    } catch (const damo::NewerVersionError& error) {
      raise("NewerVersionError", error);
    } catch (const damo::CorruptionError& error) {
      raise("CorruptionError", error);
    } catch (const damo::SchemaMismatchError& error) {
      raise("SchemaMismatchError", error);
    } catch (const damo::StorageError& error) {
      raise("StorageError", error);
    } catch (const damo::ReadOnlyError& error) {
      raise("ReadOnlyError", error);
    } catch (const damo::ClosedError& error) {
      raise("ClosedError", error);
    } catch (const damo::AlreadyOpenError& error) {
      raise("AlreadyOpenError", error);
    } catch (const damo::ForkedHandleError& error) {
      raise("ForkedHandleError", error);
    } catch (const damo::Error& error) {
      raise("DamoError", error);
    } catch (const std::filesystem::filesystem_error& error) {
      const std::string to = error.path2().empty() ? "" : " to " + error.path2().string();
      raise("StorageError",
            std::runtime_error("[storage] " + error.path1().string() + to + ": " + error.code().message()));
    } catch (const std::system_error& error) {  // of a file, or of a thread that could not be started
      raise("StorageError", error);
    }
  });
}
