// Appends new rows to a KV cache.
#pragma once

#include "interface.h"

namespace fastattn::cpu {

void append_rows(const FastattnAppend& append);

}  // namespace fastattn::cpu
