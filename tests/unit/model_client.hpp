#pragma once

#include "connection.hpp"
#include "memory_storage.hpp"
#include "model_bytes.hpp"
#include "model_sequence.hpp"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

/// What `value` writes at `range`: other values at neighbouring offsets, and zeros for 0.
[[nodiscard]] std::vector<std::byte> bytes_of(std::uint64_t value,
                                              const qcowcache::ByteRange& range);

/// Which bytes of a disk are for which client to change: stripes in turn, and those of the header
/// for the first one.
struct ModelStripes {
  /// No header is longer.
  static constexpr std::uint64_t header_end = 512;

  /// In bytes; 0: everybody changes everything.
  std::uint64_t width = 0;
  std::uint64_t clients = 1;
  /// The clients are at work at the same time.
  bool at_once = false;

  [[nodiscard]] bool owns(std::uint64_t client, std::uint64_t offset) const noexcept {
    return width == 0 || client == (offset < header_end ? 0 : offset / width % clients);
  }
  /// From the start of `range`, as far as one and the same client owns it.
  [[nodiscard]] qcowcache::ByteRange
  first_of_one_owner(const qcowcache::ByteRange& range) const noexcept;
};

/// A disk, and what it has to hold as far as one or more clients were told.
struct ModelView {
  std::shared_ptr<MemoryDisk> disk;
  ModelBytes bytes;
};

/// Told what becomes of clients' requests.
class ModelReferee {
public:
  ModelReferee(const ModelReferee&) = delete;
  ModelReferee& operator=(const ModelReferee&) = delete;
  virtual ~ModelReferee() = default;

  virtual void breaks(const std::string& promise) = 0;
  /// A request failed; returns whether there is a reason for this errno.
  virtual bool excuses(int error) = 0;
  /// Whether nothing of what storage refused during the request was carried out, not even in part;
  /// false where that is not known.
  [[nodiscard]] virtual bool untouched() const { return false; }
  /// What storage has trimmed during the request, as far as that is known.
  [[nodiscard]] virtual qcowcache::ByteRanges trimmed() const { return {}; }

protected:
  ModelReferee() = default;
};

/// A connection to an export. Carries out requests, one at a time, and checks what it can tell of
/// them: what it reads, and what storage has when it was told so.
class ModelClient {
public:
  using Work = std::function<void(qcowcache::WriteCache&, qcowcache::Storage&)>;

  /// The referee outlives the client. `number`: among those of the stripes, from 0.
  ModelClient(ModelReferee& referee, std::uint64_t number, const ModelStripes& stripes)
      : referee_(referee), number_(number), stripes_(stripes) {}

  /// The exports and the view outlive the connection.
  void connect(qcowcache::Exports& exports, std::unique_ptr<MemoryStorage> storage, ModelView& view,
               const std::string& name = "export");
  /// `properly`: with all that nbdkit does then.
  void disconnect(bool properly = true);

  /// The rest REQUIRES that it is connected, or, for the view, that it was.
  [[nodiscard]] bool connected() const noexcept { return connection_ != nullptr; }
  [[nodiscard]] const qcowcache::Capabilities& capabilities() const {
    return storage_->capabilities();
  }
  [[nodiscard]] const MemoryStorage& storage() const { return *storage_; }
  [[nodiscard]] ModelView& view() const { return *view_; }
  /// nullptr: no request has come yet.
  [[nodiscard]] const qcowcache::WriteCache* cache() const;
  /// A read is under way: what is read fills up no block.
  [[nodiscard]] bool reading() const noexcept { return reading_; }

  /// Carries out what is a request, clipped to what the client sees and, if it changes something,
  /// owns. Returns errno; 0: it succeeded, or there was nothing to do.
  int carry_out(const ModelStep& step);
  /// Any request; `excused` is an errno with which it may fail, beside those that the referee
  /// knows.
  int request(const qcowcache::Image::Request& needed, const Work& work, int excused = 0);
  int read(const qcowcache::ByteRange& range);
  int flush();

  /// What the step concerns, and what of that the client may change.
  [[nodiscard]] qcowcache::ByteRange range_of(const ModelStep& step) const;
  [[nodiscard]] qcowcache::ByteRange changed_by(const ModelStep& step) const;
  /// All that its cache owes storage it can bring there.
  [[nodiscard]] bool reaches_all() const;
  /// What the client owns in `range` is on storage, to stay if `durable`.
  void check_stored(const char* where, const qcowcache::ByteRange& range, bool durable);
  /// What a write brings that storage does not have is what some client wrote.
  void check_written(const MemoryStorage::Call& call) const;

private:
  template <typename Visit>
  void for_each_own(const qcowcache::ByteRange& range, Visit visit) const;
  [[nodiscard]] bool untouched(const qcowcache::ByteRange& range) const;
  void compare(const char* where, std::uint64_t offset, std::span<const std::byte> data);
  void check_read(const qcowcache::ByteRange& range, std::span<const std::byte> data);
  int write(std::uint64_t offset, const std::vector<std::byte>& data, bool fua);
  int write_header(const ModelStep& step, const qcowcache::ByteRange& range);
  int zero(const ModelStep& step, const qcowcache::ByteRange& range);
  int trim(const ModelStep& step, const qcowcache::ByteRange& range);
  int extents(const ModelStep& step, const qcowcache::ByteRange& range);

  ModelReferee& referee_;
  const std::uint64_t number_;
  const ModelStripes stripes_;
  std::unique_ptr<qcowcache::Connection> connection_;
  /// Owned by the connection.
  MemoryStorage* storage_ = nullptr;
  ModelView* view_ = nullptr;
  bool reading_ = false;
};
