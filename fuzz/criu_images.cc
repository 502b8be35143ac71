// The image files of a CRIU checkpoint: the first byte says which kind is expected.
#include "wire/criu_images.h"

#include <sys/mman.h>
#include <unistd.h>

#include <array>

#include "base/check.h"
#include "input.h"

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace uffdkit;
  if (size == 0) return 0;
  constexpr std::array kKinds = {criu::ImageKind::inventory, criu::ImageKind::pstree,
                                 criu::ImageKind::pagemap, criu::ImageKind::mm};
  UniqueFd file(::memfd_create("fuzz", MFD_CLOEXEC));
  CHECK(file);
  CHECK(::write(file.get(), data + 1, size - 1) == static_cast<ssize_t>(size - 1));
  CHECK(::lseek(file.get(), 0, SEEK_SET) == 0);
  auto image = criu::ImageFile::open(std::move(file), "fuzz.img", kKinds[data[0] % kKinds.size()]);
  if (!image) return 0;
  for (auto record = image->next(); record && *record; record = image->next()) {
    criu::ProtoReader reader((*record)->bytes);
    for (auto field = reader.next(); field && *field; field = reader.next())
      CHECK((*field)->at <= (*record)->bytes.size());
  }
  return 0;
}
