#include "support/wall.h"

#include <fcntl.h>
#include <uffdkit/unique_fd.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

namespace uffdkit::test {

Wall::Wall(std::string path) : path_(std::move(path)) {
  const UniqueFd file(::open(path_.c_str(), O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
  if (!file) throw std::system_error(errno, std::generic_category(), path_);
}

Wall::~Wall() {
  if (stands_) (void)::unlink(path_.c_str());
}

void Wall::take_down() {
  if (::unlink(path_.c_str()) != 0) throw std::system_error(errno, std::generic_category(), path_);
  stands_ = false;
}

}  // namespace uffdkit::test
