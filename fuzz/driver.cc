// For compilers without libFuzzer: runs a target on each file of its corpus, and on so many inputs that are
// made of them under a seed. `TARGET CORPUS_DIR RUNS SEED`; a bug ends it by a signal.
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

#include "input.h"

namespace {

using Input = std::vector<std::uint8_t>;

std::vector<Input> read_corpus(const char* directory) {
  std::vector<Input> corpus;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    std::ifstream file(entry.path(), std::ios::binary);
    corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  return corpus;
}

// A few random changes: bytes, bits, cuts, repetitions.
void change(Input& input, std::mt19937_64& random) {
  for (auto changes = 1 + random() % 4; changes > 0; --changes) {
    const std::size_t at = input.empty() ? 0 : random() % input.size();
    switch (random() % 5) {
      case 0:
        input.insert(input.begin() + static_cast<std::ptrdiff_t>(at), static_cast<std::uint8_t>(random()));
        break;
      case 1:
        if (!input.empty()) input[at] = static_cast<std::uint8_t>(random());
        break;
      case 2:
        if (!input.empty()) input[at] ^= static_cast<std::uint8_t>(1u << random() % 8);
        break;
      case 3:
        input.resize(at);
        break;
      default: {
        const Input part(input.begin() + static_cast<std::ptrdiff_t>(at), input.end());
        if (input.size() < 4096) input.insert(input.end(), part.begin(), part.end());
      }
    }
  }
}

}  // namespace

int main(int count, char** words) {
  if (count != 4) {
    std::fprintf(stderr, "usage: %s CORPUS_DIR RUNS SEED\n", words[0]);
    return 2;
  }
  const std::vector<Input> corpus = read_corpus(words[1]);
  if (corpus.empty()) return 2;
  for (const Input& input : corpus) LLVMFuzzerTestOneInput(input.data(), input.size());
  std::mt19937_64 random(std::strtoull(words[3], nullptr, 10));
  for (auto runs = std::strtoull(words[2], nullptr, 10); runs > 0; --runs) {
    Input input = corpus[random() % corpus.size()];
    change(input, random);
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  return 0;
}
