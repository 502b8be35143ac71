// uffdkit image: makes, looks at and takes apart images of memory.
#include "tool/image.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <array>
#include <string>
#include <utility>

#include "tool/command.h"

namespace uffdkit::tool {
namespace {

// Decompressed frames that a command keeps: those of a layer or two around where it reads.
constexpr ByteCount kCacheBytes{64u << 20};

std::uint64_t pages_of(const image::Record& record, image::PageKind kind) {
  std::uint64_t pages = 0;
  for (const image::PageRun& run : record.runs)
    if (run.kind == kind) pages += run.pages;
  return pages;
}

}  // namespace

image::WriteOptions OutputOptions::write_options(ProgressBar& bar) const {
  return {.frame_bytes = static_cast<std::uint32_t>(frame_bytes),
          .level = level,
          .threads = threads,
          .replace = force,
          .progress = [&bar](std::uint64_t done, std::uint64_t all) { bar.show(done, all); }};
}

void add_threads_option(CLI::App& command, unsigned& threads) {
  command.add_option("--threads", threads, "Threads that work; 0: one for each CPU")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
}

void add_json_option(CLI::App& command, bool& json) {
  command.add_flag("--json", json, "Print what came of it as JSON");
}

void add_output_options(CLI::App& command, OutputOptions& options) {
  command.add_option("OUT", options.path, "The image to make")->required();
  add_frame_options(command, options);
  command.add_flag("--force", options.force, "Replace OUT if it is there");
}

void add_frame_options(CLI::App& command, OutputOptions& options) {
  command
      .add_option(
          "--frame-size", options.frame_bytes,
          "Bytes that are compressed together, and so decompressed together when a page is wanted: 16K, "
          "32K, 64K, 128K or 256K")
      ->transform(CLI::AsSizeValue(false))
      ->check(CLI::IsMember({16u << 10, 32u << 10, 64u << 10, 128u << 10, 256u << 10}))
      ->default_str("64K");
  command.add_option("--level", options.level, "zstd's level, -7 (fast) to 19 (small)")
      ->check(CLI::Range(image::kLevelMin, image::kLevelMax))
      ->capture_default_str();
  add_threads_option(command, options.threads);
  add_json_option(command, options.json);
}

image::ImageOpener make_opener() {
  return image::ImageOpener(std::make_shared<image::FrameCache>(kCacheBytes));
}

Result<std::optional<image::WorkingSet>> working_set_of(const image::OpenImage& opened,
                                                        const std::string& path) {
  Result<std::optional<image::WorkingSet>> set = image::read_working_set(path);
  if (!set) return set;
  const std::optional<image::WorkingSet>& recorded = *set;
  if (!recorded) return set;
  const Result<image::Identity> identity =
      opened.is_raw() ? image::identity_of(*opened.store) : opened.layers.front()->record().identity;
  if (!identity) return Failure(identity.error());
  if (auto own = image::check_recorded_of(*recorded, *identity,
                                          opened.store->size().value / image::kPageBytes, path);
      !own)
    return Failure(std::move(own).error());
  return set;
}

nlohmann::ordered_json record_to_json(const image::Record& record) {
  nlohmann::ordered_json json = {{"kind", record.is_diff ? "diff" : "whole"},
                                 {"memory_bytes", record.raw_bytes},
                                 {"identity", image::to_string(record.identity)},
                                 {"frame_bytes", record.frame_bytes},
                                 {"stored_pages", pages_of(record, image::PageKind::stored)},
                                 {"zero_pages", pages_of(record, image::PageKind::zero)},
                                 {"parent_pages", pages_of(record, image::PageKind::parent)}};
  if (record.is_diff) {
    json["parent"] = record.parent_name;
    json["parent_identity"] = image::to_string(record.parent);
  }
  return json;
}

int report_written(const Result<image::Written>& written, const OutputOptions& options) {
  if (!written) return report(written.error());
  nlohmann::ordered_json json = record_to_json(written->record);
  json["image"] = options.path;
  json["file_bytes"] = written->file_bytes;
  if (options.json) {
    fmt::print("{}\n", json.dump(2));
  } else {
    const std::uint64_t stored = json["stored_pages"].get<std::uint64_t>() * image::kPageBytes;
    fmt::print("{}: {} of memory, of which {} stored, in {}\n", options.path,
               size_text(written->record.raw_bytes), size_text(stored), size_text(written->file_bytes));
  }
  return kExitDone;
}

void add_image(CLI::App& app, int& exit_code) {
  CLI::App* command = app.add_subcommand("image", "Make, look at and take apart compressed images of memory");
  command->require_subcommand(1);
  constexpr std::array kAdd = {add_image_create, add_image_info,  add_image_verify,  add_image_convert,
                               add_image_diff,   add_image_apply, add_image_extract, add_image_store_set};
  for (const auto add : kAdd) add(*command, exit_code);
}

}  // namespace uffdkit::tool
