// The part of llfast._native that reads files.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "aligned_memory.h"
#include "bindings.h"
#include "file_reader.h"

namespace py = pybind11;

namespace llfast {
namespace {

py::object python_path(const std::string& path) {
  return py::reinterpret_steal<py::object>(
      PyUnicode_DecodeFSDefaultAndSize(path.data(), static_cast<py::ssize_t>(path.size())));
}

void translate(std::exception_ptr failure) {
  try {
    if (failure) std::rethrow_exception(std::move(failure));
  } catch (const FileError& error) {
    // Of these three OSError makes FileNotFoundError and its like.
    const py::tuple arguments =
        py::make_tuple(error.code().value(), error.text(), python_path(error.path()));
    PyErr_SetObject(PyExc_OSError, arguments.ptr());
  } catch (const UnexpectedEnd& error) {
    // A path is any bytes.
    PyErr_SetObject(PyExc_EOFError, python_path(error.what()).ptr());
  } catch (const MemoryShortage& error) {
    PyErr_SetString(PyExc_MemoryError, error.what());
  }
}

// A str, bytes or os.PathLike.
std::string path_of(py::handle object) {
  PyObject* bytes = nullptr;
  if (PyUnicode_FSConverter(object.ptr(), static_cast<void*>(&bytes)) == 0) {
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::bytes>(bytes);
}

std::unique_ptr<FileReader> open_files(const py::sequence& paths, int threads,
                                       std::int64_t chunk_bytes, bool direct) {
  if (py::isinstance<py::str>(paths)) throw py::type_error("paths must be a list, got a str");
  std::vector<std::string> names;
  for (const py::handle path : paths) names.push_back(path_of(path));
  const py::gil_scoped_release release;
  return std::make_unique<FileReader>(names, FileReader::Options{threads, chunk_bytes, direct});
}

// A copy: the array's owner may write to it while the reader reads.
std::vector<Extent> extents_of(const py::buffer& array) {
  const py::buffer_info info = array.request();
  if (!info.item_type_is_equivalent_to<std::int64_t>()) {
    throw py::type_error("extents must be an array of int64, got items of type '" + info.format +
                         "'");
  }
  if (info.ndim != 2 || info.shape[1] != 4) {
    throw py::value_error(
        "extents must be of shape (n, 4): file, offset, size and destination of each");
  }
  constexpr auto kRow = static_cast<py::ssize_t>(sizeof(Extent));
  std::vector<Extent> extents(static_cast<std::size_t>(info.shape[0]));
  if (extents.empty()) return extents;
  if (info.strides[1] != kRow / 4 || (info.shape[0] > 1 && info.strides[0] != kRow)) {
    throw py::value_error("extents must be C-contiguous");
  }
  std::memcpy(extents.data(), info.ptr, extents.size() * sizeof(Extent));
  return extents;
}

ReadStatistics read(FileReader& reader, const AlignedMemory& memory, const py::buffer& array) {
  std::vector<Extent> extents = extents_of(array);
  std::optional<ReadStatistics> statistics;
  {
    const py::gil_scoped_release release;
    statistics = reader.read(memory.data(), memory.size(), std::move(extents), SignalCheck());
  }
  if (!statistics) throw py::error_already_set();
  return *statistics;
}

py::object changed(const FileReader& reader) {
  std::string path;
  {
    const py::gil_scoped_release release;
    path = reader.changed();
  }
  return python_path(path);
}

}  // namespace

void bind_reader(const py::module_& module) {
  static_assert(sizeof(Extent) == 4 * sizeof(std::int64_t), "a row of the array is an extent");
  py::register_local_exception_translator(&translate);

  py::class_<AlignedMemory>(module, "Memory", py::buffer_protocol(),
                            "Zeroed bytes that files are read into, aligned to pages; a buffer.")
      .def(py::init<std::int64_t>(), py::arg("size"))
      .def_property_readonly("address",
                             [](const AlignedMemory& memory) {
                               return reinterpret_cast<std::uintptr_t>(memory.data());
                             })
      .def("__len__", &AlignedMemory::size)
      .def_buffer([](AlignedMemory& memory) {
        return py::buffer_info(reinterpret_cast<unsigned char*>(memory.data()), memory.size());
      });

  py::class_<ReadStatistics>(module, "ReadStatistics", "What one read came to.")
      .def_readonly("bytes", &ReadStatistics::bytes)
      .def_readonly("read_bytes", &ReadStatistics::read_bytes)
      .def_readonly("cached_bytes", &ReadStatistics::cached_bytes)
      .def_readonly("seconds", &ReadStatistics::seconds);

  py::class_<FileReader>(module, "FileReader", "Open files, and reads extents of them into memory.")
      .def(py::init(&open_files), py::arg("paths"), py::kw_only(), py::arg("threads") = 8,
           py::arg("chunk_bytes") = 8 << 20, py::arg("direct") = true)
      .def("read", &read, py::arg("memory"), py::arg("extents"),
           "Reads each row of `extents`, an int64 array (n, 4) of file, offset, size and "
           "destination, into `memory`, and writes nothing else there.")
      .def("cancel", &FileReader::cancel, "Has this and every later read raise RuntimeError.")
      .def("changed", &changed,
           "The first path whose file is no longer what it was when opened, or ''.");
}

}  // namespace llfast
