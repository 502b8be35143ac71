// A file that has its name only when it is complete, so that nobody takes half of one for a whole.
#pragma once

#include <uffdkit/error.h>
#include <uffdkit/unique_fd.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace uffdkit::image {

class OutputFile {
 public:
  // Makes a file without a name in the folder of `path`, of mode 0600; memory holds secrets. Errors: the
  // folder cannot be written; there is a file at `path`, unless it may be replaced.
  static Result<OutputFile> create(const std::string& path, bool replace);
  OutputFile(OutputFile&& other) noexcept = default;
  OutputFile& operator=(OutputFile&&) = delete;
  // Removes what was not committed.
  ~OutputFile();

  // At the end of what was appended before. Errors: the disk is full, or fails.
  Result<void> append(std::span<const std::byte> bytes);
  // Leaves out so many bytes, which read as zero.
  void skip(std::uint64_t bytes) { size_ += bytes; }
  std::uint64_t size() const { return size_; }

  // Brings it to the disk and gives it its name. Errors: likewise, or the name is taken by now.
  Result<void> commit();

 private:
  OutputFile(std::string path, bool replace) : path_(std::move(path)), replace_(replace) {}
  Failure failure(const std::string& doing, int os_error) const;

  const std::string path_;
  const bool replace_;
  UniqueFd fd_;
  std::string temporary_;  // the name that it has until then, where a file cannot be without
  std::uint64_t size_ = 0;
};

}  // namespace uffdkit::image
