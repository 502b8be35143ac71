// A file for as long as which a store does not answer (--store-fault stall,while=FILE).
#pragma once

#include <string>

namespace uffdkit::test {

class Wall {
 public:
  // Builds it. Throws if it cannot.
  explicit Wall(std::string path);
  // Takes it down if it stands, so that a test which has failed waits for nobody.
  ~Wall();
  Wall(const Wall&) = delete;
  Wall& operator=(const Wall&) = delete;

  // Throws if it does not stand.
  void take_down();

 private:
  const std::string path_;
  bool stands_ = true;
};

}  // namespace uffdkit::test
