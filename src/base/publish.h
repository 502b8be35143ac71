// Stores that others see in their order: who takes memory up that its writer left, cut off anywhere.
#pragma once

#include <atomic>
#include <type_traits>

namespace uffdkit {

// Whoever sees this store sees all that were made before it.
template <class T>
void publish(T& field, std::type_identity_t<T> value) {
  std::atomic_ref<T>(field).store(value, std::memory_order_release);
}

}  // namespace uffdkit
