#pragma once

#include "model_sequence.hpp"
#include "storage.hpp"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

/// The disk that one or more `ModelStorage` see: what is on it, and what would be left after a
/// power cut. Not thread safe.
class ModelDisk {
public:
  explicit ModelDisk(std::vector<std::byte> initial) : now_(std::move(initial)), durable_(now_) {}

  [[nodiscard]] std::uint64_t size() const noexcept { return now_.size(); }
  [[nodiscard]] std::span<const std::byte> now(const qcowcache::ByteRange& range) const noexcept {
    return std::span(now_).subspan(range.begin, range.size());
  }
  [[nodiscard]] std::span<const std::byte>
  durable(const qcowcache::ByteRange& range) const noexcept {
    return std::span(durable_).subspan(range.begin, range.size());
  }

  void write(std::uint64_t offset, std::span<const std::byte> data);
  /// What is there now would be left after a power cut.
  void harden(const qcowcache::ByteRange& range);
  /// What is added reads as zeros.
  void resize(std::uint64_t size);

private:
  std::vector<std::byte> now_;
  std::vector<std::byte> durable_;
};

/// A call that reached storage. `kind` is none of `nothing` and `any`.
struct ModelCall {
  Fails kind;
  qcowcache::ByteRange range;
  /// What a write would write.
  std::span<const std::byte> data;
  bool fua = false;
  bool fast = false;
  std::uint64_t connection = 0;
};

/// What becomes of a call.
struct Verdict {
  /// errno, or 0.
  int error = 0;
  /// The first part of it is carried out although it fails.
  bool torn = false;
  /// It is not carried out although it succeeds.
  bool lost = false;
};

/// Sees each call before it is carried out and decides what becomes of it.
class ModelWatch {
public:
  ModelWatch(const ModelWatch&) = delete;
  ModelWatch& operator=(const ModelWatch&) = delete;
  virtual ~ModelWatch() = default;
  virtual Verdict judge(const ModelCall& call) = 0;

protected:
  ModelWatch() = default;
};

/// Storage as one connection sees it, on a `ModelDisk`. The watch outlives it.
class ModelStorage final : public qcowcache::Storage {
public:
  ModelStorage(const ModelSetup& setup, const qcowcache::Capabilities& capabilities,
               std::shared_ptr<ModelDisk> disk, ModelWatch& watch, std::uint64_t connection)
      : setup_(setup), capabilities_(capabilities), disk_(std::move(disk)), watch_(watch),
        connection_(connection) {}

  [[nodiscard]] const qcowcache::Capabilities& capabilities() const noexcept override {
    return capabilities_;
  }

protected:
  void do_read(std::uint64_t offset, std::span<std::byte> data) override;
  void do_write(std::uint64_t offset, std::span<const std::byte> data, bool fua) override;
  void do_flush() override;
  void do_zero(const qcowcache::ByteRange& range, const ZeroOptions& options) override;
  void do_trim(const qcowcache::ByteRange& range, bool fua) override;
  void do_cache(const qcowcache::ByteRange& range) override;
  Extents do_extents(const qcowcache::ByteRange& range, bool only_first) override;

private:
  void change(Fails kind, const qcowcache::ByteRange& range, std::span<const std::byte> data,
              bool fua, bool fast);
  void ask(Fails kind, const qcowcache::ByteRange& range);
  [[nodiscard]] ExtentType type_of(const qcowcache::ByteRange& part) const;

  const ModelSetup& setup_;
  const qcowcache::Capabilities capabilities_;
  const std::shared_ptr<ModelDisk> disk_;
  ModelWatch& watch_;
  const std::uint64_t connection_;
};
