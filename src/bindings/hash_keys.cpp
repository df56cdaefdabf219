// SPDX-License-Identifier: Apache-2.0
//
// KeyHasher for Python: loops over NumPy's and Arrow's buffers without the
// interpreter lock, and over Python objects with it. Which column is which is
// decided in hashing.py.
#include "hash_keys.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "arrow_c_data.h"
#include "gil.h"

namespace nb = nanobind;
using namespace nb::literals;
using damo::bindings::GilRelease;

namespace damo {
namespace {

template <class T>
using Column = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutKeys = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using NewKeys = nb::ndarray<nb::numpy, int64_t, nb::ndim<1>>;
using Missing = nb::typed<nb::tuple, nb::object, nb::ellipsis>;
using Bitmap = std::optional<Column<uint8_t>>;

std::span<int64_t> span_of(const OutKeys& out) { return {out.data(), out.size()}; }

template <class T>
Bytes bytes_of(const Column<T>& column) {
  return std::as_bytes(std::span(column.data(), column.size()));
}

// Memory behind the loops is sized here, once, whatever hashing.py does.
void require(bool fits) {
  if (!fits) throw nb::value_error("[hash_keys] internal: column, validity and result differ in length");
}

Validity validity_of(const Bitmap& valid, size_t rows) {
  if (!valid) return {};
  require(valid->size() >= (rows + 7) / 8);
  return {bytes_of(*valid).data(), 0};
}

std::string value_of_field(const KeyHasher& hasher, size_t index) {
  return "[hash_keys] value " + std::to_string(index) + " of field \"" + hasher.field() + "\" ";
}

[[noreturn]] void throw_not_utf8(const KeyHasher& hasher, size_t index) {
  throw nb::value_error((value_of_field(hasher, index) +
                         "has no UTF-8: it holds a lone surrogate, or a number beyond U+10FFFF; encode it "
                         "yourself, e.g. value.encode(\"utf-8\", \"surrogatepass\")")
                            .c_str());
}

// ---------------------------------------------------------------- objects

// The items of a list, a tuple, or an object array: borrowed references, and
// null at the end, which a list may reach early when a value's own code changes it.
class Objects {
 public:
  explicit Objects(nb::handle values) : list_(values.ptr()), kind_(kind_of(values.ptr())) {
    if (kind_ == Kind::kArray) {
      if (PyObject_GetBuffer(list_, &buffer_, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) != 0) throw nb::python_error();
      if (buffer_.format == nullptr || std::string_view(buffer_.format) != "O") {
        PyBuffer_Release(&buffer_);
        throw nb::type_error("[hash_keys] internal: expected a list, a tuple or an object array");
      }
      size_ = static_cast<size_t>(buffer_.len) / sizeof(PyObject*);
    } else {
      size_ = static_cast<size_t>(kind_ == Kind::kList ? PyList_Size(list_) : PyTuple_Size(list_));
    }
  }
  ~Objects() {
    if (kind_ == Kind::kArray) PyBuffer_Release(&buffer_);
  }
  Objects(const Objects&) = delete;
  Objects& operator=(const Objects&) = delete;

  size_t size() const { return size_; }

  PyObject* operator[](size_t index) const {
    if (kind_ == Kind::kArray) return static_cast<PyObject**>(buffer_.buf)[index];
    const auto i = static_cast<Py_ssize_t>(index);
#ifdef Py_LIMITED_API
    if (kind_ == Kind::kTuple) return PyTuple_GetItem(list_, i);
    return i < PyList_Size(list_) ? PyList_GetItem(list_, i) : nullptr;
#else
    if (kind_ == Kind::kTuple) return PyTuple_GET_ITEM(list_, i);
    return i < PyList_GET_SIZE(list_) ? PyList_GET_ITEM(list_, i) : nullptr;
#endif
  }

  // Objects lie anywhere in memory: ask for one early. A wrong address does no harm.
  void prefetch(size_t index) const {
    if (index >= size_) return;
    const char* object = reinterpret_cast<const char*>((*this)[index]);
    __builtin_prefetch(object);
    __builtin_prefetch(object + 64);
  }

 private:
  enum class Kind { kList, kTuple, kArray };
  static Kind kind_of(PyObject* values) {
    return PyList_Check(values) ? Kind::kList : PyTuple_Check(values) ? Kind::kTuple : Kind::kArray;
  }

  PyObject* list_;
  Kind kind_;
  Py_buffer buffer_{};
  size_t size_ = 0;
};

class ObjectHasher {
 public:
  ObjectHasher(const KeyHasher& hasher, Missing missing) : hasher_(hasher), missing_(std::move(missing)) {}

  int64_t key(PyObject* object, size_t index) {
    if (PyUnicode_Check(object)) return text(object, index);
    if (PyLong_CheckExact(object)) return integer(object, index);
    if (object == Py_None) return KeyHasher::kMissing;
    if (PyBytes_Check(object)) {
      char* data = nullptr;
      Py_ssize_t size = 0;
      if (PyBytes_AsStringAndSize(object, &data, &size) != 0) throw nb::python_error();
      return hasher_.text({data, static_cast<size_t>(size)});
    }
    if (PyFloat_Check(object) && std::isnan(PyFloat_AsDouble(object))) return KeyHasher::kMissing;
    return unusual(nb::borrow(object), index);
  }

 private:
  int64_t text(PyObject* object, size_t index) {
    // PyUnicode_AsUTF8AndSize keeps the UTF-8 of a string that is not ASCII inside the caller's string for good: a
    // column would grow by half. So it is left alone, or called until the first such string.
#ifdef Py_LIMITED_API
    Py_ssize_t size = 0;
    if (all_ascii_) {
      const char* data = PyUnicode_AsUTF8AndSize(object, &size);
      if (data == nullptr) throw_unencodable(index);
      all_ascii_ = size == PyUnicode_GetLength(object);
      return hasher_.text({data, static_cast<size_t>(size)});
    }
    const nb::object utf8 = nb::steal(PyUnicode_AsUTF8String(object));
    if (!utf8.is_valid()) throw_unencodable(index);
    return hasher_.text({PyBytes_AsString(utf8.ptr()), static_cast<size_t>(PyBytes_Size(utf8.ptr()))});
#else
#if PY_VERSION_HEX < 0x030C0000
    if (PyUnicode_READY(object) != 0) throw nb::python_error();
#endif
    const auto length = static_cast<size_t>(PyUnicode_GET_LENGTH(object));
    const auto* data = static_cast<const std::byte*>(PyUnicode_DATA(object));
    if (PyUnicode_IS_ASCII(object)) return hasher_.text({reinterpret_cast<const char*>(data), length});
    if (scratch_.size() < length * 4) scratch_.resize(length * 4);
    std::optional<size_t> size;
    switch (PyUnicode_KIND(object)) {
      case PyUnicode_1BYTE_KIND:
        size = encode_utf8<uint8_t>(data, length, scratch_.data());
        break;
      case PyUnicode_2BYTE_KIND:
        size = encode_utf8<uint16_t>(data, length, scratch_.data());
        break;
      default:
        size = encode_utf8<uint32_t>(data, length, scratch_.data());
        break;
    }
    if (!size) throw_not_utf8(hasher_, index);
    return hasher_.text({scratch_.data(), *size});
#endif
  }

#ifdef Py_LIMITED_API
  [[noreturn]] void throw_unencodable(size_t index) const {
    if (!PyErr_ExceptionMatches(PyExc_UnicodeEncodeError)) throw nb::python_error();
    PyErr_Clear();
    throw_not_utf8(hasher_, index);
  }
  bool all_ascii_ = true;
#endif

  int64_t integer(PyObject* object, size_t index) const {
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(object, &overflow);
    if (overflow == 0) return hasher_.integer(static_cast<uint64_t>(value));
    if (overflow > 0) {
      const unsigned long long bits = PyLong_AsUnsignedLongLong(object);
      if (!PyErr_Occurred()) return hasher_.integer(bits);
      PyErr_Clear();
    }
    throw nb::value_error((value_of_field(hasher_, index) +
                           "is an integer beyond 64 bits, expected -2**63 to 2**64 - 1; hash it as text: str(value)")
                              .c_str());
  }

  // Holds its own reference: from here on a value's own code may run, and drop it from the list.
  int64_t unusual(nb::object object, size_t index) const {
    for (nb::handle missing : missing_) {
      if (object.is(missing)) return KeyHasher::kMissing;
    }
    if (!PyBool_Check(object.ptr()) && PyIndex_Check(object.ptr())) {  // NumPy's integers, int's subclasses
      const nb::object number = nb::steal(PyNumber_Index(object.ptr()));
      if (number.is_valid()) return integer(number.ptr(), index);
      if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw nb::python_error();
      PyErr_Clear();
    } else if (nb::hasattr(object, "__float__")) {  // NumPy's floats
      const double number = PyFloat_AsDouble(object.ptr());
      if (std::isnan(number)) return KeyHasher::kMissing;
      PyErr_Clear();
    }
    constexpr size_t kShown = 60;
    std::string shown = nb::cast<std::string>(
        nb::str(nb::repr(object).attr("encode")("ascii", "backslashreplace").attr("decode")("ascii")));
    if (shown.size() > kShown) shown = shown.substr(0, kShown) + "...";
    const std::string type = nb::cast<std::string>(nb::str(object.type().attr("__name__")));
    throw nb::type_error((value_of_field(hasher_, index) + "is a " + type + " (" + shown +
                          "), expected str, bytes, int or a missing value (None, NaN, NA); convert the column first, "
                          "e.g. to int, or to text with str(value)")
                             .c_str());
  }

  const KeyHasher& hasher_;
  Missing missing_;
  std::vector<char> scratch_;
};

void hash_objects(const KeyHasher& hasher, nb::handle values, Missing missing, OutKeys out) {
  constexpr size_t kAhead = 12;
  const Objects objects(values);
  require(objects.size() == out.size());
  ObjectHasher object_hasher(hasher, std::move(missing));
  for (size_t i = 0; i < objects.size(); ++i) {
    objects.prefetch(i + kAhead);
    PyObject* object = objects[i];
    if (object == nullptr) throw nb::value_error("[hash_keys] the list changed its length while it was hashed");
    out.data()[i] = object_hasher.key(object, i);
  }
}

// ------------------------------------------------------------------ Arrow

class ArrowHasher {
 public:
  explicit ArrowHasher(const KeyHasher& hasher) : hasher_(hasher) {}

  // Fills out (array.length keys). `first` is the index of the array's first value in the column, for messages.
  void hash(const ArrowSchema& schema, const ArrowArray& array, size_t first, std::span<int64_t> out) {
    if (array.length == 0) return;
    const std::string_view format = schema.format;
    const Validity valid = validity(array);
    size_t done = out.size();
    if (schema.dictionary != nullptr) {
      dictionary(schema, array, valid, first, out);
    } else if (format == "n") {
      std::fill(out.begin(), out.end(), KeyHasher::kMissing);
    } else if (format == "u" || format == "z") {
      done = texts<int32_t>(array, valid, out);
    } else if (format == "U" || format == "Z") {
      done = texts<int64_t>(array, valid, out);
    } else if (format == "vu" || format == "vz") {
      done = views(array, valid, out);
    } else if (format.starts_with("w:")) {
      const size_t width = std::stoul(std::string(format.substr(2)));
      hasher_.fixed_width(rows(array, 1, width), width, false, valid, out);
    } else if (format == "e" || format == "f" || format == "g") {
      missing_floats(format[0], array, valid, first, out);
    } else if (!integers(format,
                         [&]<class Int>() { hasher_.integers<Int>(rows(array, 1, sizeof(Int)), valid, out); })) {
      throw nb::type_error(
          ("[hash_keys] field \"" + hasher_.field() + "\" is an Arrow column of format \"" + std::string(format) +
           "\", expected text, binary, integers, or a dictionary of them; cast it first (booleans to int8, "
           "floats and times to int64 or text), and give one column, not a table")
              .c_str());
    }
    if (done < out.size()) corrupt(first + done);
  }

 private:
  [[noreturn]] void corrupt(size_t index) const {
    throw nb::value_error(
        (value_of_field(hasher_, index) + "points outside of its Arrow buffers; validate the array").c_str());
  }

  static const std::byte* buffer(const ArrowArray& array, int64_t number) {
    if (number >= array.n_buffers)
      throw nb::value_error("[hash_keys] the Arrow array lacks a buffer; validate the array");
    return static_cast<const std::byte*>(array.buffers[number]);
  }

  static Validity validity(const ArrowArray& array) {
    if (array.null_count == 0 || array.n_buffers == 0) return {};
    return {buffer(array, 0), static_cast<size_t>(array.offset)};
  }

  // The bytes of the array's rows in a buffer with `width` bytes each, and `more` of them behind the last.
  static Bytes rows(const ArrowArray& array, int64_t number, size_t width, size_t more = 0) {
    const std::byte* data = buffer(array, number);
    if (data == nullptr) throw nb::value_error("[hash_keys] the Arrow array lacks a buffer; validate the array");
    return {data + static_cast<size_t>(array.offset) * width, (static_cast<size_t>(array.length) + more) * width};
  }

  template <class Offset>
  size_t texts(const ArrowArray& array, Validity valid, std::span<int64_t> out) const {
    const Bytes offsets = rows(array, 1, sizeof(Offset), 1);
    Offset end;
    std::memcpy(&end, offsets.data() + out.size() * sizeof(Offset), sizeof end);
    return hasher_.texts<Offset>(offsets, {buffer(array, 2), static_cast<size_t>(std::max<Offset>(end, 0))}, valid,
                                 out);
  }

  size_t views(const ArrowArray& array, Validity valid, std::span<int64_t> out) const {
    std::vector<Bytes> buffers;
    for (int64_t i = 2; i + 1 < array.n_buffers; ++i) {
      int64_t size;  // the last buffer holds the sizes of those before it
      std::memcpy(&size, buffer(array, array.n_buffers - 1) + static_cast<size_t>(i - 2) * sizeof size, sizeof size);
      buffers.emplace_back(buffer(array, i), static_cast<size_t>(std::max<int64_t>(size, 0)));
    }
    return hasher_.views(rows(array, 1, 16), buffers, valid, out);
  }

  // Calls f.operator()<Int>() for the integer type that `format` names; false when it names none.
  template <class F>
  static bool integers(std::string_view format, const F& f) {
    if (format.size() != 1) return false;
    switch (format[0]) {
      case 'c':
        f.template operator()<int8_t>();
        return true;
      case 'C':
        f.template operator()<uint8_t>();
        return true;
      case 's':
        f.template operator()<int16_t>();
        return true;
      case 'S':
        f.template operator()<uint16_t>();
        return true;
      case 'i':
        f.template operator()<int32_t>();
        return true;
      case 'I':
        f.template operator()<uint32_t>();
        return true;
      case 'l':
        f.template operator()<int64_t>();
        return true;
      case 'L':
        f.template operator()<uint64_t>();
        return true;
      default:
        return false;
    }
  }

  // A column of nothing but NaN is how a column without a value often comes.
  void missing_floats(char format, const ArrowArray& array, Validity valid, size_t first,
                      std::span<int64_t> out) const {
    const size_t width = format == 'e' ? 2 : format == 'f' ? 4 : 8;
    const Bytes values = rows(array, 1, width);
    const uint64_t infinity = format == 'e' ? 0x7C00 : format == 'f' ? 0x7F800000 : 0x7FF0000000000000;
    for (size_t i = 0; i < out.size(); ++i) {
      uint64_t bits = 0;
      std::memcpy(&bits, values.data() + i * width, width);
      const bool is_nan = (bits & (infinity | (infinity - 1))) > infinity;
      if (valid(i) && !is_nan) {
        throw nb::type_error(
            (value_of_field(hasher_, first + i) +
             "is a float, expected str, bytes, int or a missing value (null, NaN); cast the column first, "
             "e.g. to int64, or to text")
                .c_str());
      }
      out[i] = KeyHasher::kMissing;
    }
  }

  void dictionary(const ArrowSchema& schema, const ArrowArray& array, Validity valid, size_t first,
                  std::span<int64_t> out) {
    const ArrowArray* values = array.dictionary;
    if (values == nullptr)
      throw nb::value_error("[hash_keys] the Arrow array lacks its dictionary; validate the array");
    // The chunks of a column most often share one dictionary. They are all kept
    // alive until the end, so an equal address is the same memory.
    std::vector<const void*> identity(values->buffers, values->buffers + values->n_buffers);
    identity.push_back(reinterpret_cast<const void*>(values->offset));
    identity.push_back(reinterpret_cast<const void*>(values->length));
    if (values->dictionary != nullptr || identity != last_dictionary_) {
      dictionary_keys_.resize(static_cast<size_t>(values->length));
      ArrowHasher(hasher_).hash(*schema.dictionary, *values, 0, dictionary_keys_);
      last_dictionary_ = std::move(identity);
    }
    const auto take = [&]<class Int>() {
      const Bytes indices = rows(array, 1, sizeof(Int));
      for (size_t i = 0; i < out.size(); ++i) {
        Int at;
        std::memcpy(&at, indices.data() + i * sizeof(Int), sizeof at);
        if (!valid(i)) {
          out[i] = KeyHasher::kMissing;
        } else if (static_cast<uint64_t>(at) < dictionary_keys_.size()) {  // a negative one is huge
          out[i] = dictionary_keys_[static_cast<size_t>(at)];
        } else {
          corrupt(first + i);
        }
      }
    };
    if (!integers(schema.format, take))
      throw nb::value_error("[hash_keys] the Arrow dictionary's indices are not integers");
  }

  const KeyHasher& hasher_;
  std::vector<int64_t> dictionary_keys_;
  std::vector<const void*> last_dictionary_;
};

NewKeys new_keys(size_t size) {
  auto keys = std::make_unique<int64_t[]>(size);
  nb::capsule owner(keys.get(), [](void* p) noexcept { delete[] static_cast<int64_t*>(p); });
  return NewKeys(keys.release(), {size}, owner);
}

template <class T>
T& struct_in(const nb::capsule& capsule, const char* name) {
  auto* value = static_cast<T*>(PyCapsule_GetPointer(capsule.ptr(), name));
  if (value == nullptr) throw nb::python_error();
  if (value->release == nullptr) throw nb::value_error("[hash_keys] the Arrow data has been used up");
  return *value;
}

NewKeys hash_arrow_array(const KeyHasher& hasher, const nb::capsule& schema_capsule, const nb::capsule& array_capsule) {
  const auto& schema = struct_in<ArrowSchema>(schema_capsule, "arrow_schema");
  const auto& array = struct_in<ArrowArray>(array_capsule, "arrow_array");  // the capsule goes on owning it
  NewKeys keys = new_keys(static_cast<size_t>(array.length));
  GilRelease release;
  ArrowHasher(hasher).hash(schema, array, 0, {keys.data(), keys.size()});
  return keys;
}

NewKeys hash_arrow_stream(const KeyHasher& hasher, const nb::capsule& stream_capsule) {
  auto& stream = struct_in<ArrowArrayStream>(stream_capsule, "arrow_array_stream");
  const auto check = [&stream](int error) {
    if (error == 0) return;
    const char* why = stream.get_last_error(&stream);
    throw nb::value_error(
        ("[hash_keys] the Arrow stream failed: " + std::string(why == nullptr ? std::strerror(error) : why)).c_str());
  };
  ArrowOwner<ArrowSchema> schema;
  check(stream.get_schema(&stream, &schema.value));
  std::vector<ArrowOwner<ArrowArray>> chunks;
  size_t size = 0;
  while (true) {
    ArrowOwner<ArrowArray> chunk;
    check(stream.get_next(&stream, &chunk.value));
    if (chunk.value.release == nullptr) break;
    size += static_cast<size_t>(chunk.value.length);
    chunks.push_back(std::move(chunk));
  }
  NewKeys keys = new_keys(size);
  {
    GilRelease release;
    ArrowHasher arrow(hasher);
    size_t first = 0;
    for (const auto& [chunk] : chunks) {
      const auto length = static_cast<size_t>(chunk.length);
      arrow.hash(schema.value, chunk, first, {keys.data() + first, length});
      first += length;
    }
  }
  return keys;
}

// ------------------------------------------------------------------ NumPy

template <class Int>
void hash_integers(const KeyHasher& hasher, const Column<Int>& values, const Bitmap& valid, OutKeys out) {
  require(values.size() == out.size());
  const Validity validity = validity_of(valid, out.size());
  GilRelease release;
  hasher.integers<Int>(bytes_of(values), validity, span_of(out));
}

void hash_fixed_width(const KeyHasher& hasher, const Column<uint8_t>& text, size_t width, const Bitmap& valid,
                      OutKeys out) {
  require(text.size() == out.size() * width);
  const Validity validity = validity_of(valid, out.size());
  GilRelease release;
  hasher.fixed_width(bytes_of(text), width, true, validity, span_of(out));
}

void hash_utf32(const KeyHasher& hasher, const Column<uint32_t>& code_points, size_t width, const Bitmap& valid,
                OutKeys out) {
  require(code_points.size() == out.size() * width);
  const Validity validity = validity_of(valid, out.size());
  GilRelease release;
  const size_t done = hasher.utf32(bytes_of(code_points), width, validity, span_of(out));
  if (done < out.size()) throw_not_utf8(hasher, done);
}

template <class... Ints>
void bind_integers(nb::class_<KeyHasher>& hasher) {
  (hasher.def("integers", &hash_integers<Ints>, "values"_a.noconvert(), "valid"_a.noconvert().none(),
              "out"_a.noconvert()),
   ...);
}

}  // namespace
}  // namespace damo

void bind_hash_keys(nb::module_& m) {
  using namespace damo;
  nb::class_<KeyHasher> hasher(m, "KeyHasher", "The keys of one field's values; use damo_embedding.hash_keys.");
  hasher.def(
      "__init__",
      [](KeyHasher* self, const nb::bytes& field, uint64_t seed) {
        new (self) KeyHasher({field.c_str(), field.size()}, seed);
      },
      "field"_a, "seed"_a);
  hasher.def_prop_ro("field", &KeyHasher::field);
  hasher.def("set_padding", &KeyHasher::set_padding, "key"_a, "Values that have this key become key 0 from now on.");
  hasher.def("objects", &hash_objects, "values"_a, "missing"_a, "out"_a.noconvert(),
             "Keys of a list, tuple or object array of str, bytes, int, None, NaN and the objects in `missing`.");
  hasher.def("fixed_width", &hash_fixed_width, "text"_a.noconvert(), "width"_a, "valid"_a.noconvert().none(),
             "out"_a.noconvert(), "Keys of `width` bytes each, NUL bytes at the end left out.");
  hasher.def("utf32", &hash_utf32, "code_points"_a.noconvert(), "width"_a, "valid"_a.noconvert().none(),
             "out"_a.noconvert(), "Keys of `width` code points each, NUL at the end left out.");
  bind_integers<int8_t, uint8_t, int16_t, uint16_t, int32_t, uint32_t, int64_t, uint64_t>(hasher);
  hasher.def("arrow_array", &hash_arrow_array, "schema"_a, "array"_a, "Keys of what __arrow_c_array__() returns.");
  hasher.def("arrow_stream", &hash_arrow_stream, "stream"_a, "Keys of what __arrow_c_stream__() returns.");
}
