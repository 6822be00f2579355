#pragma once

#include "cache/write_cache.hpp"
#include "storage/storage.hpp"
#include "verify/verifier.hpp"

#include <algorithm>

namespace qcowcache {

/// The file as clients of one cache see it: what is cached over what is on storage. Both outlive
/// it.
class CachedImage final : public Verifier::Image {
public:
  CachedImage(WriteCache& cache, Storage& storage) noexcept : cache_(cache), storage_(storage) {}

  std::optional<qcow2::Header> header() override;
  const char* header_fault() override;
  [[nodiscard]] const void* client() const override { return &storage_; }
  [[nodiscard]] std::uint64_t size() const override { return storage_.capabilities().size; }
  [[nodiscard]] std::uint64_t largest_size() const override {
    return std::max(size(), cache_.size());
  }
  void read(std::uint64_t offset, std::span<std::byte> data) override {
    cache_.read(storage_, offset, data);
  }

private:
  std::span<const std::byte> begin(std::span<std::byte> bytes);

  WriteCache& cache_;
  Storage& storage_;
};

} // namespace qcowcache
