// Strings as execve(2) takes them.
#pragma once

#include <string>
#include <vector>

namespace uffdkit::test {

// Valid as long as `texts` is. A null pointer comes last.
inline std::vector<char*> exec_pointers(const std::vector<std::string>& texts) {
  std::vector<char*> pointers;
  // What is executed gets copies.
  for (const std::string& text : texts) pointers.push_back(const_cast<char*>(text.c_str()));
  pointers.push_back(nullptr);
  return pointers;
}

}  // namespace uffdkit::test
