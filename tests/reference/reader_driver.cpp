// The file reader without Python, for sanitisers: real files in the folder that is its argument.
// Prints what is wrong and exits with 1.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <fstream>
#include <iostream>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "aligned_memory.h"
#include "file_reader.h"

namespace {

using llfast::Extent;
using llfast::FileReader;

using Bytes = std::vector<char>;

int failures = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  std::cerr << "failed: " << what << '\n';
}

bool never() { return false; }

Bytes write_file(const std::string& path, std::int64_t size, unsigned seed) {
  std::mt19937 random(seed);
  Bytes bytes(static_cast<std::size_t>(size));
  for (char& byte : bytes) byte = static_cast<char>(random() % 255 + 1);
  std::ofstream(path, std::ios::binary).write(bytes.data(), size);
  return bytes;
}

void make_cold(const std::string& path) {
  const llfast::Descriptor file(open(path.c_str(), O_RDONLY));
  fdatasync(file.number());
  posix_fadvise(file.number(), 0, 0, POSIX_FADV_DONTNEED);
}

// Extents of any place and size, one after the other in memory with a byte that stays 0 between.
void check_extents(const std::vector<std::string>& paths, const std::vector<Bytes>& files,
                   const FileReader::Options& options, unsigned seed, std::int64_t most) {
  std::mt19937 random(seed);
  const auto below = [&](std::int64_t end) {
    return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(end));
  };
  std::vector<Extent> extents;
  Bytes expected;
  for (int i = 0; i < 60; ++i) {
    const auto file = static_cast<std::size_t>(below(static_cast<std::int64_t>(files.size())));
    const auto size = static_cast<std::int64_t>(files[file].size());
    const std::int64_t offset = below(size + 1);
    const std::int64_t bytes = std::min(size - offset, below(most));
    // Every other one lies in memory as its blocks do.
    while (i % 2 == 0 && (static_cast<std::int64_t>(expected.size()) - offset) % 4096 != 0) {
      expected.push_back(0);
    }
    extents.push_back({static_cast<std::int64_t>(file), offset, bytes,
                       static_cast<std::int64_t>(expected.size())});
    const auto first = files[file].begin() + offset;
    expected.insert(expected.end(), first, first + bytes);
    expected.push_back(0);
  }
  std::shuffle(extents.begin(), extents.end(), random);
  const llfast::AlignedMemory memory(static_cast<std::int64_t>(expected.size()));
  FileReader reader(paths, options);
  const std::string name = "seed " + std::to_string(seed);
  const auto statistics = reader.read(memory.data(), memory.size(), extents, never);
  expect(statistics.has_value(), name + " did not finish");
  const auto* const got = reinterpret_cast<const char*>(memory.data());
  expect(std::equal(expected.begin(), expected.end(), got), name + " reads other bytes");
  expect(reader.changed().empty(), name + " sees a change");
}

void check_end(const std::string& path) {
  const llfast::AlignedMemory memory(1 << 20);
  for (const bool direct : {false, true}) {
    for (const std::int64_t offset : {0, 4096, 99000, 200000}) {
      FileReader reader({path}, {4, 8192, direct});
      std::string said;
      try {
        reader.read(memory.data(), memory.size(), {{0, offset, 500000, 1}}, never);
      } catch (const llfast::UnexpectedEnd& end) {
        said = end.what();
      }
      expect(said == path + " ends at byte 100000, where " + std::to_string(offset + 500000) +
                         " were expected",
             "said at the end of a file: " + said);
    }
  }
}

// Cancelled from another thread, which waits for the first byte to arrive; two read at once.
void check_cancel(const std::string& path) {
  FileReader reader({path}, {1, 4096, true});  // all extents go to one place
  const std::vector<Extent> extents(100000, Extent{0, 0, 100000, 0});
  std::atomic<int> reading{0};
  std::atomic<int> cancelled{0};
  const auto read = [&] {
    const llfast::AlignedMemory memory(100000);
    try {
      reader.read(memory.data(), memory.size(), extents, [&] {
        ++reading;
        return false;
      });
    } catch (const llfast::Cancelled&) {
      ++cancelled;
    }
  };
  std::thread one(read);
  std::thread two(read);
  while (reading < 4) std::this_thread::yield();
  reader.cancel();
  one.join();
  two.join();
  expect(cancelled == 2, "a read was not cancelled");
}

// Only the calling thread asks: where there is another, that one may have read all before two are
// asked for.
void check_interrupt(const std::string& path) {
  const llfast::AlignedMemory memory(100000);
  for (const int threads : {1, 2}) {
    FileReader reader({path}, {threads, 4096, true});
    int asked = 0;
    const auto statistics = reader.read(memory.data(), memory.size(), {{0, 0, 100000, 0}},
                                        [&] { return ++asked == 2; });
    expect(statistics.has_value() == (asked < 2), "an interrupt was not heeded");
    expect(threads > 1 || asked == 2, "was not asked after every read");
  }
}

}  // namespace

int main(int, char** arguments) {
  const std::string folder = arguments[1];
  std::vector<std::string> paths;
  std::vector<Bytes> files;
  for (const std::int64_t size : {0, 1, 4095, 4096, 4097, 100000, 3000001}) {
    paths.push_back(folder + "/file" + std::to_string(size));
    files.push_back(write_file(paths.back(), size, static_cast<unsigned>(size)));
  }
  unsigned seed = 0;
  for (const bool cold : {true, false}) {
    for (const bool direct : {true, false}) {
      for (const std::int64_t chunk_bytes : {4096, 65536, 1 << 20}) {
        for (const std::int64_t most : {2000, 20000, 1500000}) {
          if (cold) std::for_each(paths.begin(), paths.end(), make_cold);
          check_extents(paths, files, {3, chunk_bytes, direct}, ++seed, most);
        }
      }
    }
  }
  make_cold(paths[5]);
  check_end(paths[5]);
  check_cancel(paths[5]);
  check_interrupt(paths[5]);
  return failures == 0 ? 0 : 1;
}
