// Memory that the kernel can read files into without copying: aligned to pages, in huge ones where
// there are any.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

namespace llfast {

// No memory of that size is to be had.
class MemoryShortage : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Zeroed memory of at least one byte, given back with the object.
class AlignedMemory {
 public:
  explicit AlignedMemory(std::int64_t size);
  AlignedMemory(const AlignedMemory&) = delete;
  AlignedMemory& operator=(const AlignedMemory&) = delete;
  ~AlignedMemory();

  std::byte* data() const { return data_; }
  std::int64_t size() const { return size_; }

 private:
  std::int64_t size_;
  std::byte* data_;
};

}  // namespace llfast
