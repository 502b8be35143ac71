// uffdkit image info, verify and extract: what an image is, whether it is sound, and its memory as a raw
// file.
#include <fcntl.h>
#include <fmt/format.h>
#include <uffdkit/unique_fd.h>

#include <CLI/CLI.hpp>
#include <cmath>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <system_error>
#include <utility>

#include "image/check_image.h"
#include "image/working_set.h"
#include "tool/command.h"
#include "tool/image.h"

namespace uffdkit::tool {
namespace {

struct Options {
  std::string image;
  std::string out;
  bool regions = false;
  bool force = false;
  bool json = false;
  unsigned threads = 0;
};

nlohmann::ordered_json layer_to_json(const image::ImageFile& layer) {
  nlohmann::ordered_json json = record_to_json(layer.record());
  json["image"] = layer.name();
  json["file_bytes"] = layer.file_bytes();
  json["frames"] = layer.frame_count();
  json["compressed_bytes"] = layer.compressed_bytes();
  return json;
}

nlohmann::ordered_json regions_to_json(const image::Record& record) {
  nlohmann::ordered_json json = nlohmann::ordered_json::array();
  std::uint64_t offset = 0;
  for (const image::Region& region : record.regions) {
    const std::uint64_t bytes = region.pages * image::kPageBytes;
    json.push_back({{"address", region.address},
                    {"bytes", bytes},
                    {"offset", offset},
                    {"protection", region.protection},
                    {"name", region.name}});
    offset += bytes;
  }
  return json;
}

void print_layer(const image::ImageFile& layer) {
  const nlohmann::ordered_json json = layer_to_json(layer);
  const auto pages = [&](const char* key) {
    return size_text(json[key].get<std::uint64_t>() * image::kPageBytes);
  };
  fmt::print("{}\n", layer.name());
  fmt::print("  kind      {}\n", json["kind"].get<std::string>());
  fmt::print("  identity  {}\n", json["identity"].get<std::string>());
  if (layer.record().is_diff)
    fmt::print("  parent    {}, {}\n", layer.record().parent_name, image::to_string(layer.record().parent));
  fmt::print("  memory    {}: {} stored, {} zero, {} of the parent\n", size_text(layer.record().raw_bytes),
             pages("stored_pages"), pages("zero_pages"), pages("parent_pages"));
  fmt::print("  file      {}: {} in {} frames of up to {}\n", size_text(layer.file_bytes()),
             size_text(layer.compressed_bytes()), layer.frame_count(), size_text(layer.record().frame_bytes));
  if (!layer.record().regions.empty())
    fmt::print("  process   {} regions (--regions lists them)\n", layer.record().regions.size());
}

void print_regions(const image::Record& record) {
  std::uint64_t offset = 0;
  for (const image::Region& region : record.regions) {
    const std::uint64_t bytes = region.pages * image::kPageBytes;
    fmt::print("{:016x}-{:016x} {}{}{} {:>14} {}\n", region.address, region.address + bytes,
               region.protection & 1 ? 'r' : '-', region.protection & 2 ? 'w' : '-',
               region.protection & 4 ? 'x' : '-', offset, region.name);
    offset += bytes;
  }
}

nlohmann::ordered_json working_set_to_json(const image::WorkingSet& set,
                                           std::optional<std::uint64_t> stored_bytes = std::nullopt) {
  nlohmann::ordered_json json = {{"pages", set.pages.size()},
                                 {"memory_pages", set.memory_pages},
                                 {"recordings", set.recordings},
                                 {"runs", nlohmann::ordered_json::array()}};
  for (const image::WorkingSetRun& run : set.runs)
    json["runs"].push_back({{"coverage", run.coverage()},
                            {"brought", run.brought},
                            {"hits", std::llround(run.hits())},
                            {"waste", std::llround(run.waste())},
                            {"late", run.late},
                            {"missed", run.missed},
                            {"left_out", run.left_out},
                            {"left_out_used", run.left_out_used}});
  if (stored_bytes) json["stored_bytes"] = *stored_bytes;
  return json;
}

// What the image's working set takes where it is stored for itself; nothing if it is not.
std::optional<std::uint64_t> stored_set_bytes(image::ImageOpener& opener, image::OpenImage& opened,
                                              const std::string& path) {
  const UniqueFd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (auto added = opener.add_stored_set(opened, file.get(), path); !added) report(added.error());
  if (!opened.stored_set) return std::nullopt;
  std::error_code error;
  const auto own = std::filesystem::canonical(path, error);
  const std::uint64_t bytes = std::filesystem::file_size(own.string() + image::kStoredSetSuffix, error);
  // It was removed meanwhile.
  if (error) return std::nullopt;
  return bytes;
}

void print_working_set(const image::WorkingSet& set, std::optional<std::uint64_t> stored_bytes) {
  const double share = static_cast<double>(set.pages.size()) / static_cast<double>(set.memory_pages);
  fmt::print("  used      {} of {} ({:.1f} %), as {} recordings say\n",
             size_text(set.pages.size() * image::kPageBytes), size_text(set.memory_pages * image::kPageBytes),
             100 * share, set.recordings);
  if (stored_bytes) fmt::print("            stored for itself in {}\n", size_text(*stored_bytes));
  for (const image::WorkingSetRun& run : set.runs)
    fmt::print(
        "    a run   coverage {:.1f} %; of {} pages brought about {:.0f} hits, {:.0f} waste; {} late, {} "
        "missed\n",
        100 * run.coverage(), run.brought, run.hits(), run.waste(), run.late, run.missed);
}

int info(const Options& options) {
  image::ImageOpener opener = make_opener();
  Result<image::OpenImage> opened = opener.open(options.image);
  if (!opened) return report(opened.error());
  // What is wrong with it is said, and is not an error of the image's.
  Result<std::optional<image::WorkingSet>> beside =
      working_set_of(*opened, options.image + image::kWorkingSetSuffix);
  if (!beside) report(beside.error());
  const std::optional<image::WorkingSet> set = std::move(beside).value_or(std::nullopt);
  if (opened->is_raw()) {
    if (options.json) {
      nlohmann::ordered_json json = {
          {"image", options.image}, {"kind", "raw"}, {"memory_bytes", opened->raw_bytes}};
      if (set) json["working_set"] = working_set_to_json(*set);
      fmt::print("{}\n", json.dump(2));
    } else {
      fmt::print("{}\n  kind      raw\n  memory    {}\n", options.image, size_text(opened->raw_bytes));
      if (set) print_working_set(*set, std::nullopt);
    }
    return kExitDone;
  }
  const std::optional<std::uint64_t> stored = stored_set_bytes(opener, *opened, options.image);
  const image::Record& record = opened->layers.front()->record();
  if (options.json) {
    nlohmann::ordered_json json = layer_to_json(*opened->layers.front());
    json["parents"] = nlohmann::ordered_json::array();
    for (std::size_t i = 1; i < opened->layers.size(); ++i)
      json["parents"].push_back(layer_to_json(*opened->layers[i]));
    json["regions"] = regions_to_json(record);
    if (set) json["working_set"] = working_set_to_json(*set, stored);
    fmt::print("{}\n", json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace));
  } else if (options.regions) {
    print_regions(record);
  } else {
    for (const auto& layer : opened->layers) print_layer(*layer);
    if (set) print_working_set(*set, stored);
  }
  return kExitDone;
}

int verify(const Options& options) {
  const Result<image::OpenImage> opened = make_opener().open(options.image);
  if (!opened) return report(opened.error());
  image::Verified verified;
  {
    ProgressBar bar("verify");
    verified = image::verify_image(*opened, options.threads,
                                   [&](std::uint64_t done, std::uint64_t all) { bar.show(done, all); });
  }
  const bool sound = verified.problems.empty();
  if (options.json) {
    nlohmann::ordered_json json = {{"image", options.image},
                                   {"sound", sound},
                                   {"layers", opened->layers.size()},
                                   {"frames", verified.frames},
                                   {"problems", nlohmann::ordered_json::array()}};
    if (sound) json["identity"] = image::to_string(verified.identity);
    for (const Error& problem : verified.problems) json["problems"].push_back(problem.message());
    fmt::print("{}\n", json.dump(2));
    return sound ? kExitDone : kExitFailed;
  }
  for (const Error& problem : verified.problems) report(problem);
  if (!sound) return kExitFailed;
  fmt::print("{}: {}, {} frames in {} files, identity {}\n", options.image,
             opened->is_raw() ? "raw memory, of which nothing says what it should be" : "sound",
             verified.frames, opened->layers.size(), image::to_string(verified.identity));
  return kExitDone;
}

int extract(const Options& options) {
  const Result<image::OpenImage> opened = make_opener().open(options.image);
  if (!opened) return report(opened.error());
  Result<std::uint64_t> bytes = 0;
  {
    ProgressBar bar("extract");
    bytes = image::extract_image(*opened, options.out, options.force, options.threads,
                                 [&](std::uint64_t done, std::uint64_t all) { bar.show(done, all); });
  }
  if (!bytes) return report(bytes.error());
  if (options.json) {
    const nlohmann::ordered_json json = {{"file", options.out}, {"memory_bytes", *bytes}};
    fmt::print("{}\n", json.dump(2));
  } else {
    fmt::print("{}: {} of memory\n", options.out, size_text(*bytes));
  }
  return kExitDone;
}

void add_image_argument(CLI::App& command, Options& options) {
  command.add_option("IMAGE", options.image, "The image; its parents lie in the same folder")->required();
}

}  // namespace

void add_image_info(CLI::App& image, int& exit_code) {
  CLI::App* command = image.add_subcommand("info", "Show what an image is and what it is made of");
  const auto options = std::make_shared<Options>();
  add_image_argument(*command, *options);
  command->add_flag("--regions", options->regions,
                    "List where in its process the memory lay: addresses, protection, offset, name");
  add_json_option(*command, options->json);
  command->callback([options, &exit_code] { exit_code = info(*options); });
}

void add_image_verify(CLI::App& image, int& exit_code) {
  CLI::App* command = image.add_subcommand("verify", "Read all of an image, and say whether it is sound");
  const auto options = std::make_shared<Options>();
  add_image_argument(*command, *options);
  add_threads_option(*command, options->threads);
  add_json_option(*command, options->json);
  command->callback([options, &exit_code] { exit_code = verify(*options); });
}

void add_image_extract(CLI::App& image, int& exit_code) {
  CLI::App* command = image.add_subcommand("extract", "Write the memory of an image as a raw file");
  const auto options = std::make_shared<Options>();
  add_image_argument(*command, *options);
  command->add_option("OUT", options->out, "The file to make, with holes for zeros")->required();
  add_threads_option(*command, options->threads);
  command->add_flag("--force", options->force, "Replace OUT if it is there");
  add_json_option(*command, options->json);
  command->callback([options, &exit_code] { exit_code = extract(*options); });
}

}  // namespace uffdkit::tool
