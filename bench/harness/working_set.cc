#include "harness/working_set.h"

#include <chrono>
#include <filesystem>
#include <stdexcept>
#include <thread>

#include "harness/client.h"
#include "harness/placement.h"
#include "harness/server.h"

namespace uffdkit::bench {

void record_working_set(const Options& options, const std::string& image, std::uint64_t bytes,
                        std::span<const std::uint64_t> order) {
  const std::string set = image + ".ws";
  std::filesystem::remove(set);
  const UffdkitServer server(options.uffdkit, options.directory, image, {"--record"});
  {
    Client client(server, kAnyCpu, bytes, order.size());
    client.touch_all(order, 1);
  }
  for (int tries = 0; !std::filesystem::exists(set); ++tries) {
    if (tries == 1000) throw std::runtime_error("nothing was recorded in " + set);
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
}

}  // namespace uffdkit::bench
