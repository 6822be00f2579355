#pragma once

#include <system_error>

namespace qcowcache {

/// A request's error that is nothing but the client's answer: the operator has been told of what is
/// behind it, or need not know.
class Answer : public std::system_error {
public:
  using std::system_error::system_error;
};

} // namespace qcowcache
