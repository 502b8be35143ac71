// The subcommands of "uffdkit image", and what they have in common.
#pragma once

#include <uffdkit/error.h>

#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "image/open_image.h"
#include "image/working_set.h"
#include "image/write_image.h"
#include "tool/progress_bar.h"

namespace CLI {
class App;
}

namespace uffdkit::tool {

// How an image is written, as the command line says it.
struct OutputOptions {
  std::string path;
  std::uint64_t frame_bytes = image::kFrameBytesDefault;
  int level = image::kLevelDefault;
  unsigned threads = 0;
  bool force = false;
  bool json = false;

  image::WriteOptions write_options(ProgressBar& bar) const;
};

void add_output_options(CLI::App& command, OutputOptions& options);
// Those of them that say how, and not where.
void add_frame_options(CLI::App& command, OutputOptions& options);
void add_threads_option(CLI::App& command, unsigned& threads);
void add_json_option(CLI::App& command, bool& json);

// An opener whose cache is large enough for what one command does.
image::ImageOpener make_opener();

// The working set at `path`, if there is one. Errors: it cannot be read, or is not of the memory that
// `opened` shows.
Result<std::optional<image::WorkingSet>> working_set_of(const image::OpenImage& opened,
                                                        const std::string& path);

// Says what was written; returns the exit code.
int report_written(const Result<image::Written>& written, const OutputOptions& options);
// What `uffdkit image info --json` has of an image's record.
nlohmann::ordered_json record_to_json(const image::Record& record);

void add_image_create(CLI::App& image, int& exit_code);
void add_image_diff(CLI::App& image, int& exit_code);
void add_image_apply(CLI::App& image, int& exit_code);
void add_image_convert(CLI::App& image, int& exit_code);
void add_image_store_set(CLI::App& image, int& exit_code);
void add_image_info(CLI::App& image, int& exit_code);
void add_image_verify(CLI::App& image, int& exit_code);
void add_image_extract(CLI::App& image, int& exit_code);

}  // namespace uffdkit::tool
