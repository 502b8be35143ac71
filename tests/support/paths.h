// Where the programs under test and the project's own files are. Only paths.cc is compiled with these paths,
// so that what a compiler's cache holds of all other tests serves every checkout.
#pragma once

#include <string>
#include <string_view>

namespace uffdkit::test {

std::string build_directory();

// Of a file in the build's folder: "uffdkit".
std::string built(std::string_view name);

// Of a file of the project: "docs/protocol.md".
std::string in_source(std::string_view path);

}  // namespace uffdkit::test
